"""jobs/evaluate.py: what it refuses, and everything it leaves behind."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import mlflow.artifacts
import mlflow.models
import pytest
import ray
from PIL import Image

from facm_core.errors import InvalidInputError
from facm_platform.config.sections import DataConfig, RunConfig
from facm_platform.evaluation.evaluate import EvaluateConfig, prepare
from facm_platform.evaluation.sheet import sheet_size
from facm_platform.registry import load_artifact
from facm_platform.registry.versions import CHALLENGER, find_version
from facm_platform.tracking import Store, TrackingConfig, connect_store
from tests.conftest import TrackingServer
from tests.small import artifact_config, write_digits, write_model
from tests.world import World


def config(world: World, root: Path, uri: str | None = None, **changes: object) -> EvaluateConfig:
    tracking = TrackingConfig(uri=uri or f"sqlite:///{root}/mlflow.db")
    given = EvaluateConfig(
        run=RunConfig(name="look", storage_uri=str(root), tracking=tracking),
        data=DataConfig(uri=world.data),
        student_uri=world.student,
        teacher_uri=world.teacher,
        features_uri=world.features,
        samples=100,
        nfe=(1, 2),
        teacher_nfe=(1, 3),
        batch_size=50,
        actors=1,
    )
    return dataclasses.replace(given, **changes)  # type: ignore[arg-type]


@pytest.mark.usefixtures("ray_cluster")
def test_everything_it_leaves_in_an_embedded_store(
    world: World, store: Store, tmp_path: Path
) -> None:
    root = tmp_path / "runs"
    plan = prepare(config(world, root, register_as="digits"))
    assert plan.protocol.id in plan.describe()
    result = plan.evaluate()

    assert set(result.scores) == {"teacher", "student"}
    assert list(result.scores["teacher"]) == [1, 3]
    assert (result.model_name, result.model_version) == ("digits", "1")
    metrics = result.metrics()
    assert metrics["fid_nfe2"] == result.scores["student"][2].fid > 0
    assert metrics["teacher_agreement_nfe3"] == result.scores["teacher"][3].agreement

    with Image.open(result.sample_sheet) as picture:
        # real, teacher at 3 and 1 steps, student at 1 and 2.
        assert picture.size == sheet_size(groups=5, classes=10, samples=3, image_size=8)
    values = json.loads((root / "look/evaluation.json").read_text())
    assert values["protocol"]["id"] == result.protocol.id
    assert values["student"]["1"]["fid"] == metrics["fid_nfe1"]
    table = (root / "look/evaluation.md").read_text()
    head, _, *rows = table.splitlines()
    assert head.startswith("| model | steps | FID | FID∞ | KID | IS | precision | recall |")
    assert rows[1].startswith(
        f"| teacher | 3 | {metrics['teacher_fid_nfe3']:.2f} ± "
        f"{metrics['teacher_fid_nfe3_error']:.2f} | {metrics['teacher_fid_nfe3_infinity']:.2f} |"
    )
    assert result.protocol.id in table

    run = store.client.get_run(result.run_id)
    assert run.info.status == "FINISHED"
    memory = {
        name: run.data.metrics.pop(name) for name in ("actor_memory_mib", "driver_memory_mib")
    }
    assert all(100 < mib < 10_000 for mib in memory.values())
    assert run.data.metrics == metrics
    assert store.client.get_metric_history(result.run_id, "fid_nfe1")[0].step == 1000
    tags = run.data.tags
    assert tags["facm.protocol_id"] == result.protocol.id
    assert tags["facm.model_sha256"] == plan.student.sha256
    assert tags["facm.manifest_sha256"] == world.manifest.sha256
    files = {file.path for file in store.client.list_artifacts(result.run_id)}
    assert {"samples.png", "evaluation.json", "evaluation.md", "config.yaml", "model"} <= files

    card = (Path(world.student) / "README.md").read_text()
    assert table in card
    assert "![samples](samples.png)" in card
    assert (Path(world.student) / "samples.png").is_file()

    version = find_version(store.client, "digits", CHALLENGER)
    assert version is not None
    assert version.number == "1"
    assert version.run_id == result.run_id
    assert version.fid(1) == metrics["fid_nfe1"]
    assert version.tags["teacher_sha256"] == plan.teacher.sha256  # type: ignore[union-attr]
    copied = mlflow.artifacts.download_artifacts(version.source, tracking_uri=store.uri)
    assert load_artifact(copied).sha256 == plan.student.sha256
    assert (Path(copied) / "README.md").read_text() == card
    assert mlflow.models.get_model_info(copied).signature.params is not None, "MLflow can run it"

    again = prepare(config(world, root)).execute()
    assert again.metrics == metrics, "the same numbers the second time"
    assert again.artifact_uri == str(root / "look")


@pytest.mark.usefixtures("ray_cluster")
def test_a_server_gets_the_student_alone(
    world: World, tracking_server: TrackingServer, tmp_path: Path
) -> None:
    plan = prepare(
        config(world, tmp_path, tracking_server.uri, teacher_uri=None, register_as="digits")
    )
    result = plan.evaluate()
    assert set(result.scores) == {"student"}
    store = connect_store(TrackingConfig(uri=tracking_server.uri), tmp_path)
    version = find_version(store.client, "digits", CHALLENGER)
    assert version is not None
    copied = mlflow.artifacts.download_artifacts(version.source, tracking_uri=store.uri)
    assert load_artifact(copied).sha256 == plan.student.sha256


@pytest.mark.usefixtures("ray_cluster")
def test_a_failed_evaluation_says_so_in_its_run(world: World, store: Store, tmp_path: Path) -> None:
    copy = tmp_path / "digits"
    shutil.copytree(world.data, copy)
    plan = prepare(config(world, tmp_path / "runs", data=DataConfig(uri=str(copy))))
    (copy / "part-00000.parquet").unlink()
    with pytest.raises(ray.exceptions.RayTaskError):
        plan.execute()
    (run,) = store.client.search_runs([store.experiment_id])
    assert run.info.status == "FAILED"


def test_inputs_that_do_not_belong_together(world: World, tmp_path: Path) -> None:
    other = write_digits(tmp_path / "other", rows=500)
    stranger = write_model(tmp_path / "stranger", artifact_config(world.manifest), seed=9)
    student = artifact_config(other, role="student", objective="facm", teacher_sha256=stranger)
    write_model(tmp_path / "elsewhere", student)
    for changes, field, message in (
        ({"student_uri": world.teacher}, "student_uri", "it is a teacher"),
        ({"teacher_uri": world.student}, "teacher_uri", "it is a student"),
        ({"teacher_uri": str(tmp_path / "stranger")}, "teacher_uri", "student's teacher"),
        ({"student_uri": str(tmp_path / "elsewhere")}, "student_uri", "mean"),
        ({"data": DataConfig(uri=str(tmp_path / "other"))}, "student_uri", "mean"),
        ({"student_uri": str(tmp_path / "no")}, "student_uri", "not a model artefact"),
        ({"features_uri": str(tmp_path / "no")}, "features_uri", "not a feature extractor"),
        ({"data": DataConfig(uri=str(tmp_path / "no"))}, "data.uri", "no latent set"),
        ({"samples": 101}, "samples", "Use e.g. 110"),
        ({"samples": 10}, "samples", "too few for 10 parts"),
        ({"protocol": "adm-imagenet256-50k"}, "protocol", "extractor is 'digits', not 'inception"),
        ({"reference_uri": str(tmp_path / "no.npz")}, "reference_uri", "nothing lies there"),
        ({"reference_uri": str(tmp_path / "no.pt")}, "reference_uri", "neither .safetensors nor"),
    ):
        with pytest.raises(InvalidInputError, match=message) as caught:
            prepare(config(world, tmp_path, **changes))  # type: ignore[arg-type]
        assert caught.value.field == field


def test_a_set_of_the_same_statistics_but_another_hash(world: World, tmp_path: Path) -> None:
    shutil.copytree(world.data, tmp_path / "copy")
    manifest = json.loads((tmp_path / "copy/manifest.json").read_text())
    manifest["created_by"] = "somebody else"
    (tmp_path / "copy/manifest.json").write_text(json.dumps(manifest))
    changed = config(world, tmp_path, data=DataConfig(uri=str(tmp_path / "copy")))
    with pytest.raises(InvalidInputError, match="trained on the latent set"):
        prepare(changed)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("extractor", "vgg"),
        ("label_policy", "sorted"),
        ("protocol", "adm"),
        ("batch_size", 0),
        ("actors", 0),
        ("seed", -1),
        ("nfe", (1, 1)),
        ("teacher_nfe", (0,)),
        ("register_as", "a/b"),
    ],
)
def test_bad_values_name_their_field(
    world: World, tmp_path: Path, field: str, value: object
) -> None:
    with pytest.raises(InvalidInputError) as caught:
        config(world, tmp_path, **{field: value})
    assert caught.value.field == field
