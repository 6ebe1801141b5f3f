"""What is asked of Prometheus: the files, their queries, and the names in them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

DASHBOARDS = Path(__file__).resolve().parents[2] / "dashboards"
CONFIG = DASHBOARDS / "prometheus" / "prometheus.yml"
RULES = [DASHBOARDS / "prometheus" / name for name in ("recording.yml", "alerts.yml")]
CASES = Path(__file__).parent / "alerts.yml"

needs_prometheus = pytest.mark.skipif(
    not (shutil.which("prometheus") and shutil.which("promtool")),
    reason="no Prometheus on this machine (Debian: apt-get install prometheus)",
)


def promtool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    line = ["promtool", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, timeout=60)


def rules() -> list[dict[str, Any]]:
    """Every rule of every group."""
    groups = [group for file in RULES for group in yaml.safe_load(file.read_text())["groups"]]
    return [rule for group in groups for rule in group["rules"]]


class PanelQuery(NamedTuple):
    """PromQL of a panel, with a value in place of each of Grafana's variables."""

    panel: str
    ref: str
    expr: str


def panel_queries() -> Iterator[PanelQuery]:
    """Of the committed dashboards."""
    for file in sorted((DASHBOARDS / "grafana").glob("*.json")):
        for panel in json.loads(file.read_text())["panels"]:
            for target in panel.get("targets", []):
                expr = target["expr"].replace("$run", ".*")
                assert "$" not in expr
                yield PanelQuery(panel["title"], target["refId"], expr)


_WORDS = {"by", "on", "or", "and", "unless", "offset", "without", "ignoring", "group_left"}
_NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")


def metrics_of(expr: str) -> set[str]:
    """Names of the series that an expression reads."""
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]|\"[^\"]*\"|\b(by|on) *\([^)]*\)", " ", expr)
    bare = re.sub(r"\boffset +\w+", " ", bare)
    return {
        found.group()
        for found in _NAME.finditer(bare)
        if found.group() not in _WORDS
        and not re.match(r"\s*\(", bare[found.end() :])
        and not re.match(r"\d", bare[max(0, found.start() - 1) :])
    }
