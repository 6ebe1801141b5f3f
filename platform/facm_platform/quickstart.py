"""The whole way on real images in minutes: encode, pretrain, distill, evaluate, register."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from facm_platform import storage
from facm_platform.cluster import connected
from facm_platform.config import JobResult, find_recipe, load_config
from facm_platform.evaluation import evaluate, fit
from facm_platform.evaluation.report import EvaluationResult, as_table
from facm_platform.latents import encode
from facm_platform.registry.versions import CHALLENGER
from facm_platform.training import distill, pretrain

C = TypeVar("C")

_STEPS = ("encode", "features", "pretrain", "distill", "evaluate")


@dataclass(frozen=True, kw_only=True)
class QuickstartConfig:
    """What `jobs/quickstart.py` takes.

    Attributes:
        recipes: Prefix of the five recipes, ``{recipes}_encode`` to ``{recipes}_evaluate``.
    """

    recipes: str = "digits"


@dataclass(frozen=True)
class QuickstartPlan:
    """The five jobs in a row; each is validated when what it reads is there."""

    config: QuickstartConfig

    def describe(self) -> str:
        """The recipes that would run."""
        return "quickstart: " + ", ".join(f"{self.config.recipes}_{step}" for step in _STEPS)

    def execute(self) -> JobResult:
        """Run them; the evaluation's result, with ``summary.json`` beside its sample sheet."""
        started = time.monotonic()
        with connected():  # one cluster for all five
            jobs = {
                "encode": self._step("encode", encode.EncodeConfig, encode.prepare),
                "features": self._step("features", fit.FeaturesConfig, fit.prepare),
                "pretrain": self._step("pretrain", pretrain.PretrainConfig, pretrain.prepare),
                "distill": self._step("distill", distill.DistillConfig, distill.prepare),
            }
            plan = evaluate.prepare(self._config("evaluate", evaluate.EvaluateConfig))
            print(f"\n{plan.describe()}", flush=True)
            result = plan.evaluate()
        run_ids = {step: job.run_id for step, job in jobs.items()} | {"evaluate": result.run_id}
        summary = _summary(result, run_ids, time.monotonic() - started)
        summary_uri = storage.join(plan.folder_uri, "summary.json")
        storage.write_bytes(summary_uri, (json.dumps(summary, indent=2) + "\n").encode())
        print(_report(result, summary_uri, summary["seconds"]), flush=True)
        return JobResult(
            run_id=result.run_id,
            run_name=plan.config.run.name,
            artifact_uri=plan.folder_uri,
            metrics=result.metrics(),
        )

    def _config(self, step: str, schema: type[C]) -> C:
        return load_config(schema, f"{self.config.recipes}_{step}")

    def _step(self, step: str, schema: type[C], prepare: Callable[[C], Any]) -> JobResult:
        plan = prepare(self._config(step, schema))
        print(f"\n{plan.describe()}", flush=True)
        result: JobResult = plan.execute()
        return result


def prepare(config: QuickstartConfig) -> QuickstartPlan:
    """Find the recipes.

    Raises:
        InvalidInputError: one of them does not exist.
    """
    for step in _STEPS:
        find_recipe(f"{config.recipes}_{step}")
    return QuickstartPlan(config)


def _summary(
    result: EvaluationResult, run_ids: dict[str, str | None], seconds: float
) -> dict[str, Any]:
    scores = {
        model: {str(steps): asdict(score) for steps, score in by_steps.items()}
        for model, by_steps in result.scores.items()
    }
    return {
        "seconds": round(seconds, 1),
        "protocol": result.protocol.id,
        **scores,
        "sample_sheet": result.sample_sheet,
        "model": {
            "name": result.model_name,
            "version": result.model_version,
            "alias": CHALLENGER,
        },
        "run_ids": run_ids,
    }


def _report(result: EvaluationResult, summary_uri: str, seconds: float) -> str:
    return f"""
{as_table(result.protocol, result.scores)}
real images: agreement {result.reference_agreement:.1%}

samples     {result.sample_sheet}
summary     {summary_uri}
model       {result.model_name} version {result.model_version}, alias {CHALLENGER}
promote it  .venv/bin/python jobs/promote.py model={result.model_name}
all runs    make ui   (MLflow on http://127.0.0.1:5000, under "Model training")
done in {seconds / 60:.1f} minutes
"""
