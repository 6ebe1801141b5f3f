"""Prometheus' configuration and rules, by its own tools."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.monitoring.monitored import CASES, CONFIG, RULES, needs_prometheus, promtool, rules

ALERTS = {rule["alert"]: rule for rule in rules() if "alert" in rule}
MUTANTS = [(alert, how) for alert in ALERTS for how in ("never", "always")]
MUTANTS += [(alert, "at once") for alert, rule in ALERTS.items() if "for" in rule]


def cases() -> list[dict[str, Any]]:
    found = yaml.safe_load(CASES.read_text())["tests"]
    return [case for test in found for case in test["alert_rule_test"]]


@needs_prometheus
def test_prometheus_takes_the_configuration_and_the_rules() -> None:
    for check in (("config", CONFIG), *(("rules", file) for file in RULES)):
        done = promtool("check", *check)
        assert done.returncode == 0, done.stdout + done.stderr


@needs_prometheus
def test_alerts_fire_when_they_must_and_only_then() -> None:
    done = promtool("test", "rules", CASES)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_tried_both_ways() -> None:
    assert {case["alertname"] for case in cases() if case["exp_alerts"]} == set(ALERTS)
    assert {case["alertname"] for case in cases() if not case["exp_alerts"]} == set(ALERTS)


@needs_prometheus
@pytest.mark.parametrize(("alert", "mutation"), MUTANTS)
def test_a_broken_alert_is_noticed(alert: str, mutation: str, tmp_path: Path) -> None:
    folder = tmp_path / "dashboards" / "prometheus"
    shutil.copytree(CONFIG.parent, folder)
    (tmp_path / "tests" / "monitoring").mkdir(parents=True)
    trial = shutil.copy(CASES, tmp_path / "tests" / "monitoring")

    alerts = yaml.safe_load((folder / "alerts.yml").read_text())
    (rule,) = (r for group in alerts["groups"] for r in group["rules"] if r["alert"] == alert)
    if mutation == "at once":
        del rule["for"]
    else:
        rule["expr"] = "vector(0) > 1" if mutation == "never" else "vector(1)"
    (folder / "alerts.yml").write_text(yaml.safe_dump(alerts))
    assert promtool("check", "rules", folder / "alerts.yml").returncode == 0
    assert promtool("test", "rules", trial).returncode == 1


def test_alerts_say_what_to_do() -> None:
    guide = (CONFIG.parents[1] / "grafana" / "README.md").read_text()
    for alert, rule in ALERTS.items():
        assert set(rule["annotations"]) == {"summary", "action"}
        assert f"| `{alert}` |" in guide
