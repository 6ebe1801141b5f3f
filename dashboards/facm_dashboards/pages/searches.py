"""Searches: which there are, and what one has found."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from facm_core.errors import InvalidInputError
from facm_dashboards import search_charts
from facm_dashboards.charts import Chart, drawn
from facm_dashboards.data import Data
from facm_dashboards.pages.common import RunId, TheData, TheSnapshot, TheView, find
from facm_platform.search.findings import Findings
from facm_platform.search.records import FAILED, FINISHED, Record
from facm_platform.tracking.reading import RunRecord

router = APIRouter()


@router.get("/searches")
def table(request: Request, snapshot: TheSnapshot, view: TheView) -> Response:
    """All searches."""
    found = [run for run in snapshot.runs if run.job == "search"]
    return view.page(request, "searches.html", snapshot=snapshot, searches=found)


@router.get("/searches/{run_id}")
def search(
    request: Request, run_id: RunId, snapshot: TheSnapshot, data: TheData, view: TheView
) -> Response:
    """One of them."""
    run = find(snapshot, run_id)
    findings, problem = _findings(data, run)
    runs = {one.name: one.run_id for one in reversed(snapshot.runs) if one.parent_id == run_id}
    return view.page(
        request,
        "search.html",
        snapshot=snapshot,
        run=run,
        problem=problem,
        findings=findings,
        leaders=_leaders(findings),
        runs=runs,
        short=search_charts.short,
        charts=_charts(findings),
    )


@router.get("/searches/{run_id}/charts.json")
def charts(run_id: RunId, snapshot: TheSnapshot, data: TheData) -> Any:
    """What is drawn of it."""
    return drawn(_charts(_findings(data, find(snapshot, run_id))[0]))


def _findings(data: Data, run: RunRecord) -> tuple[Findings | None, str]:
    """Or why there are none."""
    try:
        return data.findings(run), ""
    except FileNotFoundError:
        if run.ended is None:
            return None, "No trial has told anything yet. They appear here as soon as one begins."
        return None, (
            "It left no records in MLflow: it ended before its first trial, or was made before "
            "searches kept them there. Its report is among its artifacts."
        )
    except InvalidInputError as error:
        return None, f"Its configuration is of another version: {error}"


def _charts(findings: Findings | None) -> list[Chart]:
    return [] if findings is None else search_charts.of_search(findings)


def _leaders(findings: Findings | None) -> list[Record]:
    """Those at their end first, the best of them before the others."""
    if findings is None:
        return []
    objective = findings.config.objective
    measured = [one for one in findings.trials if one.measured and one.state != FAILED]
    rest = [one for one in findings.trials if one not in measured]
    measured.sort(
        key=lambda one: (one.state != FINISHED, -one.last["images_seen"], one.last[objective])
    )
    return measured + rest
