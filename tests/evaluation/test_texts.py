"""Evaluation on a latent set with texts: which sample is of which text, and what is left behind."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import mlflow.artifacts
import mlflow.models
import pytest
import torch
from PIL import Image

from facm_core.errors import InvalidInputError
from facm_core.models.base import entry, select_rows
from facm_core.pixels import quantise
from facm_core.samplers import sample_consistency, sample_noise
from facm_platform.config import load_config
from facm_platform.config.sections import DataConfig, RunConfig
from facm_platform.evaluation import fit
from facm_platform.evaluation.engine import Evaluator, View, Workload
from facm_platform.evaluation.evaluate import EvaluateConfig, prepare
from facm_platform.evaluation.features import load_features
from facm_platform.evaluation.protocol import Protocol
from facm_platform.evaluation.real import DecodedSet
from facm_platform.evaluation.sheet import sheet_size
from facm_platform.latents import LatentManifest, LatentStream, local_batches
from facm_platform.registry import load_artifact
from facm_platform.registry.promote import PromoteConfig
from facm_platform.registry.promote import prepare as prepare_promotion
from facm_platform.registry.versions import CHALLENGER, find_version
from facm_platform.tracking import Store, TrackingConfig
from facm_platform.tracking.reading import list_artifacts
from facm_platform.training import distill
from tests.tiny_wan import SHAPE, TextWorld, write_student, write_text_world
from tests.world import World

ROWS = 64
PROMPTS = ["a red barn in the snow", "two cats"]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> TextWorld:
    return write_text_world(tmp_path_factory.mktemp("texts"), PROMPTS, ROWS)


def config(texts: TextWorld, root: Path, **changes: Any) -> EvaluateConfig:
    given = EvaluateConfig(
        run=RunConfig(
            name="look",
            storage_uri=str(root),
            tracking=TrackingConfig(uri=f"sqlite:///{root}/mlflow.db"),
        ),
        data=DataConfig(uri=texts.set),
        student_uri=texts.student,
        teacher_uri=texts.teacher,
        features_uri=texts.features,
        samples=70,
        nfe=(1, 2),
        teacher_nfe=(3,),
        batch_size=32,
        actors=1,
    )
    return dataclasses.replace(given, **changes)


@pytest.mark.parametrize(("start", "stop", "size"), [(0, 64, 64), (60, 70, 7), (130, 260, 50)])
def test_after_the_last_row_comes_the_first(
    texts: TextWorld, start: int, stop: int, size: int
) -> None:
    (whole,) = local_batches(LatentStream(texts.set, texts.manifest, 0), 0, ROWS, ROWS)
    found = list(DecodedSet(texts.set, texts.manifest).conditions(start, stop, size))
    assert [len(entry(one, "text_mask")) for one in found[:-1]] == [size] * (len(found) - 1)
    rows = torch.arange(start, stop) % ROWS
    for name, expected in select_rows(whole.condition, rows).items():  # type: ignore[union-attr]
        assert torch.equal(torch.cat([entry(one, name) for one in found]), expected)


def test_a_sample_is_of_the_text_of_its_row(texts: TextWorld) -> None:
    features = load_features(texts.features)
    workload = Workload(
        protocol=Protocol(
            extractor="tiny",
            extractor_sha256=features.sha256,
            reference_sha256=texts.manifest.sha256,
            samples=70,
            seed=5,
            label_policy="rows",
        ),
        data_uri=texts.set,
        manifest=texts.manifest,
        view=View(
            kind="fitted",
            features_uri=features.uri,
            keep=100,
            batch_size=7,
            gpu=False,
            shown_classes=ROWS,
            shown_samples=2,
        ),
    )
    found = Evaluator(workload).block(texts.student, 2, 60, 70)
    real = DecodedSet(texts.set, texts.manifest)
    (whole,) = local_batches(LatentStream(texts.set, texts.manifest, 0), 0, ROWS, ROWS)
    artifact = load_artifact(texts.student)
    for index in range(60, 70):
        seed, row = 5 * 2**32 + index, index % ROWS
        x = sample_consistency(
            artifact.model.double(),
            sample_noise(SHAPE, [seed]).double(),
            select_rows(whole.condition, torch.tensor([row])),
            steps=2,
            seeds=[seed],
            shift=artifact.config.shift,
        )
        std, mean = (
            torch.tensor(v)[:, None, None] for v in (texts.manifest.std, texts.manifest.mean)
        )
        assert torch.equal(found.shown[row, index // ROWS], quantise(x[0] * std + mean))
    assert found.agreement is None, "the extractor's classes are none of this set"
    (images,) = [images for images, _ in real.batches((0, ROWS), ROWS)]
    shown = Evaluator(workload).real(real, (0, ROWS)).shown
    assert all(torch.equal(shown[row, 0], images[row]) for row in range(ROWS))


@pytest.mark.usefixtures("ray_cluster")
def test_everything_it_leaves(texts: TextWorld, store: Store, tmp_path: Path) -> None:
    root = tmp_path / "runs"
    plan = prepare(config(texts, root, register_as="pictures"))
    assert plan.protocol.label_policy == "rows"
    result = plan.evaluate()
    assert not [name for name in result.metrics() if "agreement" in name]
    assert result.metrics()["fid_nfe2"] > 0
    with Image.open(result.sample_sheet) as picture:
        # real, teacher, student in one and in two steps: of the first rows, one each.
        assert picture.size == sheet_size(groups=4, classes=20, samples=1, image_size=4)
    card = (Path(texts.student) / "README.md").read_text()
    assert "70 samples of the texts of the latent set, in the features" in card
    assert f"| text encoder | {texts.pipeline} (sha256" in card
    assert "| time shift | 0.5 |" in card
    assert "agreement" not in card

    version = find_version(store.client, "pictures", CHALLENGER)
    assert version is not None
    copied = mlflow.artifacts.download_artifacts(version.source, tracking_uri=store.uri)
    inputs = mlflow.models.get_model_info(copied).signature.inputs
    assert inputs.input_names() == ["prompt"]
    tracking = TrackingConfig(uri=store.uri)
    promotion = PromoteConfig(model="pictures", storage_uri=str(root), tracking=tracking)
    assert "promote pictures version 1" in prepare_promotion(promotion).describe()


def test_what_is_refused(texts: TextWorld, world: World, store: Store, tmp_path: Path) -> None:
    root = tmp_path / "runs"
    for policy in ("balanced", "random"):
        with pytest.raises(InvalidInputError, match=r"rows of data\.uri have texts.*Use rows"):
            prepare(config(texts, root, label_policy=policy))
    of_labels = {
        "student_uri": world.student,
        "teacher_uri": None,
        "data": DataConfig(uri=world.data),
    }
    with pytest.raises(InvalidInputError, match=r"have labels.*Use balanced or random"):
        prepare(
            config(
                texts,
                root,
                **of_labels,
                features_uri=world.features,
                samples=100,
                label_policy="rows",
            )
        )
    with pytest.raises(InvalidInputError, match=r"features_uri.*its images was \(1, 8, 8\)"):
        prepare(config(texts, root, features_uri=world.features))
    write_student(
        tmp_path / "nameless",
        texts.manifest,
        Path(texts.pipeline),
        text_encoder_id="",
        text_encoder_sha256="",
    )
    nameless = config(texts, root, student_uri=str(tmp_path / "nameless"), teacher_uri=None)
    prepare(nameless)
    with pytest.raises(InvalidInputError, match="does not say by which text encoder"):
        prepare(dataclasses.replace(nameless, register_as="pictures"))
    given = fit.FeaturesConfig(
        run=nameless.run, data=DataConfig(uri=texts.set), output_uri=str(tmp_path / "f")
    )
    with pytest.raises(InvalidInputError, match="a classifier is fitted to labels"):
        fit.prepare(given)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_checkpoints_are_measured_by_the_texts(
    texts: TextWorld, store: Store, tmp_path: Path
) -> None:
    root = tmp_path / "runs"
    options = [
        "run.name=run",
        f"run.storage_uri={root}",
        f"run.tracking.uri={store.uri}",
        f"data.uri={texts.set}",
        f"teacher.uri={texts.teacher}",
        "train.global_batch_size=8",
        "train.images=16",
        "train.checkpoint_images=16",
        f"validation.features_uri={texts.features}",
        "validation.samples=70",
        "validation.nfe=[2]",
    ]
    plan = distill.prepare(load_config(distill.DistillConfig, None, options))
    result = plan.execute()
    assert result.run_id is not None
    measured = json.loads((root / "run" / "validation" / f"{16:012d}.json").read_text())
    names = list_artifacts(store.client, result.run_id, "samples")
    assert {"samples/student_nfe2_images000000000016.png", "samples/teacher_nfe4.png"} <= set(names)
    student = config(texts, root, student_uri=result.artifact_uri, teacher_uri=None, nfe=(2,))
    assert LatentManifest.load(texts.set).sha256 == texts.manifest.sha256
    scores = prepare(student).evaluate().scores["student"]
    assert measured["fid_nfe2"] == pytest.approx(scores[2].fid, rel=1e-9)
