"""Pages from templates: everything that is put into one is escaped."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import urlencode, urlsplit

from fastapi import Request, Response
from fastapi.responses import HTMLResponse
from jinja2 import Environment, PackageLoader, StrictUndefined
from markdown_it import MarkdownIt
from markdown_it.rules_core import StateCore
from markupsafe import Markup

from facm_dashboards import runs, words
from facm_dashboards.config import BoardConfig
from facm_dashboards.identity import visitor


class View:
    """The templates, with what all of them use.

    Args:
        config: Of the board.
        versions: Of the static files, by name, so that browsers keep what has not changed.
    """

    def __init__(self, config: BoardConfig, versions: Mapping[str, str]) -> None:
        self.store = _without_login(config.tracking_uri)
        self._versions = versions
        environment = Environment(
            loader=PackageLoader("facm_dashboards"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        for name in ("number", "count", "distance", "span", "age", "clock", "moment"):
            environment.filters[name] = getattr(words, name)
        for name in ("method", "images_seen", "total_images", "silent_seconds"):
            environment.filters[name] = getattr(runs, name)
        environment.filters["markdown"] = _markdown
        environment.globals["static"] = self._static
        environment.globals["address"] = address
        self._environment = environment

    def page(
        self,
        request: Request,
        template: str,
        status: int = 200,
        headers: Mapping[str, str] | None = None,
        **values: Any,
    ) -> Response:
        """A page, or a part of one."""
        common = {"path": request.url.path, "store": self.store, "visitor": visitor.get().name}
        text = self._environment.get_template(template).render({"snapshot": None} | common | values)
        return HTMLResponse(text, status, dict(headers or {}))

    def _static(self, name: str) -> str:
        return f"/static/{name}?v={self._versions[name]}"


def address(path: str, **values: Any) -> str:
    """A path with a query of those values that are set."""
    given = {name: value for name, value in values.items() if value not in ("", None, [], 1)}
    return f"{path}?{urlencode(given, doseq=True)}" if given else path


# Without HTML of the author's own, and without pictures, which may lie anywhere.
_READER = MarkdownIt("commonmark", {"html": False}).enable("table")
_READER.add_render_rule("image", lambda *_: "")


def _align_by_class(state: StateCore) -> None:
    """Of a table's cells: a style in the text would be against the policy of our pages."""
    for token in state.tokens:
        style = str(token.attrs.pop("style", ""))
        if style:
            token.attrs["class"] = style.removeprefix("text-align:")


_READER.core.ruler.push("align_by_class", _align_by_class)


def _markdown(text: str) -> Markup:
    """HTML of someone's Markdown; what is no Markdown in it is escaped."""
    return Markup(_READER.render(text))


def _without_login(uri: str) -> str:
    parts = urlsplit(uri)
    return uri.replace(f"{parts.netloc}", parts.netloc.rpartition("@")[2]) if parts.netloc else uri
