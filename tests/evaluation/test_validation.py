"""The FID of a run's checkpoints: which are kept, and when it ends the run."""

from __future__ import annotations

import json
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import ray

from facm_core.errors import InvalidInputError
from facm_platform.config import load_config
from facm_platform.evaluation import evaluate
from facm_platform.registry import load_artifact
from facm_platform.tracking import Store
from facm_platform.training import progress
from facm_platform.training.context import LocalContext, single_process_group
from facm_platform.training.distill import DistillConfig, DistillPlan, prepare
from facm_platform.training.export import export
from facm_platform.training.loop import train
from facm_platform.training.run import last_checkpoint
from facm_platform.training.validation import measured
from tests.world import World


def planned(world: World, root: Path, *options: str) -> DistillPlan:
    given = [
        "train.images=96",
        "train.learning_rate=0.001",
        "train.checkpoint_images=32",
        "train.keep_checkpoints=1",
        "train.log_images=32",
        f"validation.features_uri={world.features}",
        "validation.samples=100",
    ]
    return prepare(
        load_config(DistillConfig, None, [*world.options("run", root), *given, *options])
    )


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_every_checkpoint_is_measured_and_the_best_kept(
    world: World, store: Store, tmp_path: Path
) -> None:
    root = tmp_path / "runs"
    plan = planned(world, root, "validation.nfe=[2,1]")
    result = plan.execute()
    assert result.run_id is not None
    fids, errors = (
        {p.step: p.value for p in store.client.get_metric_history(result.run_id, name)}
        for name in ("fid_nfe2", "fid_nfe2_error")
    )
    assert list(fids) == list(errors) == [32, 64, 96]
    assert all(0 < errors[images] < fids[images] for images in fids)

    snapshot = json.loads((root / "run" / "checkpoint_manager_snapshot.json").read_text())
    kept = {one["checkpoint_dir_name"]: one["metrics"] for one in snapshot["checkpoint_results"]}
    wanted = {min(fids, key=lambda images: fids[images]), 96}
    assert set(kept) == {f"checkpoint_{images:012d}" for images in wanted}
    for name, metrics in kept.items():
        student = str(tmp_path / name)
        images = export(str(root / "run" / name), student).metrics["images_seen"]
        assert metrics["fid_nfe2"] == fids[int(images)]
        assert metrics["fid_nfe2_error"] == errors[int(images)]
        config = evaluate.EvaluateConfig(
            run=replace(plan.config.run, name=name),
            data=plan.config.data,
            student_uri=student,
            features_uri=world.features,
            samples=100,
            nfe=(1, 2),
            actors=1,
        )
        scores = evaluate.prepare(config).evaluate().scores["student"]
        for steps in (1, 2):
            assert metrics[f"fid_nfe{steps}"] == pytest.approx(scores[steps].fid, rel=1e-9)
    told = measured(plan.folder_uri)
    assert [(one["images_seen"], one["fid_nfe2"]) for one in told] == list(fids.items())

    # What a resumed run would begin with, and looks at before.
    shard = root / "run" / "checkpoint_000000000096" / "__0_0.distcp"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(InvalidInputError, match=r"__0_0.distcp.*missing or damaged"):
        planned(world, root, "validation.nfe=[2,1]")


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_what_was_not_measured_yet_is_when_the_run_is_resumed(
    world: World, store: Store, tmp_path: Path
) -> None:
    run = tmp_path / "runs" / "run"
    options = ["workers.cpus=0.5", "validation.cpus=2.5"]
    plan = planned(world, tmp_path / "runs", *options)
    room = ray.util.placement_group([{"CPU": 2}])
    ray.get(room.ready())
    with ThreadPoolExecutor() as pool:
        first = pool.submit(plan.execute)
        last = f"checkpoint_{96:012d}"
        while last_checkpoint(str(run)) != str(run / last):
            assert not first.done()
            time.sleep(0.1)
        shutil.copytree(run, tmp_path / "as it was")
        ray.util.remove_placement_group(room)
        first.result()
    complete = measured(str(run))
    assert [one["images_seen"] for one in complete] == [32, 64, 96]

    shutil.rmtree(run)
    (tmp_path / "as it was").rename(run)
    assert measured(str(run)) == []
    planned(world, tmp_path / "runs", *options).execute()
    assert measured(str(run)) == complete


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_fid_that_is_good_enough_ends_the_run(
    world: World, store: Store, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = ["train.images=400000", "validation.target_fid=1e9"]
    result = planned(world, tmp_path / "runs", *options).execute()
    assert 32 <= load_artifact(result.artifact_uri).config.images_seen < 400_000
    assert re.search(r"distill: a FID of [\d.]+ is reached", capfd.readouterr().out)


@pytest.mark.parametrize(("target", "images"), [(3.0, 8), (2.9, 96)])
def test_the_loop_ends_at_the_target(
    world: World,
    store: Store,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    target: float,
    images: int,
) -> None:
    class Measured(LocalContext):
        def best_fid(self) -> float:
            return 3.0

    monkeypatch.setattr(progress, "_LOOK_SECONDS", -1.0)
    plan = planned(world, tmp_path / "runs", f"validation.target_fid={target}")
    task = replace(plan.task("", ""), run_id=None)
    with single_process_group():
        train(task, Measured(tmp_path / "run"))
    assert load_artifact(task.artifact_uri).config.images_seen == images


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("validation.samples=101", "validation.samples = 101: not a multiple of the 10 classes"),
        ("validation.features_uri=/nowhere", "validation.features_uri = '/nowhere'"),
        ("validation.target_fid=0", "validation.target_fid = 0.0: not positive"),
        ("validation.samples=10", "validation.samples = 10: too few for 10 parts"),
        ("validation.nfe=[0]", "validation.nfe = (0,): not different step counts"),
        ("validation.cpus=0", "validation.cpus = 0.0: not positive"),
        ("validation.extractor=vgg", "extractor = 'vgg'"),
        ("validation.reference_uri=/nowhere.npz", "reference_uri = '/nowhere.npz'"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    world: World, store: Store, tmp_path: Path, option: str, message: str
) -> None:
    with pytest.raises(InvalidInputError, match=re.escape(message)):
        planned(world, tmp_path / "runs", option)
