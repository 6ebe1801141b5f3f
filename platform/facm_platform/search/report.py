"""The texts of a search: leaderboard, table of all trials, report."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from facm_platform.search.config import SearchConfig
from facm_platform.search.findings import Confirmed, Findings
from facm_platform.search.plots import draw_plots
from facm_platform.search.records import FAILED, FINISHED, STOPPED, Record
from facm_platform.search.space import Values
from facm_platform.search.trial import IMAGES

LEADERBOARD, REPORT, TRIALS = "leaderboard.md", "report.md", "trials.csv"
_LEADERS = 20


def leaderboard(config: SearchConfig, records: Sequence[Record]) -> str:
    """Markdown: how many trials there are, and the best ones, those at their end first."""
    told = [record for record in records if record.measured and record.state != FAILED]
    told.sort(key=lambda r: (not r.finished, -r.last[IMAGES], r.last[config.objective]))
    counts = ", ".join(
        f"{sum(r.state == state for r in records)} {state}"
        for state in dict.fromkeys([FINISHED, STOPPED, FAILED, *(r.state for r in records)])
    )
    rows = [
        [f"{r.number}", r.state, f"{r.last[IMAGES]:,.0f}", *_distances(config, r), _words(r.values)]
        for r in told[:_LEADERS]
    ]
    head = ["trial", "state", "images", *config.objectives, "values"]
    return f"# {config.run.name}\n\n{len(records)} trials: {counts}\n\n{_table(head, rows)}"


def report_files(findings: Findings, plan: str) -> dict[str, bytes]:
    """All files of the report, by name.

    Args:
        findings: What was found.
        plan: What was to be done, in words.
    """
    plots = draw_plots(findings)
    files = {REPORT: _report(findings, plan, list(plots)), TRIALS: _csv(findings)}
    return plots | {name: text.encode() for name, text in files.items()}


def _report(findings: Findings, plan: str, plots: Sequence[str]) -> str:
    config, winner = findings.config, findings.winner
    gain, joint = findings.gain(winner, findings.recipe)
    if gain > joint:
        verdict = (
            "**The winner is better than the recipe by more than their joint standard error.**"
        )
    else:
        verdict = (
            "**The winner is not better than the recipe by more than their joint standard error:** "
            "what the search has found may be noise."
        )
    validation, confirm = config.validation, config.confirm
    states = ", ".join(
        f"{sum(record.state == state for record in findings.trials)} {state}"
        for state in (FINISHED, STOPPED, FAILED)
    )
    hours = sum(record.seconds for record in findings.trials) / 3600
    seeds = ", ".join(map(str, confirm.seeds))
    parts = [
        f"# Search {config.run.name}",
        verdict,
        f"Trial {winner.name} against the recipe `{config.recipe}`: {config.objective} "
        f"{'lower' if gain >= 0 else 'higher'} by {abs(gain):.2f}, joint standard error "
        f"{joint:.2f}. Its recipe is `winner.yaml`: "
        "`python jobs/distill.py --recipe winner.yaml`.",
        "## Confirmed",
        _confirmed(findings),
        f"Each is the mean of training seeds {seeds}, over {confirm.samples:,} samples, ± its "
        "standard error: the spread of the seeds and the error of the samples, which are the same "
        "for all runs. Gain is against the recipe, ± the joint standard error.",
        _widths(findings),
        "## Trials",
        f"{len(findings.trials)} trials ({states}), {hours:.2f} hours together. Protocol: FID over "
        f"{validation.samples:,} samples, noise and labels of seed {validation.seed} for all, at "
        f"{', '.join(map(str, validation.nfe))} steps; features `{validation.features_uri}`.",
        _importance(findings),
        _failures(findings),
        leaderboard(config, findings.trials).split("\n\n", 2)[2],
        _front(findings),
        *(f"![{name.removesuffix('.png')}]({name})" for name in plots),
        f"## Plan\n\n```\n{plan}\n```",
    ]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def _confirmed(findings: Findings) -> str:
    config = findings.config
    rows = []
    for one in findings.candidates:
        mean, error = (one.mean(config.objective), one.error(config.objective, config.error))
        gain, joint = findings.gain(one, findings.recipe)
        against = "" if one is findings.recipe else f"{gain:+.2f} ± {joint:.2f}"
        each = ", ".join(f"{distance:.2f}" for distance in one.distances(config.objective))
        failed = "; ".join(gist(run.reason) for run in one.runs if not run.finished)
        rows.append(
            [_label(one, findings), f"{mean:.2f} ± {error:.2f}", each or failed, against]
            + [f"{one.mean(other):.2f}" for other in config.objectives[1:]]
            + [_words(one.values)]
        )
    head = ["", config.objective, "seeds", "gain", *config.objectives[1:], "values"]
    return _table(head, rows)


def _label(one: Confirmed, findings: Findings) -> str:
    name = f"trial {int(one.name)}" if one.is_trial else one.name
    return f"**{name}**" if one is findings.winner else name


def _widths(findings: Findings) -> str:
    lines = [
        f"- {_label(one, findings)}: "
        + ", ".join(f"{width:g} gives {distance:.2f}" for width, distance in one.widths.items())
        for one in findings.candidates
        if one.widths
    ]
    return (
        "Widths of the average, from the trial's stored ones:\n\n" + "\n".join(lines)
        if lines
        else ""
    )


def _importance(findings: Findings) -> str:
    found = findings.importances()
    if not found:
        return ""
    shares = ", ".join(f"`{name}` {share:.0%}" for name, share in found.items())
    return f"Importance, of what the finished trials have in common: {shares}."


def _failures(findings: Findings) -> str:
    failed = [record for record in findings.trials if record.state == FAILED]
    return "\n".join(f"- trial {one.number} failed: {gist(one.reason)}" for one in failed)


def gist(reason: str) -> str:
    """The line of an error's text that says what it was."""
    lines = [line for line in reason.splitlines() if line.strip()] or [""]
    if any(line.startswith("Traceback") for line in lines):
        return lines[-1]
    # Ray Train's, of a worker that left no word.
    places = [number for number, line in enumerate(lines) if line.startswith("[Rank")]
    return " ".join(lines[places[0] : places[0] + 2]) if places else lines[0]


def _front(findings: Findings) -> str:
    if len(findings.config.objectives) == 1:
        return ""
    rows = [
        [f"{r.number}", *_distances(findings.config, r), _words(r.values)] for r in findings.front()
    ]
    return "## Pareto front\n\n" + _table(["trial", *findings.config.objectives, "values"], rows)


def _csv(findings: Findings) -> str:
    """Every trial, a column for each value: what parallel coordinates are drawn from."""
    keys = sorted({key for record in findings.trials for key in record.values})
    metrics = sorted({key for record in findings.trials for key in record.last})
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["trial", "state", *metrics, "seconds", *keys, "reason"])
    for r in findings.trials:
        found = [r.last.get(name, "") for name in metrics]
        values = [r.values.get(key, "") for key in keys]
        writer.writerow([r.number, r.state, *found, round(r.seconds, 1), *values, r.reason])
    return file.getvalue()


def _distances(config: SearchConfig, record: Record) -> list[str]:
    return [
        f"{record.last[name]:.2f} ± {record.last[f'{name}_error']:.2f}"
        for name in config.objectives
    ]


def _words(values: Values) -> str:
    """Without the sections that their names lie in."""
    return ", ".join(
        f"{key.rpartition('.')[2]} {value:.4g}"
        if isinstance(value, float)
        else f"{key.rpartition('.')[2]} {value}"
        for key, value in values.items()
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"
