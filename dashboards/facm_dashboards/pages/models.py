"""The registry: models, versions with the gates before them, promotion and its way back."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import parse_qs

from fastapi import APIRouter, Depends, Path, Query, Request, Response
from fastapi.responses import RedirectResponse
from mlflow.exceptions import MlflowException
from starlette.exceptions import HTTPException

from facm_dashboards.data import Data, Registry
from facm_dashboards.identity import may_promote, visitor
from facm_dashboards.pages.common import TheData, TheSnapshot, TheView
from facm_dashboards.runs import TABLE_NFE
from facm_dashboards.sheets import address
from facm_platform.config import Refused
from facm_platform.evaluation.report import SHEET
from facm_platform.registry.artifact import CARD
from facm_platform.registry.promote import PromoteConfig, gates, prepare
from facm_platform.registry.promotions import Promotions
from facm_platform.registry.versions import CHAMPION, PREVIOUS, Version
from facm_platform.tracking.reading import is_missing

router = APIRouter(prefix="/registry")

_CARD_BYTES = 2**18
_FOLDER = "model"

Model = Annotated[str, Path(max_length=200)]
Number = Annotated[str, Path(pattern=r"^[0-9]{1,9}$")]
Steps = Annotated[int, Query(ge=1, le=10_000)]


@router.get("")
def table(request: Request, snapshot: TheSnapshot, data: TheData, view: TheView) -> Response:
    """All models."""
    return view.page(request, "models.html", snapshot=snapshot, registry=data.registry())


@router.get("/{model}")
def model(
    request: Request, model: Model, snapshot: TheSnapshot, data: TheData, view: TheView
) -> Response:
    """Versions of one."""
    registry = _known(data, model)
    return view.page(
        request,
        "model.html",
        snapshot=snapshot,
        model=model,
        aliases=_by_number(registry, model),
        versions=registry.of(model),
        nfe=TABLE_NFE,
        promoter=may_promote(data.client, model),
        previous=registry.models[model].get(PREVIOUS),
        champion=registry.models[model].get(CHAMPION),
        last=_promotions(data, model).last,
        refusal="",
    )


@router.get("/{model}/{number}")
def version(
    request: Request,
    model: Model,
    number: Number,
    snapshot: TheSnapshot,
    data: TheData,
    view: TheView,
    nfe: Steps = 1,
) -> Response:
    """One version, with what would let it become the champion."""
    return _version_page(request, model, number, data, view, snapshot, nfe, "")


def _version_page(
    request: Request,
    model: str,
    number: str,
    data: Data,
    view: TheView,
    snapshot: object,
    nfe: int,
    refusal: str,
) -> Response:
    registry = _known(data, model)
    one = _numbered(registry, model, number)
    champion = _promotions(data, model).champion()
    is_champion = champion is not None and champion.number == one.number
    judged = [] if is_champion else list(gates(one, champion, _config(data, model, nfe=nfe)))
    return view.page(
        request,
        "version.html",
        409 if refusal else 200,
        snapshot=snapshot,
        model=model,
        version=one,
        champion=champion,
        is_champion=is_champion,
        aliases=_by_number(registry, model).get(number, []),
        gates=judged,
        nfe=nfe,
        steps=[n for n in (1, 2, 3, 4, 8) if one.fid(n) is not None] or [1],
        promoter=may_promote(data.client, model),
        card=_card(data, one),
        picture=_picture(data, one),
        refusal=refusal,
    )


async def _form(request: Request) -> dict[str, str]:
    """Fields of a form; its size is bounded before."""
    kind = request.headers.get("content-type", "")
    if kind.partition(";")[0] != "application/x-www-form-urlencoded":
        raise HTTPException(415, "This is no form.")
    try:
        fields = parse_qs((await request.body()).decode(), max_num_fields=16)
    except ValueError:
        raise HTTPException(422, "This is no form.") from None
    return {name: values[-1] for name, values in fields.items()}


Form = Annotated[dict[str, str], Depends(_form)]


@router.post("/{model}/{number}/promote")
def promote(
    request: Request,
    model: Model,
    number: Number,
    form: Form,
    snapshot: TheSnapshot,
    data: TheData,
    view: TheView,
) -> Response:
    """Make a version the champion, as jobs/promote.py does."""
    _check_promoter(data, model)
    nfe = form.get("nfe", "1")
    if not (nfe.isdecimal() and 1 <= int(nfe) <= 10_000):
        raise HTTPException(422, "Not usable: nfe.")
    config = _config(data, model, int(nfe), version=int(number), reason=_reason(form))
    try:
        prepare(config).execute(visitor.get().name)
    except Refused as refused:
        told = str(refused)
        return _version_page(request, model, number, data, view, snapshot, int(nfe), told)
    data.registry(fresh=True)
    return RedirectResponse(f"/registry/{model}", 303)


@router.post("/{model}/rollback")
def rollback(
    request: Request,
    model: Model,
    form: Form,
    snapshot: TheSnapshot,
    data: TheData,
    view: TheView,
) -> Response:
    """Make the previous champion champion again."""
    _check_promoter(data, model)
    try:
        prepare(_config(data, model, rollback=True, reason=_reason(form))).execute(
            visitor.get().name
        )
    except Refused as refused:
        raise HTTPException(409, str(refused)) from None
    data.registry(fresh=True)
    return RedirectResponse(f"/registry/{model}", 303)


def _check_promoter(data: Data, model: str) -> None:
    """Before anything else: what a promotion is starts with a file of the board's own."""
    _known(data, model)
    if not may_promote(data.client, model):
        who = visitor.get().name
        raise HTTPException(
            403, f"{who} may look at {model}, not change it: MLflow's EDIT is needed."
        )


