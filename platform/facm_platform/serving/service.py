"""The process that takes requests: checks them, has them drawn, and asks again if a replica dies.

A generation is a pure function of version, class or prompt, seed and steps, so that it may be done
twice.
"""

# Annotations are evaluated here: FastAPI needs the request's schema, which each service makes.

import asyncio
import hashlib
import hmac
import logging
import secrets
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import ray
from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.util.metrics import Counter, Histogram
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from facm_core.errors import InvalidInputError
from facm_platform.serving import contract
from facm_platform.serving.config import ServeConfig
from facm_platform.serving.model import Description, Drawn, Order
from facm_platform.serving.prometheus import CONTENT_TYPE, cluster_metrics

logger = logging.getLogger("ray.serve")
Responses: TypeAlias = dict[int | str, dict[str, Any]]

_PAGE = Path(__file__).with_name("page.html")
_POLICY = (
    "default-src 'none'; connect-src 'self'; img-src data:; "
    "script-src 'unsafe-inline'; style-src 'unsafe-inline'"
)
_RETRY_AFTER_SECONDS = 1
# Until Serve has noticed that the replica is gone.
_PAUSE_SECONDS = 0.05
_DESCRIBE_SECONDS = 5.0
_LATENCY_SECONDS = [0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60]


class Service:
    """The deployment that answers HTTP.

    Args:
        config: What is served.
        replicas: Handle of the deployment that draws.
        token_sha256: Of the bearer token; None where none is needed. The token itself stays out
            of Ray's records.
    """

    def __init__(self, config: ServeConfig, replicas: Any, token_sha256: bytes | None) -> None:
        self._config = config
        self._replicas = replicas
        self._token_sha256 = token_sha256
        tags = {"model": config.model}
        self._requests = Counter(
            "facm_requests", description="Requests to draw.", tag_keys=("model", "status")
        ).set_default_tags(tags)
        self._seconds = Histogram(
            "facm_request_seconds",
            description="Time to answer a request to draw.",
            boundaries=_LATENCY_SECONDS,
            tag_keys=("model",),
        ).set_default_tags(tags)
        self._repeated = Counter(
            "facm_repeated", description="Asked again: a replica died.", tag_keys=("model",)
        ).set_default_tags(tags)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """The application, which Ray Serve asks for after the constructor."""
        return build_app(self, self._config, self._token_sha256)

    async def draw(self, order: Order) -> Drawn:
        """Have it drawn.

        Raises:
            InvalidInputError: the model cannot draw that.
            HTTPException: too many wait (429), or there is nobody to draw it in time (503).
        """
        async with asyncio.timeout(self._config.limits.seconds):
            result = await self._ask(lambda: self._replicas.draw.remote(order))
        if isinstance(result, InvalidInputError):
            raise result
        assert isinstance(result, Drawn)
        return result

    async def describe(self) -> Description:
        """The version that a replica serves now.

        Raises:
            HTTPException: as `draw`.
        """
        async with asyncio.timeout(_DESCRIBE_SECONDS):
            described = await self._ask(lambda: self._replicas.describe.remote())
        assert isinstance(described, Description)
        return described

    def count(self, status: int, seconds: float) -> None:
        """Of a request to draw."""
        self._requests.inc(tags={"status": str(status)})
        self._seconds.observe(seconds)

    async def _ask(self, ask: Callable[[], Awaitable[Any]]) -> Any:
        while True:
            try:
                return await ask()
            except RayActorError as error:
                logger.warning("a replica died; asking again (%s)", type(error).__name__)
                self._repeated.inc()
                await asyncio.sleep(_PAUSE_SECONDS)


def build_app(service: Service, config: ServeConfig, token_sha256: bytes | None) -> FastAPI:
    """The routes."""
    app = FastAPI(
        title=f"{config.model}",
        description="Images of a registered model, drawn in one or a few steps.",
        version="1",
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
    )
    app.add_middleware(BodyLimit, limit=config.limits.body_bytes)
    _handle_errors(app)
    guard = [Depends(_bearer(token_sha256))] if token_sha256 is not None else []
    _add_drawing(app, service, config, guard)
    _add_looking(app, service, config, guard)
    return app


def _add_drawing(app: FastAPI, service: Service, config: ServeConfig, guard: list[Any]) -> None:
    body = contract.request_model(config.limits)
    codes = (400, 413, 422, 429, 503, *((401,) if guard else ()))

    @app.post(
        "/generate",
        dependencies=guard,
        summary="Draw images",
        response_class=Response,
        responses={
            200: {
                "description": "The images. X-Model-Version names what drew them, X-Seed how.",
                "content": {
                    "image/png": {"schema": {"type": "string", "format": "binary"}},
                    contract.NPY: {"schema": {"type": "string", "format": "binary"}},
                    "application/json": {
                        "schema": {
                            "anyOf": [
                                contract.PngImages.model_json_schema(),
                                contract.ArrayImages.model_json_schema(),
                            ]
                        }
                    },
                },
            },
            **{code: {"model": contract.Problem} for code in codes},
        },
    )
    async def generate(request: body) -> Response:  # type: ignore[valid-type]
        begin = time.perf_counter()
        answer = await _answer(service, config.model, request)
        service.count(answer.status_code, time.perf_counter() - begin)
        return answer


