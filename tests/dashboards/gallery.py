"""A real store to look at: short trainings, a search, two registered versions, and oddities."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from ray.train import Checkpoint

from facm_platform.config import load_config
from facm_platform.registry import load_artifact, save_artifact
from facm_platform.registry.reproduction import write_samples
from facm_platform.registry.versions import Version, register_version
from facm_platform.search.published import RECORDS, records_text
from facm_platform.search.records import FINISHED, STOPPED, Record
from facm_platform.storage import file_sha256
from facm_platform.tracking import Run, Store, TrackingConfig, connect_store, open_run
from facm_platform.training.context import LocalContext, single_process_group
from facm_platform.training.distill import DistillConfig, prepare
from facm_platform.training.loop import train
from facm_platform.training.validation import measure
from tests.registry.test_artifact import DESCRIPTION, weights
from tests.search.conftest import make_config
from tests.world import World

MODEL = "digits"
HOSTILE = '<img src=x onerror="alert(1)"><script>alert(2)</script>'


@dataclass
class Gallery:
    """The store, and ids of what is in it."""

    root: Path
    store: Store
    runs: dict[str, str]

    def register(self, fid: float, error: float = 0.1, **tags: str) -> Version:
        """A version with that FID at one step, which makes its samples again."""
        folder = self.root / "made"
        sha256 = save_artifact(
            folder,
            weights(),
            DESCRIPTION,
            f"# A card\n\n| steps | FID |\n| --- | ---: |\n| 1 | {fid} |\n\n{HOSTILE}\n",
        )
        write_samples(folder, load_artifact(str(folder)))
        run = open_run(self.store, "evaluation", job="evaluate", config=TrackingConfig())
        run.log_artifact(folder, "model")
        known = {"protocol_id": "p-1", "model_sha256": sha256, "fid_nfe1": repr(fid)}
        known |= {"fid_nfe1_error": repr(error), **tags}
        run.set_tags({"model_sha256": sha256})
        run.log_metrics({"fid_nfe1": fid, "fid_nfe1_error": error}, 100)
        run.finish()
        return register_version(run, MODEL, "model", known, "a test")


def write_gallery(root: Path, world: World) -> Gallery:
    """Distillations, a search, versions; a run under way, one without numbers, a hostile one."""
    store = connect_store(TrackingConfig(uri=f"sqlite:///{root / 'mlflow.db'}"), root)
    gallery = Gallery(root, store, {})
    for name, anchor in (("strong-anchor", 1.0), ("weak-anchor", 0.01)):
        gallery.runs[name] = _distilled(gallery, world, name, anchor)
    gallery.runs["search"] = _search(gallery)
    gallery.register(40.0)
    gallery.register(30.0, precision_nfe1="0.7")
    running = open_run(store, "under-way", job="distill", config=TrackingConfig())
    running.log_metrics({"loss": 1.0, "loss/t0": float("nan")}, 10)
    gallery.runs["under-way"] = running.run_id
    empty = open_run(store, "no-numbers", job="distill", config=TrackingConfig())
    gallery.runs["no-numbers"] = empty.run_id
    hostile = open_run(store, "x", job="distill", config=TrackingConfig(), tags={"note": HOSTILE})
    store.client.set_tag(hostile.run_id, "mlflow.runName", HOSTILE)
    hostile.log_metrics({"loss": 1.0}, 10)
    hostile.finish()
    gallery.runs["hostile"] = hostile.run_id
    return gallery


def _distilled(gallery: Gallery, world: World, name: str, anchor: float) -> str:
    """96 images, in this process, each checkpoint measured and drawn."""
    options = [
        *world.options(name, gallery.root),
        "train.images=96",
        "train.learning_rate=0.001",
        "train.checkpoint_images=48",
        "train.log_images=8",
        "train.health_images=16",
        f"objective.lambda_fm={anchor}",
        f"validation.features_uri={world.features}",
        "validation.samples=100",
        "validation.nfe=[1,2]",
    ]
    config = load_config(DistillConfig, None, options)
    plan = prepare(config)
    tags = {"manifest_sha256": world.manifest.sha256, "teacher_sha256": plan.teacher.sha256}
    run: Run = open_run(gallery.store, name, job="distill", config=config, tags=tags)
    task = plan.task(gallery.store.uri, run.run_id)
    folder = Path(task.folder_uri)
    with run, single_process_group():
        train(task, LocalContext(folder))
        for checkpoint in sorted(folder.glob("checkpoint_*")):
            measure(task, Checkpoint(str(checkpoint)))
        run.set_tags({"model_sha256": file_sha256(folder / "artifact/model.safetensors")})
    return run.run_id


def _search(gallery: Gallery) -> str:
    """Of which only the trainings are left out."""
    config = make_config(gallery.root)
    metric, error = config.objective, config.error

    def record(number: int, name: str, anchor: float, times: str, state: str) -> Record:
        params = {"objective.lambda_fm": anchor, "objective.times": times}
        values = {"objective.lambda_fm": anchor, "objective.times.kind": times}
        if times == "logit_normal":
            params["logit_normal: objective.times.mean"] = anchor / 10
            values["objective.times.mean"] = anchor / 10
        distances = [90 / (1 + anchor), 60 / (1 + anchor)][: 2 if state == FINISHED else 1]
        told = [
            {"images_seen": 40.0 * (k + 1), metric: distance, error: 1.5}
            for k, distance in enumerate(distances)
        ]
        return Record(number, name, params, values, state, measured=told)

    trials = [
        record(k, f"s-{k:04d}", 0.01 * 4**k, ("uniform", "logit_normal")[k % 2], state)
        for k, state in enumerate([STOPPED, FINISHED, FINISHED, FINISHED, FINISHED])
    ]
    confirming = [
        replace(record(k, f"s-{name}-seed{k}", anchor, "uniform", FINISHED), number=k)
        for name, anchor in (("recipe", 1.0), ("0004", 2.0))
        for k in (1, 2)
    ]
    run = open_run(gallery.store, "s", job="search", config=config)
    run.log_text(records_text(trials, confirming), RECORDS)
    run.log_metrics({"gain": 10.0, "gain_error": 2.0, "trials_finished": 4.0}, 80)
    run.finish()
    return run.run_id
