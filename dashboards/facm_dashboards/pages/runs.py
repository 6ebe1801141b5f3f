"""Runs: the table, one of them, and some beside each other."""

from __future__ import annotations

import math
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from starlette.exceptions import HTTPException

from facm_dashboards import run_charts
from facm_dashboards.charts import drawn
from facm_dashboards.data import Snapshot
from facm_dashboards.lineage import lineage
from facm_dashboards.pages.common import RunId, TheData, TheSnapshot, TheView, find
from facm_dashboards.runs import (
    TABLE_NFE,
    Fids,
    evaluations,
    matches,
    orders,
    own_fids,
)
from facm_dashboards.sheets import picture, sheets_of
from facm_platform.tracking.reading import RunRecord

router = APIRouter()

MOST_COMPARED = 8
_PER_PAGE = 100
_WORDS = 200

Words = Annotated[str, Query(max_length=_WORDS)]
Name = Annotated[str, Query(max_length=40, pattern=r"^[\w-]*$")]
Page = Annotated[int, Query(ge=1, le=10_000)]
Chosen = Annotated[list[str], Query(max_length=64)]


@router.get("/runs")
def table(
    request: Request,
    snapshot: TheSnapshot,
    view: TheView,
    q: Words = "",
    job: Name = "",
    sort: Name = "started",
    page: Page = 1,
) -> Response:
    """The table of runs."""
    return view.page(request, "runs.html", **_table(snapshot, q, job, sort, page))


@router.get("/runs/rows")
def rows(
    request: Request,
    snapshot: TheSnapshot,
    view: TheView,
    q: Words = "",
    job: Name = "",
    sort: Name = "started",
    page: Page = 1,
) -> Response:
    """The same without the page around it, for one that is open."""
    return view.page(request, "_runs.html", **_table(snapshot, q, job, sort, page))


def _table(snapshot: Snapshot, q: str, job: str, sort: str, page: int) -> dict[str, Any]:
    fids = Fids(snapshot.runs)
    keys: Any = orders(fids)
    if sort not in keys:
        raise HTTPException(404, "There is no such order of the table.")
    found = [r for r in snapshot.runs if (not job or r.job == job) and matches(r, q)]
    found.sort(key=keys[sort])
    pages = max(1, math.ceil(len(found) / _PER_PAGE))
    first = (min(page, pages) - 1) * _PER_PAGE
    return {
        "snapshot": snapshot,
        "shown": found[first : first + _PER_PAGE],
        "found": len(found),
        "fids": fids,
        "nfe": TABLE_NFE,
        "jobs": sorted({run.job for run in snapshot.runs if run.job}),
        "query": {"q": q, "job": job, "sort": sort if sort != "started" else ""},
        "page": min(page, pages),
        "pages": pages,
    }


@router.get("/runs/{run_id}")
def run(
    request: Request, run_id: RunId, snapshot: TheSnapshot, data: TheData, view: TheView
) -> Response:
    """All about one run."""
    one = find(snapshot, run_id)
    return view.page(
        request,
        "run.html",
        snapshot=snapshot,
        run=one,
        parent=snapshot.run(one.parent_id) if one.parent_id else None,
        fids=Fids(snapshot.runs).of(one),
        charts=run_charts.of_run(data, one),
        checkpoints=_checkpoints(data, one),
        stages=lineage(one, snapshot.runs, data.registry().versions),
        sheets=sheets_of(data, one, snapshot.runs),
        evaluations=evaluations(one, snapshot.runs),
    )


@router.get("/runs/{run_id}/facts")
def facts(request: Request, run_id: RunId, snapshot: TheSnapshot, view: TheView) -> Response:
    """What changes while it trains, without the page around it."""
    one = find(snapshot, run_id)
    fids = Fids(snapshot.runs).of(one)
    return view.page(request, "_facts.html", snapshot=snapshot, run=one, fids=fids)


@router.get("/runs/{run_id}/charts.json")
def charts(run_id: RunId, snapshot: TheSnapshot, data: TheData) -> Any:
    """What is drawn of it."""
    return drawn(run_charts.of_run(data, find(snapshot, run_id)))


@router.get("/runs/{run_id}/picture")
def show(
    run_id: RunId,
    snapshot: TheSnapshot,
    data: TheData,
    name: Annotated[str, Query(max_length=200)],
) -> Response:
    """A sample sheet: a PNG that the store lists among the run's artifacts."""
    try:
        content = picture(data, find(snapshot, run_id), name)
    except FileNotFoundError:
        raise HTTPException(404, "The run has no such picture.") from None
    return Response(content, media_type="image/png", headers={"Cache-Control": "max-age=60"})


@router.get("/compare")
def compare(
    request: Request,
    snapshot: TheSnapshot,
    data: TheData,
    view: TheView,
    run: Chosen = [],  # noqa: B006  (FastAPI copies it)
) -> Response:
    """Up to eight runs beside each other."""
    chosen = _chosen(snapshot, run)
    fids = Fids(snapshot.runs)
    found = run_charts.of_comparison(data, chosen, fids) if chosen else []
    return view.page(
        request,
        "compare.html",
        snapshot=snapshot,
        chosen=chosen,
        fids=fids,
        nfe=TABLE_NFE,
        charts=found,
        differing=_differing(chosen),
    )


@router.get("/compare/charts.json")
def compared(snapshot: TheSnapshot, data: TheData, run: Chosen) -> Any:
    """What is drawn of them."""
    return drawn(run_charts.of_comparison(data, _chosen(snapshot, run), Fids(snapshot.runs)))


def _chosen(snapshot: Snapshot, ids: list[str]) -> list[RunRecord]:
    ids = list(dict.fromkeys(ids))
    if len(ids) > MOST_COMPARED:
        told = f"At most {MOST_COMPARED} runs can be told apart. Choose fewer of the {len(ids)}."
        raise HTTPException(400, told)
    return [find(snapshot, run_id) for run_id in ids]


def _differing(chosen: list[RunRecord]) -> dict[str, list[str]]:
    """Values of the configuration in which the runs differ, beside their names."""
    names = sorted({name for run in chosen for name in run.params})
    values = {name: [run.params.get(name, "–") for run in chosen] for name in names}
    return {
        name: given
        for name, given in values.items()
        if len(set(given)) > 1 and not name.startswith("run.")
    }


def _checkpoints(data: Any, run: RunRecord) -> list[dict[str, Any]]:
    """Those that were measured: images, and FID ± error by steps."""
    steps = list(own_fids(run)) if run.job == "distill" else []
    names = [f"fid_nfe{n}{end}" for n in steps for end in ("", "_error")]
    curves = data.curves([run], names)
    rows: dict[int, dict[int, tuple[float, float | None]]] = {}
    for n in steps:
        (curve,), (error,) = curves[f"fid_nfe{n}"], curves[f"fid_nfe{n}_error"]
        if curve is None:
            continue
        errors = {} if error is None else dict(zip(error.images, error.values, strict=True))
        for images, value in zip(curve.images, curve.values, strict=True):
            rows.setdefault(int(images), {})[n] = (float(value), errors.get(images))
    first = steps[0] if steps else 0
    best = min(rows, key=lambda i: rows[i].get(first, (math.inf, None))[0], default=None)
    return [
        {"images": images, "fids": rows[images], "best": images == best, "steps": steps}
        for images in sorted(rows, reverse=True)
    ]