def _config(
    data: Data,
    model: str,
    nfe: int = 1,
    *,
    version: int | None = None,
    rollback: bool = False,
    reason: str = "",
) -> PromoteConfig:
    return PromoteConfig(
        model=model,
        version=version,
        nfe=nfe,
        rollback=rollback,
        reason=reason,
        storage_uri=data.config.storage_uri,
        tracking=data.config.tracking,
    )


def _reason(form: dict[str, str]) -> str:
    reason = form.get("reason", "").strip()
    if len(reason) > 500:
        raise HTTPException(422, "Not usable: reason. Use at most 500 characters.")
    return reason


def _promotions(data: Data, model: str) -> Promotions:
    return Promotions(data.client, model, data.config.storage_uri)


def _known(data: Data, model: str) -> Registry:
    """The registry, which has that model: so no other name reaches a store or a folder."""
    registry = data.registry()
    if model not in registry.models:
        raise HTTPException(404, "There is no model of this name.")
    return registry


def _numbered(registry: Registry, model: str, number: str) -> Version:
    found = [version for version in registry.of(model) if version.number == number]
    if not found:
        raise HTTPException(404, f"{model} has no version {number}.")
    return found[0]


def _by_number(registry: Registry, model: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for alias, number in registry.models[model].items():
        found.setdefault(number, []).append(alias)
    return found


def _picture(data: Data, version: Version) -> str | None:
    """Address of its sample sheet, if it has one."""
    name = f"{_FOLDER}/{SHEET}"
    try:
        known = name in data.files(version.run_id, _FOLDER)
    except MlflowException as error:
        if not is_missing(error):
            raise
        return None
    return address(version.run_id, name) if known else None


def _card(data: Data, version: Version) -> str | None:
    """Its model card, Markdown."""
    run = data.snapshot().run(version.run_id)
    if run is None:
        return None
    try:
        return data.file(run, f"{_FOLDER}/{CARD}", _CARD_BYTES).decode(errors="replace")
    except FileNotFoundError:
        return None