async def _answer(service: Service, model: str, request: contract.Request) -> Response:
    seed = secrets.randbelow(2**32) if request.seed is None else request.seed
    order = Order(
        label=request.label,
        prompt=request.prompt,
        seed=seed,
        count=request.count,
        steps=request.steps,
    )
    try:
        drawn = await service.draw(order)
        return await asyncio.to_thread(contract.encode, model, order, drawn, request.format)
    except InvalidInputError as error:
        return contract.problem(422, contract.explain(error))
    except Exception as error:
        return _unserved(error)


def _unserved(error: Exception) -> Response:
    """An answer for what is no fault of the request."""
    wait = {"Retry-After": str(_RETRY_AFTER_SECONDS)}
    if isinstance(error, BackPressureError):
        return contract.problem(429, "too many requests are waiting; try again", wait)
    if isinstance(error, TimeoutError):
        return contract.problem(503, "nothing was drawn in time; try again", wait)
    if isinstance(error, RayServeException):
        return contract.problem(503, "the model is not there at the moment; try again", wait)
    logger.error("a request failed", exc_info=error)
    return contract.problem(500, "the request failed; the server's log says why")


def _add_looking(app: FastAPI, service: Service, config: ServeConfig, guard: list[Any]) -> None:
    codes = (429, 503)
    problems: Responses = {code: {"model": contract.Problem} for code in codes}
    refused: Responses = {401: {"model": contract.Problem}} if guard else {}
    measured: Responses = {
        200: {"content": {"text/plain": {"schema": {"type": "string"}}}},
        503: {"model": contract.Problem},
    }

    async def served() -> Description | Response:
        try:
            return await service.describe()
        except Exception as error:
            return _unserved(error)

    @app.get(
        "/model",
        dependencies=guard,
        summary="What is served",
        response_model=contract.ServedModel,
        responses=problems | refused,
    )
    async def model() -> contract.ServedModel | Response:
        described = await served()
        if isinstance(described, Response):
            return described
        return contract.ServedModel(
            model=described.model,
            version=described.version,
            sha256=described.sha256,
            takes="class" if described.num_classes else "prompt",
            classes=described.num_classes or None,
            max_prompt=None if described.num_classes else config.limits.prompt,
            image_shape=list(described.image_shape),
            recommended_steps=list(described.recommended_steps),
            max_steps=config.limits.steps,
            max_count=config.limits.count,
        )

    @app.get("/healthz", summary="Whether this process lives", response_model=contract.Health)
    async def healthz() -> contract.Health:
        return contract.Health(status="ok")

    @app.get(
        "/readyz",
        summary="Whether a replica of the model answers",
        response_model=contract.Health,
        responses={503: {"model": contract.Problem}},
    )
    async def readyz() -> contract.Health | Response:
        described = await served()
        if isinstance(described, Description):
            return contract.Health(status="ready", version=described.version)
        # Full, and so at work.
        return contract.Health(status="full") if described.status_code == 429 else described

    @app.get(
        "/metrics",
        dependencies=guard,
        summary="Ray's metrics of this service, for Prometheus",
        response_class=Response,
        responses=measured | refused,
    )
    async def metrics() -> Response:
        try:
            nodes = ray.nodes()  # type: ignore[no-untyped-call]
            text = await asyncio.to_thread(cluster_metrics, nodes)
        except OSError as error:
            return contract.problem(503, f"Ray's metrics cannot be read ({error})")
        return Response(text, media_type=CONTENT_TYPE)

    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(_PAGE.read_text(), headers={"Content-Security-Policy": _POLICY})

    @app.get("/openapi.json", include_in_schema=False)
    async def openapi() -> Response:
        described = await served()
        if isinstance(described, Response):
            return described
        return JSONResponse(contract.of_version(app.openapi(), described))


def _handle_errors(app: FastAPI) -> None:
    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        return contract.problem(422, "; ".join(contract.findings(error.errors())))

    @app.exception_handler(StarletteHTTPException)
    async def refused(_: Request, error: StarletteHTTPException) -> Response:
        return contract.problem(error.status_code, error.detail, dict(error.headers or {}))


def _bearer(token_sha256: bytes) -> Callable[..., Awaitable[None]]:
    """A dependency that lets requests with the right token pass."""
    scheme = HTTPBearer(scheme_name="bearer", auto_error=False)

    async def check(given: Annotated[HTTPAuthorizationCredentials | None, Depends(scheme)]) -> None:
        # Of hashes, in a time that tells nothing.
        digest = hashlib.sha256((given.credentials if given else "").encode()).digest()
        if given is None or not hmac.compare_digest(digest, token_sha256):
            wanted = {"WWW-Authenticate": "Bearer"}
            raise HTTPException(401, "a bearer token is needed", headers=wanted)

    return check


class BodyLimit:
    """Answers requests with a longer body with 413, whether they tell its length or not."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on what is short enough."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        told = next((value for key, value in scope["headers"] if key == b"content-length"), b"0")
        if told.isdigit() and int(told) > self._limit:
            await self._too_long()(scope, receive, send)
            return
        read = 0

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._limit:
                raise HTTPException(413, self._text)
            return message

        await self._app(scope, counted, send)

    @property
    def _text(self) -> str:
        return f"the request is longer than {self._limit:,} bytes"

    def _too_long(self) -> JSONResponse:
        return contract.problem(413, self._text)
