"""A latent set out of nothing but prompts and a teacher."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from facm_core.errors import InvalidInputError
from facm_core.guidance import GuidanceConfig
from facm_platform import storage
from facm_platform.config.sections import RunConfig
from facm_platform.latents import LatentManifest
from facm_platform.latents.build import BuildersConfig, BuildPlan, SetBuild
from facm_platform.latents.null_text import NULL_TEXT, NullText
from facm_platform.latents.text_encoder import open_text_encoder
from facm_platform.prompts import read_prompts
from facm_platform.registry import load_artifact, synthesise
from facm_platform.registry.generator import latent_sampler
from facm_platform.registry.import_wan import ImportWanConfig
from facm_platform.registry.import_wan import prepare as prepare_import
from facm_platform.registry.synthesise import (
    SynthesiseConfig,
    TeacherConfig,
    narrowed,
    prepare,
)
from facm_platform.tracking import Store
from tests.latents.test_captions import rows
from tests.small import artifact_config, write_digits, write_model
from tests.tiny_wan import MEAN, SIDE, STD, TEXT, write_pipeline, write_text_encoder

PROMPTS = ["one", "two", "a handwritten digit", "three", "four"]
Prepare = Callable[..., BuildPlan]


@pytest.fixture
def prepared(tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> Prepare:
    """``prepared(field=value)`` -> the plan for `PROMPTS`, three latents each, in ``set``."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.uri)
    run = RunConfig(name="wan", storage_uri=str(tmp_path / "runs"))
    write_pipeline(tmp_path / "pipeline", boundary=0.5)
    imported = ImportWanConfig(
        run=run,
        source_uri=str(tmp_path / "pipeline"),
        height=SIDE,
        width=SIDE,
        tokens=TEXT[0],
        sampling=GuidanceConfig(scale=2.0, low=0.2),
        output_uri=str(tmp_path / "teacher"),
    )
    prepare_import(imported).execute()
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))

    def make(**changes: Any) -> BuildPlan:
        values: dict[str, Any] = {
            "prompts_uri": str(tmp_path / "prompts.txt"),
            "per_prompt": 3,
            "teacher": TeacherConfig(uri=str(tmp_path / "teacher")),
            "steps": 4,
            "output_uri": str(tmp_path / "set"),
            "part_rows": 4,
            "batch_size": 3,
            "workers": BuildersConfig(count=1),
        }
        return prepare(SynthesiseConfig(run=run, **values | changes))

    return make


