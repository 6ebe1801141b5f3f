"""The feature extractor of the digits: good, the same every time, and refused when damaged."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

from facm_core.errors import InvalidInputError
from facm_platform.config.sections import DataConfig, RunConfig
from facm_platform.evaluation.features import DESCRIPTION, WEIGHTS, FeaturesInfo, load_features
from facm_platform.evaluation.fit import FeaturesConfig, fit, prepare
from facm_platform.evaluation.real import DecodedSet
from facm_platform.storage import write_bytes
from facm_platform.tracking import Store, TrackingConfig
from tests.world import World


def config(world: World, tmp_path: Path, uri: str, **changes: object) -> FeaturesConfig:
    run = RunConfig(
        name="fit", storage_uri=str(tmp_path / "runs"), tracking=TrackingConfig(uri=uri)
    )
    given = FeaturesConfig(
        run=run, data=DataConfig(uri=world.data), output_uri=str(tmp_path / "out"), name="digits"
    )
    return dataclasses.replace(given, **changes)  # type: ignore[arg-type]


@pytest.mark.usefixtures("ray_cluster")
def test_the_job_fits_a_good_extractor_and_tells_its_accuracy(
    world: World, store: Store, tmp_path: Path
) -> None:
    plan = prepare(config(world, tmp_path, store.uri))
    assert "1797 rows" in plan.describe()
    result = plan.execute()
    extractor = load_features(result.artifact_uri)
    assert extractor.accuracy == result.metrics["test_accuracy"] > 0.98
    assert extractor.info.latent_manifest_sha256 == world.manifest.sha256
    run = store.client.get_run(str(result.run_id))
    assert run.info.status == "FINISHED"
    assert run.data.metrics["test_accuracy"] == extractor.accuracy
    assert run.data.tags["facm.extractor_sha256"] == extractor.sha256

    # The whole set, most of which it has seen.
    right = total = 0
    features = []
    for images, labels in DecodedSet(world.data, world.manifest).batches((0, 1797), 256):
        seen = extractor(images)
        assert seen.labels is not None
        right += int((seen.labels == labels).sum())
        total += len(labels)
        features.append(seen.features.double())
    assert total == 1797
    assert right / total > 0.99
    # No feature is constant: the covariance has full rank.
    assert float(torch.linalg.eigvalsh(torch.cat(features).T.cov())[0]) > 1e-6


def test_the_same_weights_every_time_and_others_with_another_seed(world: World) -> None:
    info = load_features(world.features).info
    threads = torch.get_num_threads()
    state = torch.random.get_rng_state()
    (one, accuracy), (again, _), (other, _) = (
        fit(world.data, world.manifest, info, epochs=1, seed=seed) for seed in (0, 0, 1)
    )
    assert all(
        torch.equal(a, b)
        for a, b in zip(one.state_dict().values(), again.state_dict().values(), strict=True)
    )
    assert not torch.equal(one.head.weight, other.head.weight)
    # A fifth of 1,797 is held out.
    assert (accuracy * 359) == pytest.approx(round(accuracy * 359))
    assert torch.get_num_threads() == threads
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.equal(torch.random.get_rng_state(), state)


def test_features_and_logits_have_the_described_shapes_and_the_asked_precision(
    world: World,
) -> None:
    extractor = load_features(world.features)
    images = torch.zeros(3, 1, 8, 8, dtype=torch.uint8)
    seen = extractor(images)
    assert seen.features.shape == (3, 64)
    assert seen.logits is not None
    assert seen.logits.shape == (3, 10)
    wide = extractor.to(torch.device("cpu"), torch.float64)(images)
    assert wide.features.dtype == torch.float64
    torch.testing.assert_close(wide.features.float(), seen.features, rtol=1e-4, atol=1e-5)


def test_damaged_or_missing_extractors_are_refused(world: World, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="not a feature extractor"):
        load_features(str(tmp_path / "nothing"))
    copy = tmp_path / "copy"
    shutil.copytree(world.features, copy)
    weights = bytearray((copy / WEIGHTS).read_bytes())
    weights[-1] ^= 1
    write_bytes(str(copy / WEIGHTS), bytes(weights))
    with pytest.raises(InvalidInputError, match="damaged"):
        load_features(str(copy))
    (copy / WEIGHTS).unlink()
    with pytest.raises(InvalidInputError, match=f"{WEIGHTS} is missing"):
        load_features(str(copy))
    (copy / DESCRIPTION).write_text("{")
    with pytest.raises(InvalidInputError, match="not JSON"):
        load_features(str(copy))
    (copy / DESCRIPTION).write_text(json.dumps({"name": "digits"}))
    shutil.copy(Path(world.features) / WEIGHTS, copy / WEIGHTS)
    with pytest.raises(InvalidInputError, match="weights_sha256"):
        load_features(str(copy))


def test_bad_input_is_refused_before_a_cluster_is_started(world: World, tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/runs/mlflow.db"
    with pytest.raises(InvalidInputError, match="no latent set"):
        prepare(config(world, tmp_path, uri, data=DataConfig(uri=str(tmp_path))))
    for field, value in (("epochs", 0), ("seed", -1), ("name", "two words")):
        with pytest.raises(InvalidInputError, match=field):
            config(world, tmp_path, uri, **{field: value})
    with pytest.raises(InvalidInputError, match="multiple of 4"):
        FeaturesInfo(
            name="x",
            channels=1,
            size=6,
            num_classes=2,
            test_accuracy=0.0,
            latent_manifest_sha256="",
        )
