"""What a FACM step costs on a machine of the cluster, kept in MLflow."""

from __future__ import annotations

from dataclasses import dataclass, field

import ray

from facm_core.benchmark import BenchmarkConfig, Report, run
from facm_core.errors import require
from facm_core.models.lightning_dit import preset_config
from facm_platform.cluster import connected, require_cpus
from facm_platform.config import JobResult
from facm_platform.config.sections import RunConfig
from facm_platform.tracking import (
    check_run_name,
    check_store,
    connect_store,
    embedded_root,
    open_run,
)


@dataclass(frozen=True, kw_only=True)
class BenchmarkJobConfig:
    """Recipe of jobs/benchmark.py.

    Attributes:
        run: Name and place of the MLflow run; nothing is written to `storage_uri`.
        benchmark: What is measured.
        cpus: CPUs of the machine that are set aside for it.
    """

    run: RunConfig
    benchmark: BenchmarkConfig = field(default_factory=BenchmarkConfig)
    cpus: int = 1

    def __post_init__(self) -> None:
        require(self.cpus >= 1, "cpus", self.cpus, "below 1", "Use a whole number from 1")


@dataclass(frozen=True)
class BenchmarkPlan:
    """A validated benchmark."""

    config: BenchmarkJobConfig

    def describe(self) -> str:
        """What would be measured."""
        benchmark = self.config.benchmark
        modes = ", ".join((["baseline"] if benchmark.baseline else []) + list(benchmark.modes))
        return (
            f"benchmark {self.config.run.name}: {benchmark.preset} {benchmark.architecture}, "
            f"batch {benchmark.batch_size}, {benchmark.dtype} on {benchmark.device}: {modes}"
        )

    def execute(self) -> JobResult:
        """Measure on the cluster, print the table, keep table, report and numbers."""
        config = self.config
        store = connect_store(config.run.tracking, embedded_root(config.run.storage_uri))
        tracked = open_run(store, config.run.name, job="benchmark", config=config)
        gpus = 1 if config.benchmark.device == "cuda" else 0
        with tracked, connected():
            require_cpus("cpus", config.cpus, spare=0)
            measure = ray.remote(num_cpus=config.cpus, num_gpus=gpus)(run)
            report: Report = ray.get(measure.remote(config.benchmark))
            print(report.table())
            tracked.log_text(report.table(), "benchmark.txt")
            tracked.log_text(report.to_json(), "benchmark.json")
            metrics = report.metrics()
            tracked.log_metrics(metrics, images_seen=0)
        return JobResult(
            run_id=tracked.run_id,
            run_name=config.run.name,
            artifact_uri=tracked.artifact_uri,
            metrics=metrics,
        )


def prepare(config: BenchmarkJobConfig) -> BenchmarkPlan:
    """Validate a benchmark without touching a cluster.

    Raises:
        InvalidInputError: an unknown preset or field, a bad run name, MLflow out of reach.
    """
    preset_config(config.benchmark.preset, **config.benchmark.architecture)
    check_run_name("run.name", config.run.name)
    check_store(config.run.tracking, embedded_root(config.run.storage_uri))
    return BenchmarkPlan(config)
