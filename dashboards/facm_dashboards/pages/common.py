"""What every page is made from."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Path, Request
from starlette.exceptions import HTTPException

from facm_dashboards.data import Data, Snapshot
from facm_dashboards.view import View
from facm_platform.tracking.reading import RunRecord


def _data(request: Request) -> Data:
    data: Data = request.app.state.data
    return data


def _view(request: Request) -> View:
    view: View = request.app.state.view
    return view


def _snapshot(data: Annotated[Data, Depends(_data)]) -> Snapshot:
    return data.snapshot()


TheData = Annotated[Data, Depends(_data)]
TheView = Annotated[View, Depends(_view)]
TheSnapshot = Annotated[Snapshot, Depends(_snapshot)]
RunId = Annotated[str, Path(pattern=r"^[0-9a-f]{32}$")]


def find(snapshot: Snapshot, run_id: str) -> RunRecord:
    """The run of that id; 404 where there is none."""
    run = snapshot.run(run_id)
    if run is None:
        raise HTTPException(404, "There is no run of this id (any more).")
    return run
