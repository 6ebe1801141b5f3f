"""What is known of the trials of a search: one file each, from which an interrupted one goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from facm_platform import storage
from facm_platform.search.space import Values

RUNNING, FINISHED, STOPPED, FAILED = "running", "finished", "stopped", "failed"


@dataclass
class Record:
    """Of one trial.

    Attributes:
        number: In the order of the proposals, from 0.
        name: Of its run.
        params: The proposal, as the chooser made it.
        values: The same, as values of the recipe.
        state: ``running`` (also of one that was interrupted), ``finished``, ``stopped`` early, or
            ``failed``.
        reason: Why it failed.
        measured: Its metrics at each of its checkpoints, with their ``images_seen``.
        seconds: That it took, over all attempts.
        images_per_second: In training; None before its end.
        place: Of its latest measurement, see `facm_platform.search.trial.Place`.
        runs: Names of its runs: one, and one more for each time that it went on from another.
    """

    number: int
    name: str
    params: dict[str, Any]
    values: Values
    state: str = RUNNING
    reason: str = ""
    measured: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0
    images_per_second: float | None = None
    place: dict[str, Any] | None = None
    runs: list[str] = field(default_factory=list)

    @property
    def ended(self) -> bool:
        """Whether there is nothing left to do."""
        return self.state != RUNNING

    @property
    def last(self) -> dict[str, float]:
        """Its latest measurement; empty before there is one."""
        return self.measured[-1] if self.measured else {}

    @property
    def finished(self) -> bool:
        """Whether it ran to its end."""
        return self.state == FINISHED


class Records:
    """Those of one search.

    Args:
        folder_uri: Where they are kept; what lies there is read.
    """

    def __init__(self, folder_uri: str) -> None:
        self._folder = folder_uri
        names = sorted(storage.list_files(folder_uri))
        texts = (storage.read_text(storage.join(folder_uri, name)) for name in names)
        found = [Record(**json.loads(text)) for text in texts]
        self._records = {record.name: record for record in found}

    def __iter__(self) -> Iterator[Record]:
        return iter(sorted(self._records.values(), key=lambda record: record.number))

    def get(self, name: str) -> Record | None:
        """The one of that name, if it is known."""
        return self._records.get(name)

    def keep(self, record: Record) -> None:
        """Write it, whole or not at all."""
        self._records[record.name] = record
        content = json.dumps(asdict(record), indent=2) + "\n"
        storage.write_bytes(storage.join(self._folder, f"{record.name}.json"), content.encode())
