"""The metrics that Ray keeps of a service, of all nodes in one answer."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_1_0_0 as CONTENT_TYPE
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

__all__ = ["CONTENT_TYPE", "cluster_metrics"]

_PREFIXES = ("ray_facm_", "ray_serve_")
_SECONDS = 5.0


def cluster_metrics(nodes: Iterable[Mapping[str, Any]]) -> bytes:
    """Ours and Serve's metrics, as Prometheus reads them.

    Args:
        nodes: From ``ray.nodes()``.

    Raises:
        OSError: a node does not answer.
    """
    families: dict[str, Metric] = {}
    for node in nodes:
        if not node["Alive"]:
            continue
        url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        with urllib.request.urlopen(url, timeout=_SECONDS) as answer:
            text = answer.read().decode()
        for family in text_string_to_metric_families(text):
            if family.name in families:
                families[family.name].samples += family.samples
            elif family.name.startswith(_PREFIXES):
                families[family.name] = family
    registry = CollectorRegistry()
    registry.register(_Collected(families.values()))
    return generate_latest(registry)


class _Collected(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = list(families)

    def collect(self) -> Iterator[Metric]:
        yield from self._families
