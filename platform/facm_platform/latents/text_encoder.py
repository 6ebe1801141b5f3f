"""The text encoder of a latent set or of a model, from wherever its files lie."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from facm_core.errors import InvalidInputError, require
from facm_core.text_encoders import (
    MODEL,
    TOKENIZER,
    TextEncoder,
    WordTextEncoder,
    load_text_encoder,
    text_encoder_sha256,
    text_features,
)
from facm_platform import storage


@dataclass(frozen=True)
class TextEncoderInfo:
    """A text encoder, but for its weights: its attributes, see there."""

    id: str
    sha256: str
    text_shape: tuple[int, int]


def find_text_encoder(
    address: str, tokens: int, sha256: str | None = None, field: str = "text.encoder"
) -> TextEncoderInfo:
    """What `open_text_encoder` would give, not loaded: the published one takes 23 GB of memory.

    Raises:
        InvalidInputError: as there, but for weights that do not fill it.
    """
    require(tokens >= 1, f"{field}.tokens", tokens, "below 1", "Use e.g. 512")
    if address == WordTextEncoder.id:
        words = WordTextEncoder(tokens)
        _check_hash(address, words.sha256, sha256, field)
        return TextEncoderInfo(words.id, words.sha256, words.text_shape)
    with _files(address, field) as (uri, model, tokenizer):
        found = text_encoder_sha256(model, tokenizer, field)
        info = TextEncoderInfo(uri, found, (tokens, text_features(model, field)))
    _check_hash(address, found, sha256, field)
    return info


def open_text_encoder(
    address: str, tokens: int, sha256: str | None = None, field: str = "text.encoder"
) -> TextEncoder:
    """The text encoder ``words``, or that of the pipeline whose folder lies at `address`.

    Args:
        address: Becomes its id.
        tokens: Length of an embedded prompt.
        sha256: The hash it must have.
        field: The one at fault when there is no such encoder.

    Raises:
        InvalidInputError: nothing there, not readable, or another encoder than it must be.
    """
    encoder: TextEncoder
    if address == WordTextEncoder.id:
        encoder = WordTextEncoder(tokens)
    else:
        with _files(address, field) as (uri, model, tokenizer):
            if sha256 is not None:
                # Before it is loaded, which takes long, and would end in another error.
                _check_hash(address, text_encoder_sha256(model, tokenizer, field), sha256, field)
            encoder = load_text_encoder(uri, model, tokenizer, tokens, field)
    _check_hash(address, encoder.sha256, sha256, field)
    return encoder


@contextmanager
def _files(address: str, field: str) -> Iterator[tuple[str, Path, Path]]:
    """Absolute address, and the folders of model and tokenizer on this machine."""
    uri = storage.absolute(address, field)
    storage.check_reachable(uri, field)
    model, tokenizer = (storage.join(uri, name) for name in (MODEL, TOKENIZER))
    try:
        # The rest of a pipeline is many times as large.
        with storage.node_copy(model) as weights, storage.node_copy(tokenizer) as words:
            yield uri, weights, words
    except FileNotFoundError as error:
        problem = f"no pipeline with {MODEL} and {TOKENIZER} lies there"
        remedy = f"Mend the address, or use {WordTextEncoder.id} for a trial"
        raise InvalidInputError(field, address, problem, remedy) from error


def _check_hash(address: str, found: str, expected: str | None, field: str) -> None:
    require(
        expected in (None, found),
        field,
        address,
        f"its hash is {found}, where {expected} was expected",
        "Restore the files that the prompts were embedded with",
    )
