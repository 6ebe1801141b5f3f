"""The promotions of a model, in their order: what moves its champion, and by whom.

A promotion is a numbered file on the storage URI, created only if its number is free. So of two
promotions at once one wins, and the other one knows; aliases and tags of MLflow follow. Where they
were left behind by a job that died, the next one completes them.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

from mlflow.tracking import MlflowClient

from facm_platform import storage
from facm_platform.config import Refused
from facm_platform.registry.versions import CHAMPION, PREVIOUS, Version, find_version, get_version
from facm_platform.tracking.run import TAG_PREFIX

_APPLIED = TAG_PREFIX + "promotion"


@dataclass(frozen=True, kw_only=True)
class Promotion:
    """One move of the champion.

    Attributes:
        number: From 1.
        version: The champion that it made.
        previous: The champion before; None for none.
        who: Did it.
        when: UTC, ISO 8601.
        why: In their words, and the numbers that spoke for it.
    """

    number: int
    version: str
    previous: str | None
    who: str
    when: str
    why: str


class Promotions:
    """All of a model.

    Args:
        client: MLflow.
        model: Registered model.
        storage_uri: Of the runs; the files lie below it.
    """

    def __init__(self, client: MlflowClient, model: str, storage_uri: str) -> None:
        self._client, self._model = client, model
        self._folder = storage.join(storage.absolute(storage_uri), "promotions", model)

    @property
    def last(self) -> Promotion | None:
        """None before there is one."""
        names = sorted(storage.list_files(self._folder))
        if not names:
            return None
        kept = storage.read_text(storage.join(self._folder, names[-1]))
        return Promotion(**json.loads(kept))

    def champion(self) -> Version | None:
        """As the last promotion has it, or whoever moved the alias since by other means."""
        last = self.last
        if last is None or self._applied() == last.number:
            return find_version(self._client, self._model, CHAMPION)
        return get_version(self._client, self._model, last.version)

    def previous(self) -> Version | None:
        """The champion before this one."""
        last = self.last
        if last is None or self._applied() == last.number:
            return find_version(self._client, self._model, PREVIOUS)
        if last.previous is None:
            return None
        return get_version(self._client, self._model, last.previous)

    def add(self, promotion: Promotion) -> None:
        """Promote.

        Raises:
            Refused: another promotion came first.
        """
        name = storage.join(self._folder, f"{promotion.number:06d}.json")
        content = json.dumps(dataclasses.asdict(promotion), indent=2) + "\n"
        try:
            storage.create_bytes(name, content.encode())
        except FileExistsError:
            last = self.last
            assert last is not None
            raise Refused(
                f"{self._model} version {promotion.version} is not promoted: version "
                f"{last.version} was, by {last.who}, at the same time. Try again against it"
            ) from None
        self.complete()

    def complete(self) -> None:
        """Let MLflow's aliases and tags be those of the last promotion."""
        last = self.last
        if last is None or self._applied() == last.number:
            return
        client, model = self._client, self._model
        client.set_registered_model_alias(model, CHAMPION, last.version)
        if last.previous is not None:
            client.set_registered_model_alias(model, PREVIOUS, last.previous)
        audit = {"promoted_by": last.who, "promoted_at": last.when, "promoted_because": last.why}
        for name, value in audit.items():
            client.set_model_version_tag(model, last.version, TAG_PREFIX + name, value)
        # Last: what is marked is complete.
        client.set_registered_model_tag(model, _APPLIED, str(last.number))

    def _applied(self) -> int:
        tags = self._client.get_registered_model(self._model).tags
        return int(tags.get(_APPLIED, 0))
