"""The files of a source, by name: which there are, and how to open them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pyarrow import fs

from facm_core.errors import InvalidInputError, require
from facm_platform import storage

FETCH_BYTES = 8 << 20
"""Read at once from a file that is read as a stream: an object store sends so much per request."""


@dataclass(frozen=True)
class SourceFiles:
    """Files with one of some suffixes: all below a folder, or the one at the address itself.

    Attributes:
        uri: Absolute address of the folder or the file.
        suffixes: In lower case, with their dots.
        is_file: Whether `uri` is the file.
        field: Name of the source's section in the configuration, for errors.
    """

    uri: str
    suffixes: tuple[str, ...]
    is_file: bool
    field: str

    def names(self) -> Iterator[str]:
        """Names relative to the folder, in order; hidden files and those in hidden folders not.

        Raises:
            InvalidInputError: see `facm_platform.storage.iter_files`.
        """
        if self.is_file:
            yield storage.filesystem(self.uri, self._uri_field)[1].rpartition("/")[2]
            return
        for name, _ in storage.iter_files(self.uri, self._uri_field):
            if name.lower().endswith(self.suffixes) and not is_hidden(name):
                yield name

    def opened(self) -> OpenedFiles:
        """The same files, ready to be read. Not to be pickled."""
        store, path = storage.filesystem(self.uri, self._uri_field)
        return OpenedFiles(self, store, path)

    def address(self, name: str) -> str:
        """Where the file `name` lies, for messages."""
        return self.uri if self.is_file else storage.join(self.uri, name)

    def refused(self, name: str, problem: str, remedy: str) -> InvalidInputError:
        """The error for a file that cannot be used."""
        return InvalidInputError(self._uri_field, self.address(name), problem, remedy)

    @property
    def _uri_field(self) -> str:
        return f"{self.field}.uri"


@dataclass(frozen=True)
class OpenedFiles:
    """Files of a source with the store that holds them.

    Attributes:
        files: Which.
        store: pyarrow's filesystem; safe to use from several threads.
        root: Path of the folder, or of the file, in it.
    """

    files: SourceFiles
    store: fs.FileSystem
    root: str

    def path(self, name: str) -> str:
        """Of the file `name` in the store.

        Not by way of an address, in which ``#``, ``?`` and ``%`` of a name would mean something.
        """
        return self.root if self.files.is_file else f"{self.root.rstrip('/')}/{name}"

    def read(self, name: str) -> bytes:
        """Content of the file `name`. Raises FileNotFoundError when there is none."""
        with self._explained(name), self.store.open_input_file(self.path(name)) as file:
            return bytes(file.read())

    def stream(self, name: str) -> Any:
        """The file `name`, to be read from start to end and closed."""
        with self._explained(name):
            return self.store.open_input_stream(
                self.path(name), compression=None, buffer_size=FETCH_BYTES
            )

    def _explained(self, name: str) -> Any:
        return storage.explained(self.files.address(name), f"{self.files.field}.uri")


def found_files(uri: str, suffixes: tuple[str, ...], field: str) -> SourceFiles:
    """The files at `uri`, of which there is at least one.

    Raises:
        InvalidInputError: an address that cannot be used or reached, or nothing of that kind there.
    """
    uri_field = f"{field}.uri"
    uri = storage.absolute(uri, uri_field)
    storage.check_reachable(uri, uri_field)
    store, path = storage.filesystem(uri, uri_field)
    with storage.explained(uri, uri_field):
        kind = store.get_file_info(path).type
    require(
        kind != fs.FileType.NotFound, uri_field, uri, "there is nothing there", "Mend the address"
    )
    files = SourceFiles(uri, suffixes, kind == fs.FileType.File, field)
    known = ", ".join(suffixes)
    require(
        not files.is_file or uri.lower().endswith(suffixes),
        uri_field,
        uri,
        f"a file, and none of {known}",
        "Give a folder",
    )
    require(
        next(files.names(), None) is not None,
        uri_field,
        uri,
        f"no file below it is one of {known}",
        "Mend the address",
    )
    return files


def is_hidden(name: str) -> bool:
    """Whether a part of the path `name` starts with a dot."""
    return name.startswith(".") or "/." in name
