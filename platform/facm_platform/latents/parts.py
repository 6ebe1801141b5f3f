"""The Parquet files of a set, opened; whatever is wrong with one is told with its address."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow.fs import LocalFileSystem

from facm_core.errors import InvalidInputError
from facm_platform import storage


@contextmanager
def opened_part(uri: str) -> Iterator[pq.ParquetFile]:
    """The part at `uri`, whose pages are compared with their checksums when they are read.

    Raises:
        InvalidInputError: missing or damaged, as far as it is read inside of the block.
    """
    store, path = storage.filesystem(uri)
    try:
        with (
            storage.explained(uri, "part"),
            pq.ParquetFile(
                path,
                filesystem=store,
                # One request for a row group; from a disk, only a detour.
                pre_buffer=not isinstance(store, LocalFileSystem),
                page_checksum_verification=True,
            ) as file,
        ):
            yield file
    except (OSError, pa.ArrowException, IndexError) as error:
        raise bad_part(uri, f"damaged or missing ({first_line(error)})") from error


def bad_part(uri: str, problem: str) -> InvalidInputError:
    """A part that is not what the manifest says."""
    remedy = "Restore this file, or make the set again with overwrite=true"
    return InvalidInputError("part", uri, problem, remedy)


def first_line(error: Exception) -> str:
    """What a library says of a failure, without its stack."""
    return (str(error).splitlines() or [type(error).__name__])[0]
