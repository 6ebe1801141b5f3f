"""What the dashboards are put together from."""

from __future__ import annotations

import json
from string import ascii_uppercase
from typing import NamedTuple

from grafana_foundation_sdk.builders import common, prometheus, stat, timeseries
from grafana_foundation_sdk.builders import dashboard as builders
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import (
    BigValueGraphMode,
    LegendDisplayMode,
    LegendPlacement,
    VisibilityMode,
)
from grafana_foundation_sdk.models.dashboard import (
    Dashboard,
    DashboardCursorSync,
    DataSourceRef,
    VariableRefresh,
    VariableSort,
)

DATASOURCE = "datasource"
"""The variable by which a reader chooses the Prometheus."""

_SOURCE = DataSourceRef(type_val="prometheus", uid=f"${{{DATASOURCE}}}")


class Query(NamedTuple):
    """PromQL, and the legend of what it gives."""

    expr: str
    legend: str


def numbers(title: str, about: str, *queries: Query, unit: str = "short") -> stat.Panel:
    """The last value of each series, large."""
    panel = stat.Panel().title(title).description(about).unit(unit).height(4).span(6)
    panel.datasource(_SOURCE).graph_mode(BigValueGraphMode.NONE).no_value("none")
    panel.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    for number, query in enumerate(queries):
        panel.with_target(_target(number, query).instant())
    return panel


def lines(
    title: str, about: str, *queries: Query, unit: str = "short", span: int = 8
) -> timeseries.Panel:
    """Series over time."""
    panel = timeseries.Panel().title(title).description(about).unit(unit).height(8).span(span)
    panel.datasource(_SOURCE).show_points(VisibilityMode.NEVER).no_value("no data")
    panel.legend(
        common.VizLegendOptions()
        .display_mode(LegendDisplayMode.LIST)
        .placement(LegendPlacement.BOTTOM)
        .show_legend(True)
    )
    for number, query in enumerate(queries):
        panel.with_target(_target(number, query).range())
    return panel


def new_dashboard(uid: str, title: str, about: str) -> builders.Dashboard:
    """One without panels, which asks its reader for a Prometheus."""
    made = builders.Dashboard(title).uid(uid).description(about).tags(["facm"])
    made.time("now-6h", "now").refresh("30s").tooltip(DashboardCursorSync.CROSSHAIR)
    return made.with_variable(
        builders.DatasourceVariable(DATASOURCE).label("Prometheus").type("prometheus")
    )


def choice(name: str, label: str, metric: str) -> builders.QueryVariable:
    """A variable: some or all values that a label of a metric has."""
    variable = builders.QueryVariable(name).label(label).datasource(_SOURCE)
    variable.query({"query": f"label_values({metric}, {name})", "refId": name})
    variable.refresh(VariableRefresh.ON_TIME_RANGE_CHANGED).sort(VariableSort.ALPHABETICAL_ASC)
    return variable.multi(True).include_all(True).all_value(".*")


def as_json(dashboard: builders.Dashboard) -> str:
    """As Grafana reads it, with the panels numbered."""
    built: Dashboard = dashboard.build()
    for number, panel in enumerate(built.panels or [], 1):
        panel.id_val = number
    return json.dumps(built, cls=JSONEncoder, indent=2, sort_keys=True) + "\n"


def _target(number: int, query: Query) -> prometheus.Dataquery:
    target = prometheus.Dataquery().expr(query.expr).legend_format(query.legend)
    return target.ref_id(ascii_uppercase[number])
