"""jobs/latents.py as a user starts it: exit status, and the JSON line at the end."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from tests.jobs.conftest import RunJob, last_line
from tests.small import write_digits


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
