"""The null prompt beside a latent set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from facm_core.errors import InvalidInputError
from facm_platform.latents.null_text import NULL_TEXT, NullText
from tests.tiny_wan import rewrite, write_texts


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"text_mask": None}, r"it holds \{'text_embedding': \(5, 12\)\}, not"),
        ({"text_mask": torch.ones(4)}, r"'text_mask': \(4,\)"),
        ({"text_mask": torch.full((5,), 2)}, "text_mask holds more than 0 and 1"),
        ({"text_embedding": torch.full((5, 12), float("nan"))}, "text_embedding is not finite"),
    ],
)
def test_one_of_another_set_is_refused(tmp_path: Path, tensors: Any, message: str) -> None:
    manifest = write_texts(tmp_path)
    rewrite(tmp_path / NULL_TEXT, tensors)
    with pytest.raises(InvalidInputError, match=message):
        NullText.load(str(tmp_path), manifest)


def test_one_that_is_missing_or_damaged(tmp_path: Path) -> None:
    manifest = write_texts(tmp_path)
    (tmp_path / NULL_TEXT).write_bytes(b"no")
    with pytest.raises(InvalidInputError, match=rf"{NULL_TEXT}': not readable"):
        NullText.load(str(tmp_path), manifest)
    (tmp_path / NULL_TEXT).unlink()
    with pytest.raises(InvalidInputError, match=r"no null prompt: there is no .* NullText\.save"):
        NullText.load(str(tmp_path), manifest)


def test_its_bytes_are_the_same_every_time(tmp_path: Path) -> None:
    manifest = write_texts(tmp_path)
    null = NullText(torch.ones(5, 12), torch.ones(5), "s3://models/wan", "0" * 64)
    assert len({null.sha256 for _ in range(20)}) == 1
    null.save(str(tmp_path))
    again = NullText.load(str(tmp_path), manifest)
    assert (again.encoder_id, again.encoder_sha256) == ("s3://models/wan", "0" * 64)
    assert again.sha256 == null.sha256
