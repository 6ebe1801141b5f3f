"""What every request must be, and what every answer carries."""

from __future__ import annotations

from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from facm_dashboards.identity import Visitor, visitor

MOST_QUERY_BYTES = 4096
MOST_BODY_BYTES = 8192

_SAFE = ("GET", "HEAD")
_POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",
        "connect-src 'self'",
        "form-action 'self'",
        "base-uri 'none'",
        "frame-ancestors 'none'",
    ]
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    # Not `no-referrer`, by which browsers send the Origin `null` with a form.
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}


class Guard:
    """Refuses what does not come from the board's own pages; remembers who asks.

    There is no cookie: a login is sent by the browser with each request, also with one that a
    strange page makes it send. So a request that changes something must have an Origin, the
    board's own: no page can forge it, and no token in a form would tell more.

    Args:
        app: The board.
        hosts: Host names that requests may use: a strange name that points here is a rebinding.
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str]) -> None:
        self._app, self._hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            # No page needs anything else, of websockets least.
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(_HEADERS)
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        headers = Headers(scope=scope)
        refusal = self._refusal(scope, headers)
        if refusal is not None:
            status, words = refusal
            await PlainTextResponse(f"{words}\n", status)(scope, receive, answer)
            return
        token = visitor.set(Visitor(headers.get("authorization")))
        try:
            await self._app(scope, receive, answer)
        finally:
            visitor.reset(token)

    def _refusal(self, scope: Scope, headers: Headers) -> tuple[int, str] | None:
        host = headers.get("host", "")
        if _name(host) not in self._hosts:
            return 400, "This host name is not the board's. Allow it with --name, if it is."
        if len(scope["query_string"]) > MOST_QUERY_BYTES:
            return 414, f"The address is longer than {MOST_QUERY_BYTES} bytes."
        if scope["method"] in _SAFE:
            return None
        site = headers.get("sec-fetch-site", "same-origin")
        if site != "same-origin" or urlsplit(headers.get("origin", "")).netloc != host:
            return 403, "This does not come from a page of the board."
        length = headers.get("content-length", "")
        if not length.isdigit():
            return 411, "The request does not say how long it is."
        if int(length) > MOST_BODY_BYTES:
            return 413, f"The request is longer than {MOST_BODY_BYTES} bytes."
        return None


def _name(host: str) -> str | None:
    """Of a Host header, without its port."""
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None
