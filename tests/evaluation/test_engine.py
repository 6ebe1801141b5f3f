"""The engine's numbers against a plain computation, whatever the actors and batches."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Callable

import numpy as np
import pytest
import ray
import scipy.linalg
import torch
from torch import Tensor

from facm_core.samplers import sample_consistency, sample_euler, sample_noise
from facm_platform.evaluation import Protocol
from facm_platform.evaluation.engine import BLOCK_SAMPLES, Engine, Evaluator, Measured, Workload
from facm_platform.evaluation.features import load_features
from facm_platform.evaluation.protocol import dequantise
from facm_platform.evaluation.real import real_images
from facm_platform.registry import load_artifact
from tests.world import World

SAMPLES = 1100  # more than two blocks, and not a whole number of them


@pytest.fixture
def workload(world: World) -> Workload:
    features = load_features(world.features)
    return Workload(
        protocol=Protocol(
            extractor="digits",
            extractor_sha256=features.sha256,
            reference_sha256=world.manifest.sha256,
            samples=SAMPLES,
            seed=5,
        ),
        data_uri=world.data,
        manifest=world.manifest,
        features_uri=world.features,
        shown_classes=4,
        shown_samples=2,
        batch_size=64,
        device="cpu",
    )


def measure(workload: Workload, uri: str, steps: int, actors: int = 1) -> tuple[float, Measured]:
    with Engine(workload, actors) as engine:
        measured = engine.samples(uri, steps)
        return measured.statistics.distance(engine.reference().statistics), measured


def plain_fid(x_1: Tensor, x_2: Tensor) -> float:
    a, b = x_1.numpy(), x_2.numpy()
    cov_1, cov_2 = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(cov_1 @ cov_2)
    shift = ((a.mean(0) - b.mean(0)) ** 2).sum()
    return float(shift + np.trace(cov_1 + cov_2 - 2 * np.real(root)))


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(("model", "steps"), [("student", 1), ("student", 3), ("teacher", 4)])
def test_equals_a_plain_computation_in_one_batch(
    world: World, workload: Workload, model: str, steps: int
) -> None:
    uri = str(world.folder / model)
    fid, measured = measure(workload, uri, steps, actors=2)

    artifact = load_artifact(uri)
    network = artifact.model.double()
    seeds = [5 * 2**32 + i for i in range(SAMPLES)]
    labels = torch.arange(SAMPLES) % 10
    noise = sample_noise((1, 8, 8), seeds).double()
    if model == "student":
        x = sample_consistency(network, noise, labels, steps=steps, seeds=seeds)
    else:
        assert artifact.config.guidance.scale == 1.5
        x = sample_euler(network, noise, labels, steps=steps, guidance=artifact.config.guidance)
    images = x * world.manifest.std[0] + world.manifest.mean[0]
    images = (images.clamp(-1, 1) * 127.5 + 127.5).round() / 127.5 - 1
    assert float(images.std()) > 0.3, "the model must do something"
    extractor = load_features(world.features).to(torch.device("cpu"), torch.float64)
    features, logits = extractor(images)
    real = torch.cat(
        [
            extractor(dequantise(batch, torch.float64))[0]
            for batch, _ in real_images(world.data, world.manifest, 500)
        ]
    )
    assert fid == pytest.approx(plain_fid(features, real), rel=1e-6)
    assert measured.agreement == float((logits.argmax(1) == labels).double().mean())
    assert set(measured.shown) == {(label, n) for label in range(4) for n in range(2)}
    shown = dequantise(measured.shown[3, 1], torch.float64)
    assert torch.equal(shown, dequantise(((images[13] + 1) * 127.5).round().byte(), torch.float64))


@pytest.mark.usefixtures("ray_cluster")
def test_the_same_for_any_number_of_actors_and_any_batch_size(
    world: World, workload: Workload
) -> None:
    assert SAMPLES > 2 * BLOCK_SAMPLES
    one, first = measure(workload, world.student, 2, actors=1)
    two, second = measure(workload, world.student, 2, actors=2)
    small, third = measure(dataclasses.replace(workload, batch_size=7), world.student, 2, actors=2)
    assert two == one
    assert small == pytest.approx(one, rel=1e-9)
    assert first.agreeing == second.agreeing == third.agreeing
    for key, image in first.shown.items():
        assert torch.equal(image, second.shown[key])
        assert torch.equal(image, third.shown[key])


def test_single_precision_is_close_to_double(world: World, workload: Workload) -> None:
    """The protocol says float64 for its batch-independent bits, not because float32 is wrong."""

    def features_mean(precision: str, batch_size: int) -> Tensor:
        protocol = dataclasses.replace(workload.protocol, precision=precision)
        given = dataclasses.replace(workload, protocol=protocol, batch_size=batch_size)
        return Evaluator(given).block(world.student, 2, 0, 200).statistics.mean

    single, double = features_mean("float32", 7), features_mean("float64", 64)
    assert not torch.equal(single, double)
    torch.testing.assert_close(single, double, rtol=0, atol=1e-3)


@pytest.mark.usefixtures("ray_cluster")
def test_the_reference_is_every_row_and_agrees_with_its_labels(workload: Workload) -> None:
    with Engine(workload, actors=1) as engine:
        reference = engine.reference()
    assert reference.statistics.count == 1797
    assert reference.agreement > 0.9
    assert set(reference.shown) == {(label, n) for label in range(4) for n in range(2)}


@pytest.mark.usefixtures("ray_cluster")
def test_a_killed_actor_is_replaced_and_the_numbers_stay(world: World, workload: Workload) -> None:
    undisturbed, _ = measure(workload, world.student, 1)
    with Engine(workload, actors=1) as engine:
        actor = engine._actors[0]
        pid: Callable[[object], int] = lambda _: os.getpid()  # noqa: E731
        os.kill(ray.get(actor.__ray_call__.remote(pid)), signal.SIGKILL)
        measured = engine.samples(world.student, 1)
        fid = measured.statistics.distance(engine.reference().statistics)
    assert fid == undisturbed
