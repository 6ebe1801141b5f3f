"""The board as an ASGI application: its routes' frame, its files, and what errors look like."""

from __future__ import annotations

import atexit
import gc
import hashlib
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, RedirectResponse
from mlflow.exceptions import MlflowException
from starlette.exceptions import HTTPException

from facm_core.errors import InvalidInputError
from facm_dashboards.config import BoardConfig
from facm_dashboards.data import Data
from facm_dashboards.identity import asks_for_login, forward_logins, status_of
from facm_dashboards.pages import models, runs, searches
from facm_dashboards.security import Guard
from facm_dashboards.view import View

_TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_LOGIN = {"WWW-Authenticate": 'Basic realm="MLflow", charset="UTF-8"'}


def create_app(config: BoardConfig) -> FastAPI:
    """The board of one MLflow."""
    forward_logins()
    app = FastAPI(title="FACM board", docs_url=None, redoc_url=None, openapi_url=None)
    static = _static()
    data = Data(config)
    view = View(
        config, {name: hashlib.sha256(text).hexdigest()[:8] for name, text in static.items()}
    )
    app.state.data, app.state.view = data, view

    @app.get("/")
    def home() -> Response:
        return RedirectResponse("/runs")

    @app.get("/health")
    def health() -> str:
        return "ok"

    @app.get("/static/{name:path}")
    def file(name: str) -> Response:
        # All of them are in memory: no name of a request opens a file.
        if name not in static:
            raise HTTPException(404)
        kind = _TYPES["." + name.rpartition(".")[2]]
        return Response(static[name], media_type=kind, headers={"Cache-Control": "max-age=86400"})

    for pages in (runs, searches, models):
        app.include_router(pages.router)
    _explain(app, view)
    app.add_middleware(Guard, hosts=config.hosts)
    # What was imported is no garbage: to look through it again and again takes longer than to read
    # five hundred runs.
    gc.freeze()
    atexit.register(gc.unfreeze)
    return app


def _static() -> dict[str, bytes]:
    """Every file that pages may ask for, by its name below ``static``."""

    def walk(folder: Traversable, prefix: str) -> dict[str, bytes]:
        found: dict[str, bytes] = {}
        for entry in folder.iterdir():
            if entry.is_dir():
                found |= walk(entry, f"{prefix}{entry.name}/")
            elif any(entry.name.endswith(suffix) for suffix in _TYPES):
                found[prefix + entry.name] = entry.read_bytes()
        return found

    return walk(files("facm_dashboards") / "static", "")


def _explain(app: FastAPI, view: View) -> None:
    """Errors as pages that say what to do; as JSON to scripts."""

    def told(request: Request, status: int, title: str, text: str, **more: Any) -> Response:
        if request.url.path.endswith(".json"):
            return JSONResponse({"error": f"{title}. {text}"}, status, **more)
        return view.page(request, "error.html", status, title=title, text=text, **more)

    @app.exception_handler(MlflowException)
    def of_mlflow(request: Request, error: MlflowException) -> Response:
        status = status_of(error)
        if asks_for_login(error):
            text = "The tracking server wants to know who you are. Give your MLflow user name."
            return told(request, 401, "Log in", text, headers=_LOGIN)
        if status == 403:
            text = "Your MLflow user may not see this. Ask whoever runs the tracking server."
            return told(request, 403, "Not for you", text)
        if status == 404:
            return told(request, 404, "Not found", str(error).splitlines()[0][:300])
        text = (
            f"{view.store} does not answer: {str(error).splitlines()[0][:300]}. Start it, or name "
            "another one with MLFLOW_TRACKING_URI. The board goes on as soon as it is back."
        )
        return told(request, 503, "MLflow is away", text)

    @app.exception_handler(InvalidInputError)
    def of_input(request: Request, error: InvalidInputError) -> Response:
        return told(request, 400, "That cannot be", str(error))

    @app.exception_handler(RequestValidationError)
    def of_request(request: Request, error: RequestValidationError) -> Response:
        fields = ", ".join(str(one["loc"][-1])[:40] for one in error.errors()[:5])
        return told(request, 422, "That cannot be", f"Not usable: {fields}.")

    @app.exception_handler(HTTPException)
    def of_http(request: Request, error: HTTPException) -> Response:
        titles = {404: "Not found", 405: "Not done that way", 403: "Not for you"}
        given = error.detail if error.detail != titles.get(error.status_code) else ""
        text = str(given or "Look for it among the runs.")
        return told(request, error.status_code, titles.get(error.status_code, "No"), text)
