"""What a search makes sure of before it starts anything."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import replace

from facm_core.errors import InvalidInputError, require
from facm_platform import storage
from facm_platform.evaluation.config import check_measure
from facm_platform.evaluation.extractors import load_extractor
from facm_platform.search.config import GRID, PBT, SearchConfig
from facm_platform.search.plan import IDENTITY, SearchPlan, identity, varied
from facm_platform.search.space import Space, Values, parse
from facm_platform.search.trial import SPEED
from facm_platform.tracking import (
    TrackingConfig,
    check_run_name,
    check_store,
    embedded_root,
    latest_metric,
)
from facm_platform.training import distill

# What a search sets itself, and what its placement rests on.
_NOT_VARIED = ("run", "data", "teacher", "workers", "validation")
_NOT_VARIED_IN_TRAIN = (
    "images",
    "checkpoint_images",
    "seed",
    "max_hours",
    "ema_sigma_rels",
    "export_sigma_rel",
    "keep_checkpoints",
    "keep_averages",
)


def prepare(config: SearchConfig) -> SearchPlan:
    """Validate a search without touching a cluster: its recipe, every end of every range, controls.

    Raises:
        InvalidInputError: see `facm_platform.training.distill.prepare`; a key of the space that the
            recipe does not have or that the search sets, a value it does not take, an empty range,
            a budget that is less than a trial, a name that is in use.
    """
    check_run_name("run.name", config.run.name)
    uri = storage.absolute(config.run.storage_uri, "run.storage_uri")
    folder_uri = storage.join(uri, config.run.name)
    storage.check_reachable(folder_uri, "run.storage_uri")
    check_store(config.run.tracking, embedded_root(config.run.storage_uri))
    _check_identity(config, folder_uri)
    space = parse(config.space)
    _check_space(config, space)
    base = distill.prepare(_base(config, folder_uri))
    _check_population(config, space)
    for values in space.edges():
        _check_values(config, base, values, "space")
    for name, given in config.controls.items():
        check_run_name("controls", name)
        problem, remedy = "no values of a recipe", "Use e.g. {objective.lambda_fm: 0}"
        require(isinstance(given, Mapping), f"controls.{name}", given, problem, remedy)
        _check_values(config, base, given, f"controls.{name}")
    _check_samples(config, base)
    root, teacher = embedded_root(config.run.storage_uri), {"teacher_sha256": base.teacher.sha256}
    speed = latest_metric(config.run.tracking, root, SPEED, distill.JOB, teacher)
    plan = SearchPlan(config, folder_uri, space, base, speed)
    _check_budget(plan)
    return plan


def _check_identity(config: SearchConfig, folder_uri: str) -> None:
    name, kept = config.run.name, storage.join(folder_uri, IDENTITY)
    if not storage.exists(kept):
        problem = "there is no search of this name to go on with"
        require(not config.resume, "run.name", name, problem, "Begin it without --resume")
        return
    problem = "there is a search of this name"
    require(config.resume, "run.name", name, problem, "Add --resume, or use another name")
    lines = difflib.unified_diff(
        storage.read_text(kept).splitlines(),
        identity(config).splitlines(),
        "the search",
        "this command",
        lineterm="",
    )
    found = "\n".join(lines)
    problem = f"it was begun with another configuration:\n{found}\n"
    require(not found, "run.name", name, problem, "Use the same one, or another name")


def _check_space(config: SearchConfig, space: Space) -> None:
    keys = [d.key for d, _ in space.all_dimensions()]
    require(
        bool(keys or space.alternatives), "space", config.space, "nothing varies", "Add a range"
    )
    for key in [*keys, *space.fixed]:
        section, _, rest = key.partition(".")
        problem, remedy = "a search sets it itself", "Remove it"
        if rest in ("ema_sigma_rels", "export_sigma_rel"):
            problem, remedy = "widths need no training of their own", "Use confirm.sigma_rels"
        varied = section not in _NOT_VARIED
        varied &= section != "train" or rest not in _NOT_VARIED_IN_TRAIN
        require(varied, f"space.{key}", "varied", problem, remedy)


def _check_values(
    config: SearchConfig, base: distill.DistillPlan, values: Values, field: str
) -> None:
    try:
        distill.check_fit(varied(config, values), base.teacher, base.manifest)
    except InvalidInputError as error:
        raise error.inside(field) from None


def _check_population(config: SearchConfig, space: Space) -> None:
    """Raise `InvalidInputError` unless all that varies may change on the way."""
    if config.algorithm.kind != PBT:
        return
    problem = "a population learns of its best, which has no values of another alternative"
    remedy = "Vary one of them, or use another algorithm"
    alternatives = [choice.name for choice in space.alternatives]
    require(not alternatives, "space", alternatives, problem, remedy)
    ends = {d.key: d.ends[0] for d in space.dimensions}
    stage = {"from_images": config.stopping.first_images, **ends}
    try:
        varied(config, {"stages": [stage]}).built_stages()
    except InvalidInputError as error:
        raise error.inside("space") from None


def _check_samples(config: SearchConfig, base: distill.DistillPlan) -> None:
    assert base.validation is not None
    features = load_extractor(base.validation.extractor, base.validation.features_uri)
    try:
        check_measure(config.confirm.samples, features, base.manifest)
    except InvalidInputError as error:
        raise error.inside("confirm") from None


def _check_budget(plan: SearchPlan) -> None:
    config, size = plan.config, plan.space.size
    budget = config.budget
    require(
        config.algorithm.kind != GRID or size < math.inf,
        "algorithm.kind",
        GRID,
        "the space has ranges, whose values have no end",
        "Use choice or integer in place of them, or another algorithm",
    )
    require(
        budget.trials is None or budget.trials <= size,
        "budget.trials",
        budget.trials,
        f"the space has {size:g} different ones",
        "Use fewer, or a larger space",
    )
    hours = plan.hours(plan.base.config.train.total_images)
    require(
        budget.hours is None or hours is None or hours <= budget.hours,
        "budget.hours",
        budget.hours,
        f"one trial takes {hours or 0:.3g}",
        "Give more hours, or fewer budget.images",
    )


def _base(config: SearchConfig, folder_uri: str) -> distill.DistillConfig:
    """The recipe as the search runs it."""
    run = replace(
        config.run,
        name="recipe",
        storage_uri=storage.join(folder_uri, "runs"),
        tracking=_tracking(config),
    )
    return replace(varied(config, {}), run=run)


def _tracking(config: SearchConfig) -> TrackingConfig:
    """Of the trials: the search's own."""
    uri = config.run.tracking.resolve(embedded_root(config.run.storage_uri))
    return replace(config.run.tracking, uri=uri)