@pytest.mark.usefixtures("ray_cluster")
def test_a_set_holds_what_the_teacher_draws_of_each_prompt(
    prepared: Prepare, tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = str(tmp_path / "set")
    run = prepared().execute()
    manifest, teacher = LatentManifest.load(uri), load_artifact(str(tmp_path / "teacher"))
    assert [part.rows for part in manifest.parts] == [4, 4, 4, 3]
    assert (manifest.mean, manifest.std) == (MEAN, STD)
    assert (manifest.autoencoder_id, manifest.autoencoder_sha256) == (
        str(tmp_path / "pipeline" / "vae"),
        teacher.config.autoencoder_sha256,
    )
    tags = store.client.get_run(run.run_id).data.tags
    assert tags["facm.teacher_sha256"] == teacher.sha256
    assert tags["facm.text_encoder_sha256"] == teacher.config.text_encoder_sha256

    encoder = open_text_encoder(str(tmp_path / "pipeline"), TEXT[0])
    found = rows(uri)
    assert list(found) == [f"prompt-{i:06d}/{j}" for i in range(5) for j in range(3)]
    keys = ["prompt-000001/0", "prompt-000001/2", "prompt-000004/1"]
    texts = encoder.encode(["two", "two", "four"])._asdict()
    seeds = [synthesise._seed(0, key) for key in keys]
    expected = latent_sampler(teacher, torch.device("cpu"), torch.float32)(seeds, texts, 4)
    for row, key in enumerate(keys):
        np.testing.assert_allclose(
            found[key]["text_embedding"], texts["text_embedding"][row], atol=1e-3, rtol=1e-3
        )
        # Prompts are stored in half precision.
        np.testing.assert_allclose(found[key]["latent"], expected[row], atol=5e-3)
    assert len({row["latent"].tobytes() for row in found.values()}) == 15
    null = NullText.load(uri, manifest)
    assert (null.encoder_id, null.encoder_sha256) == (encoder.id, encoder.sha256)
    torch.testing.assert_close(null.text_embedding, encoder.encode([""]).text_embedding[0])

    # Again, by two workers, one after the other interrupted: the same bytes.
    again = str(tmp_path / "again")
    make = SetBuild._make
    monkeypatch.setattr(SetBuild, "_make", lambda self, job, todo, n: make(self, job, todo[:2], n))
    with pytest.raises(FileNotFoundError):
        prepared(output_uri=again).execute()
    monkeypatch.setattr(SetBuild, "_make", make)
    prepared(output_uri=again, workers=BuildersConfig(count=2)).execute()
    names = sorted(storage.list_files(uri))
    assert names == sorted(storage.list_files(again))
    assert NULL_TEXT in names
    for name in names:
        assert (tmp_path / "set" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_the_hash_is_of_all_that_bears_on_the_set(prepared: Prepare, tmp_path: Path) -> None:
    plans = [
        prepared(),
        prepared(steps=5),
        prepared(seed=1),
        prepared(per_prompt=2),
        prepared(sampling=GuidanceConfig(scale=3.0)),
    ]
    assert prepared(sampling=GuidanceConfig(scale=2.0, low=0.2)).build.sha256 == (
        plans[0].build.sha256
    )
    (tmp_path / "prompts.txt").write_text("five")
    plans.append(prepared())
    assert len({plan.build.sha256 for plan in plans}) == len(plans)
    assert "3 x 1 prompts by " in plans[-1].describe()


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"one\n\ntwo\n  \none", "line 2 is blank; line 4 is blank; line 5 repeats line 1"),
        (b"a & b\n a  & b\n", "line 2 repeats line 1"),
        (b"", "line 1 is blank"),
        (b"one\n\n", "line 2 is blank"),
        (b"\xff", "not UTF-8"),
    ],
)
def test_lines_that_are_no_prompts(tmp_path: Path, content: bytes, problem: str) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(content)
    with pytest.raises(InvalidInputError, match=rf"prompts_uri = .*txt': {problem}"):
        read_prompts(str(file))
    file.unlink()
    with pytest.raises(InvalidInputError, match=r"prompts_uri = .*txt': no such file"):
        read_prompts(str(file))


def test_the_lines_of_a_file_from_anywhere(tmp_path: Path, bucket: str) -> None:
    content = "\ufeffein Fluß\r\na\u2028b\r\n".encode()
    for uri in (str(tmp_path / "prompts.txt"), f"{bucket}/prompts.txt"):
        storage.write_bytes(uri, content)
        assert read_prompts(uri) == ("ein Fluß", "a\u2028b")


def test_teachers_that_cannot_do_it(prepared: Prepare, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"per_prompt = 0: below 1"):
        prepared(per_prompt=0)
    write_text_encoder(tmp_path / "pipeline", ["another"], seed=1)
    with pytest.raises(InvalidInputError, match=r"teacher\.uri = .*pipeline': its hash is .*where"):
        prepared()
    manifest = write_digits(tmp_path / "digits", rows=20)
    config = artifact_config(manifest)
    for role, problem in (("teacher", "reads labels, not texts"), ("student", "it is a student")):
        write_model(tmp_path / role, replace(config, role=role))
        with pytest.raises(InvalidInputError, match=rf"teacher\.uri = .*{problem}"):
            prepared(teacher=TeacherConfig(uri=str(tmp_path / role)))


def test_narrow_weights_keep_times_and_places(prepared: Prepare, tmp_path: Path) -> None:
    model, exact = (load_artifact(str(tmp_path / "teacher")).model for _ in range(2))
    model = narrowed(model, torch.bfloat16)
    kept = {name for name, tensor in model.named_parameters() if tensor.dtype == torch.float32}
    assert {name.split(".")[-3] for name in kept if "time" in name} == {"time_embedder"}
    assert all("bfloat16" not in str(tensor.dtype) for tensor in model.buffers())
    encoder = open_text_encoder(str(tmp_path / "pipeline"), TEXT[0])
    texts = {
        name: tensor.half() for name, tensor in encoder.encode(["one", "two"])._asdict().items()
    }
    x = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    for t in (0.1, 0.9):
        got, expected = (m(x, torch.tensor([t, t]), texts) for m in (model, exact))
        assert got.dtype == torch.float32
        assert 1e-4 < (got - expected).norm() / expected.norm() < 0.03
