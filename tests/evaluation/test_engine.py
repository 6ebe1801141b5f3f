"""The engine's numbers against a plain computation, whatever the actors and batches."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import ray
import scipy.linalg
import torch
from torch import Tensor
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from facm_core.samplers import sample_consistency, sample_euler, sample_noise
from facm_platform.evaluation import Protocol
from facm_platform.evaluation.engine import PARTS, Engine, Evaluator, View, Workload
from facm_platform.evaluation.features import FeatureExtractor, load_features
from facm_platform.evaluation.measured import Measured, Score, score
from facm_platform.evaluation.real import DecodedSet
from facm_platform.evaluation.reference import ReferenceFile
from facm_platform.evaluation.report import as_metrics
from facm_platform.registry import load_artifact
from tests.world import World

SAMPLES = 1100


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
            kept_features=300,
        ),
        data_uri=world.data,
        manifest=world.manifest,
        view=View(
            kind="fitted",
            features_uri=features.uri,
            keep=300,
            batch_size=64,
            gpu=False,
            shown_classes=4,
            shown_samples=2,
        ),
    )


Measure = Callable[..., tuple[Score, list[Measured]]]


@pytest.fixture
def measure(workload: Workload, tmp_path: Path) -> Measure:
    """``measure(uri, steps)`` -> the score, and the parts that it is of."""
    kept = tmp_path / "parts"

    def run(
        uri: str, steps: int, actors: int = 1, kept: Path = kept, given: Workload = workload
    ) -> tuple[Score, list[Measured]]:
        extractor = load_features(given.view.features_uri)
        file = ReferenceFile(str(kept / "reference.safetensors"), "", exists=False)
        with Engine(given, extractor, actors, str(kept)) as engine:
            parts = engine.samples(load_artifact(uri).info, steps)
            found = score(parts, engine.reference(file))
            engine.forget()
        return found, parts

    return run


def together(parts: list[Measured]) -> Measured:
    first, *others = parts
    for part in others:
        first.merge(part)
    return first


def plain_fid(x_1: Tensor, x_2: Tensor) -> float:
    a, b = x_1.numpy(), x_2.numpy()
    cov_1, cov_2 = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(cov_1 @ cov_2)
    shift = ((a.mean(0) - b.mean(0)) ** 2).sum()
    return float(shift + np.trace(cov_1 + cov_2 - 2 * np.real(root)))


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(("model", "steps"), [("student", 1), ("student", 3), ("teacher", 4)])
def test_equals_a_plain_computation_in_one_batch(
    world: World, measure: Measure, model: str, steps: int
) -> None:
    uri = str(world.folder / model)
    found, parts = measure(uri, steps, actors=2)

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
    images = (images.clamp(-1, 1) * 127.5 + 127.5).round().byte()
    assert float(images.double().std()) > 0.3 * 127.5, "the model must do something"
    extractor = load_features(world.features).to(torch.device("cpu"), torch.float64)
    seen = extractor(images)
    real = DecodedSet(world.data, world.manifest)
    batches = [batch for piece in real.pieces() for batch, _ in real.batches(piece, 500)]
    reference = torch.cat([extractor(batch).features for batch in batches])
    assert found.fid == pytest.approx(plain_fid(seen.features, reference), rel=1e-6)
    some, others = seen.features[:300], reference[:300]
    theirs = prc_features_to_metric(some, others, verbose=False)
    assert found.precision == pytest.approx(theirs["precision"], rel=1e-6)
    assert found.recall == pytest.approx(theirs["recall"], rel=1e-6)
    kid = kid_features_to_metric(some, others, kid_subset_size=300, verbose=False)
    assert found.kid == pytest.approx(kid["kernel_inception_distance_mean"], rel=1e-6)
    assert seen.logits is not None
    isc = isc_features_to_metric(seen.logits, splits=10, shuffle=False)
    assert found.inception_score == pytest.approx(isc["inception_score_mean"], rel=1e-6)
    assert seen.labels is not None
    assert found.agreement == float((seen.labels == labels).double().mean())
    shown = together(parts).shown
    assert set(shown) == {(label, n) for label in range(4) for n in range(2)}
    assert torch.equal(shown[3, 1], images[13])


@pytest.mark.usefixtures("ray_cluster")
def test_the_same_for_any_number_of_actors_and_any_batch_size(
    world: World, workload: Workload, measure: Measure
) -> None:
    small = dataclasses.replace(workload, view=dataclasses.replace(workload.view, batch_size=7))
    one, first = measure(world.student, 2, actors=1)
    three, second = measure(world.student, 2, actors=3)
    other, third = measure(world.student, 2, actors=2, given=small)
    assert three == one
    assert as_metrics(other, 2) == pytest.approx(as_metrics(one, 2), rel=1e-9)
    for parts in (second, third):
        for key, image in together(first).shown.items():
            assert torch.equal(image, together(parts).shown[key])


@pytest.mark.usefixtures("ray_cluster")
def test_an_interrupted_evaluation_goes_on(
    world: World, workload: Workload, measure: Measure, tmp_path: Path
) -> None:
    undisturbed, _ = measure(world.student, 1)
    kept, extractor = tmp_path / "interrupted", load_features(world.features)
    model = load_artifact(world.student).info
    with Engine(workload, extractor, 1, str(kept)) as engine:
        before = [part.statistics.mean for part in engine.samples(model, 1)]
    files = sorted(kept.iterdir())
    assert len(files) == PARTS
    first, second = (file.read_bytes() for file in files[:2])
    files[0].write_bytes(second)
    with Engine(workload, extractor, 1, str(kept)) as engine:
        swapped = [part.statistics.mean for part in engine.samples(model, 1)]
    assert torch.equal(swapped[0], swapped[1]), "what is kept is not computed again"
    files[0].write_bytes(first)
    for file in files[4:]:
        file.unlink()
    again, parts = measure(world.student, 1, kept=kept)
    assert again == undisturbed
    assert all(torch.equal(a, b.statistics.mean) for a, b in zip(before, parts, strict=True))
    assert list(kept.iterdir()) == [], "nothing is left when it has ended"


def test_single_precision_is_close_to_double(
    world: World, workload: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The protocol says float64 for its batch-independent bits, not because float32 is wrong."""

    def features_mean(precision: str, batch_size: int) -> Tensor:
        monkeypatch.setattr(FeatureExtractor, "precision", precision)
        view = dataclasses.replace(workload.view, batch_size=batch_size)
        given = dataclasses.replace(workload, view=view)
        return Evaluator(given).block(world.student, 2, 0, 200).statistics.mean

    single, double = features_mean("float32", 7), features_mean("float64", 64)
    assert not torch.equal(single, double)
    torch.testing.assert_close(single, double, rtol=0, atol=1e-3)


@pytest.mark.usefixtures("ray_cluster")
def test_a_killed_actor_is_replaced_and_the_numbers_stay(
    world: World, workload: Workload, measure: Measure, tmp_path: Path
) -> None:
    _, undisturbed = measure(world.student, 1)
    extractor = load_features(world.features)
    with Engine(workload, extractor, 1, str(tmp_path / "killed")) as engine:
        actor = engine._actors[0]
        pid: Callable[[object], int] = lambda _: os.getpid()  # noqa: E731
        os.kill(ray.get(actor.__ray_call__.remote(pid)), signal.SIGKILL)
        parts = engine.samples(load_artifact(world.student).info, 1)
    for part, expected in zip(parts, undisturbed, strict=True):
        assert torch.equal(part.statistics.mean, expected.statistics.mean)
