"""jobs/latents.py as a user starts it: exit status, and the JSON line at the end."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from facm_platform.latents import LatentManifest
from tests.jobs.conftest import RunJob, last_line
from tests.small import write_digits
from tests.swift_s3 import SwiftS3


@pytest.mark.parametrize("command", ["inspect", "verify", "stats", "sample"])
def test_every_command(run_job: RunJob, tmp_path: Path, digits_uri: str, command: str) -> None:
    done = run_job("latents", command, digits_uri)

    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    result = last_line(done.stdout)
    sheet = tmp_path / "latents.png"
    assert result["run_id"] is None
    assert result["run_name"] == f"latents {command}"
    assert result["artifact_uri"] == (str(sheet) if command == "sample" else digits_uri)
    if command == "sample":
        assert result["metrics"] == {"rows": 64}
        # Eight by eight images.
        assert Image.open(sheet).size == (4 + 8 * 68, 4 + 8 * 84)


@pytest.mark.slow
def test_out_and_in_again(run_job: RunJob, tmp_path: Path, digits_uri: str) -> None:
    done = run_job("latents", "export", digits_uri, "published")
    assert done.returncode == 0, done.stderr
    assert last_line(done.stdout)["metrics"] == {"rows": 1797, "files": 1}

    arguments = ["run.name=import", "source_uri=published", "num_classes=10", "output_uri=set"]
    arguments += ["autoencoder=identity", "statistics=given"]
    done = run_job("import_latents", *arguments)
    assert done.returncode == 0, done.stderr
    original = LatentManifest.load(digits_uri)
    imported = LatentManifest.load(str(tmp_path / "set"))
    assert (imported.mean, imported.std) == (original.mean, original.std)
    assert last_line(done.stdout)["metrics"] == {"rows": 1797, "parts": 1, "quarantined": 0}
    again = run_job("import_latents", *arguments)
    assert "holds this latent set already: nothing to do" in again.stdout


@pytest.mark.slow
def test_what_ends_a_worker_is_told_like_other_bad_input(run_job: RunJob, tmp_path: Path) -> None:
    latents = np.full((4, 1, 2, 2), np.nan, np.float32)
    tensors = {"latents": latents, "labels": np.zeros(4, np.int64)}
    save_file(tensors, tmp_path / "latents_rank00_shard000.safetensors")
    done = run_job(
        "import_latents",
        "run.name=import",
        "source_uri=.",
        "num_classes=10",
        "output_uri=set",
        "autoencoder=identity",
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        "error: part-00000.parquet key = 'latents_rank00_shard000.safetensors#0': "
        "its latent is not finite. Remove or mend this row at its source."
    )


@pytest.mark.slow
def test_the_benchmark_measures_what_it_says(
    run_job: RunJob, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    swift = SwiftS3(os.environ["AWS_ENDPOINT_URL"], tmp_path / "objects")
    monkeypatch.setenv("AWS_ENDPOINT_URL", swift.url)
    done = run_job("latents", "benchmark", f"{bucket}/set", "--rows", "3000", "--batch", "100")

    assert done.returncode == 0, done.stderr
    assert swift.errors == []
    metrics = last_line(done.stdout)["metrics"]
    local = ("one_safe_open_a_sample", "bare_pyarrow_loop", "stream")
    distant = ("bytes_from_object_store", "stream_from_object_store")
    assert {name.split(".")[0] for name in metrics} == {*local, *distant}
    assert all(metrics[f"{way}.rows_per_second"] > 0 for way in (*local, *distant))
    assert LatentManifest.load(f"{bucket}/set").rows == 3000
    swift.stop()


def test_a_bad_part_is_refused_with_the_numbers(run_job: RunJob, tmp_path: Path) -> None:
    manifest = write_digits(tmp_path / "digits", rows=100)
    part = tmp_path / "digits" / manifest.parts[0].name
    content = bytearray(part.read_bytes())
    content[2000] ^= 1
    part.write_bytes(content)

    done = run_job("latents", "verify", "digits")

    assert done.returncode == 1
    assert f"refused: {part.parent}: bad parts, 1 of 1\n" in done.stderr
    assert f"  {part.name}: its sha256 is" in done.stderr
    assert last_line(done.stdout)["metrics"]["bad_parts"] == 1


def test_no_set_is_an_error(run_job: RunJob, tmp_path: Path) -> None:
    done = run_job("latents", "stats", "nowhere")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"error: uri = '{tmp_path}/nowhere': no latent set")
