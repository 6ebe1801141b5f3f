"""The dashboard of the runs: how far, how fast, how well, and what is at stake."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from grafana_foundation_sdk.builders import dashboard as builders
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.models import units
from grafana_foundation_sdk.models.dashboard import Panel

from facm_monitoring.panels import Query, choice, lines, new_dashboard, numbers
from facm_platform.training.progress import TIME_BINS

Panels: TypeAlias = Sequence[Builder[Panel]]

_CHOSEN = '{run=~"$run"}'
_NODE = "{{instance}}"
_GPU = "{{instance}} GPU {{GpuIndex}}"


def training() -> builders.Dashboard:
    """All panels, row by row."""
    board = new_dashboard(
        "facm-training", "FACM training", "Runs of distillation and of flow matching, live"
    )
    board.with_variable(choice("run", "Run", "run:facm_images_seen:max"))
    for title, panels in {
        "Now": _now(),
        "Losses": _losses(),
        "Health": _health(),
        "Speed": _speed(),
        "Safety": _safety(),
        "Machines": _machines(),
    }.items():
        board.with_row(builders.Row(title))
        for panel in panels:
            board.with_panel(panel)
    return board


def _metric(name: str, of: str = "") -> Query:
    """What training tells, one series a run."""
    return _of_run(f"max by (run_id, run) (ray_facm_{name}{_CHOSEN})", of)


def _of_run(expr: str, of: str = "") -> Query:
    return Query(expr, f"{{{{run}}}} {of}".strip())


def _recorded(name: str) -> str:
    """What ``recording.yml`` makes of it."""
    return f"run:facm_{name}{_CHOSEN}"


def _now() -> Panels:
    seen, total = _recorded("images_seen:max"), _recorded("total_images:max")
    speed = _recorded("images_per_second:max")
    firing = 'count(ALERTS{alertname=~"Facm.+", alertstate="firing"}) or vector(0)'
    return [
        numbers(
            "Progress",
            "Images seen, of all images of the run",
            _of_run(f"{seen} / {total}"),
            unit=units.PercentUnit,
        ),
        numbers(
            "Time left",
            "At the speed of the last log window",
            _of_run(f"({total} - {seen}) / {speed}"),
            unit=units.Seconds,
        ),
        numbers(
            "At stake",
            "Work that would be done again if all machines died now",
            _of_run(_recorded("unsaved_seconds")),
            unit=units.Seconds,
        ),
        numbers("Alerts", "Firing now, over all runs", Query(firing, "firing")),
    ]


def _losses() -> Panels:
    by_time = "Mean over the rows with t in the eighth t0 … t7 of [0, 1], from noise to data"
    return [
        lines("Loss", "λ_CM·L_CM + λ_FM·L_FM, or that of another method", _metric("loss")),
        lines("Anchor", "L_FM: the velocity at 2−t", _metric("loss_fm")),
        lines("Shortcut", "L_CM: consistency along the flow", _metric("loss_cm")),
        *(
            lines(
                f"{title} by time",
                by_time,
                *(_metric(f"{loss}_t{index}", f"t{index}") for index in range(TIME_BINS)),
                span=12,
            )
            for title, loss in {"Anchor": "loss_fm", "Shortcut": "loss_cm"}.items()
        ),
    ]


def _health() -> Panels:
    return [
        lines(
            "Tangent",
            "Root mean square of dF/dt; where it explodes, so does the target",
            _metric("tangent_rms"),
        ),
        lines(
            "Clipped",
            "Share of the target's elements that are clipped",
            _metric("clipped_share"),
            unit=units.PercentUnit,
        ),
        lines("Gradient", "Its norm, before it is scaled down", _metric("gradient_norm")),
        lines(
            "Agreement of the tasks",
            "Cosine of the gradients of L_FM and L_CM; below 0 they work against each other",
            _metric("gradient_cosine"),
        ),
        lines(
            "Drift of the anchor",
            "‖F − v‖ / ‖v‖ on rows that stay the same",
            _metric("anchor_drift"),
        ),
        lines("Update", "‖Δθ‖ / ‖θ‖ of a step", _metric("update_to_weight")),
    ]


def _speed() -> Panels:
    return [
        lines(
            "Images/s",
            "Of a log window; and over five minutes, restarts and hangs included",
            _metric("images_per_second"),
            _of_run(f"clamp_min({_recorded('images_seen:rate5m')}, 0)", "5 min"),
        ),
        lines(
            "Waits",
            "Shares of time without work",
            _metric("data_wait_share", "for data"),
            _metric("checkpoint_share", "for checkpoints"),
            unit=units.PercentUnit,
        ),
        lines(
            "Memory",
            "Peak of the rank with most: allocated on the GPU, or the process",
            _metric("memory_mib"),
            unit=units.Mebibytes,
        ),
    ]


def _safety() -> Panels:
    return [
        lines(
            "Work at stake",
            "Time since the last committed checkpoint, or since the workers began",
            _of_run(_recorded("unsaved_seconds")),
            unit=units.Seconds,
        ),
        lines(
            "Not finite",
            "Steps that were skipped, and times that the run went back to a checkpoint",
            _metric("skipped_steps", "skipped"),
            _metric("rollbacks", "rollbacks"),
        ),
        lines(
            "Restarts and backlog",
            "Restarts of the workers within an hour; checkpoints whose FID is not known yet",
            _of_run(f"changes({_recorded('begun_seconds:max')}[1h])", "restarts"),
            _metric("unmeasured_checkpoints", "unmeasured"),
        ),
    ]


def _machines() -> Panels:
    """Ray's own metrics; they know nodes and no runs."""
    memory = "max by (instance) (ray_node_mem_used / ray_node_mem_total)"
    disk = "max by (instance) (ray_node_disk_utilization_percentage)"
    return [
        lines(
            "GPU memory",
            "With what PyTorch holds in reserve, and other processes",
            Query("gpu:ray_node_gram_used:ratio", _GPU),
            unit=units.PercentUnit,
        ),
        lines(
            "GPU",
            "Utilisation",
            Query("max by (instance, GpuIndex) (ray_node_gpus_utilization)", _GPU),
            unit=units.Percent,
        ),
        lines(
            "CPU",
            "Utilisation",
            Query("max by (instance) (ray_node_cpu_utilization)", _NODE),
            unit=units.Percent,
        ),
        lines("Memory of the node", "Used", Query(memory, _NODE), unit=units.PercentUnit),
        lines("Disk", "Used", Query(disk, _NODE), unit=units.Percent),
        lines(
            "Network",
            "Received and sent",
            Query("max by (instance) (ray_node_network_receive_speed)", f"{_NODE} received"),
            Query("max by (instance) (ray_node_network_send_speed)", f"{_NODE} sent"),
            unit=units.BytesPerSecondSI,
        ),
    ]
