"""The text encoder of a latent set or of a model, from wherever its files lie."""

from __future__ import annotations

from facm_core.errors import InvalidInputError, require
from facm_core.text_encoders import (
    MODEL,
    TOKENIZER,
    TextEncoder,
    WordTextEncoder,
    load_text_encoder,
)
from facm_platform import storage


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
        encoder = _of_pipeline(address, tokens, field)
    require(
        sha256 in (None, encoder.sha256),
        field,
        address,
        f"its hash is {encoder.sha256}, where {sha256} was expected",
        "Restore the files that the prompts were embedded with",
    )
    return encoder


def _of_pipeline(address: str, tokens: int, field: str) -> TextEncoder:
    uri = storage.absolute(address, field)
    storage.check_reachable(uri, field)
    model, tokenizer = (storage.join(uri, name) for name in (MODEL, TOKENIZER))
    try:
        # The rest of a pipeline is many times as large.
        with storage.node_copy(model) as weights, storage.node_copy(tokenizer) as words:
            return load_text_encoder(uri, weights, words, tokens, field)
    except FileNotFoundError as error:
        problem = f"no pipeline with {MODEL} and {TOKENIZER} lies there"
        remedy = f"Mend the address, or use {WordTextEncoder.id} for a trial"
        raise InvalidInputError(field, address, problem, remedy) from error
