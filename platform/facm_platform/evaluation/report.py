"""Results of an evaluation, and the texts made of them: table, JSON, model card."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from facm_platform.evaluation.measured import Score
from facm_platform.evaluation.protocol import ROWS, Protocol
from facm_platform.registry import ArtifactConfig
from facm_platform.registry.artifact import OBJECTIVES

SHEET = "samples.png"


@dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """What an evaluation found.

    Attributes:
        run_id: MLflow run.
        protocol: Meaning of the numbers.
        scores: By model (``teacher``, ``student``), then by number of steps.
        reference_agreement: Agreement of the reference images with their own labels.
        sample_sheet: Address of the PNG.
        model_name: Registered model, None if nothing was registered.
        model_version: Its new version.
    """

    run_id: str
    protocol: Protocol
    scores: Mapping[str, Mapping[int, Score]]
    reference_agreement: float | None
    sample_sheet: str
    model_name: str | None
    model_version: str | None

    def metrics(self) -> dict[str, float]:
        """Flat names: ``fid_nfe1``, ``fid_nfe1_error``; the teacher's with its name before."""
        flat = {}
        if self.reference_agreement is not None:
            flat["reference_agreement"] = self.reference_agreement
        for model, by_steps in self.scores.items():
            prefix = "" if model == "student" else f"{model}_"
            for steps, score in by_steps.items():
                flat |= {prefix + name: value for name, value in as_metrics(score, steps).items()}
        return flat


def as_metrics(score: Score, steps: int) -> dict[str, float]:
    """``fid_nfe1``, ``fid_nfe1_error``, ``precision_nfe1``, …: of what is known."""
    flat = {}
    for name, value in dataclasses.asdict(score).items():
        what, _, detail = name.partition("_") if name.startswith("fid") else (name, "", "")
        if value is not None:
            flat[f"{what}_nfe{steps}" + (f"_{detail}" if detail else "")] = value
    return flat


def as_json(
    protocol: Protocol,
    scores: Mapping[str, Mapping[int, Score]],
    reference_agreement: float | None,
) -> str:
    """Protocol and scores as JSON text."""
    values = {
        "protocol": {"id": protocol.id, **dataclasses.asdict(protocol)},
        "reference_agreement": reference_agreement,
        **{
            model: {str(steps): dataclasses.asdict(score) for steps, score in by_steps.items()}
            for model, by_steps in scores.items()
        },
    }
    return json.dumps(values, indent=2) + "\n"


_COLUMNS: Mapping[str, Callable[[Score], str]] = {
    "FID": lambda score: f"{score.fid:.2f} ± {score.fid_error:.2f}",
    "FID∞": lambda score: f"{score.fid_infinity:.2f}",
    "sFID": lambda score: _if_known(score.sfid, ".2f"),
    "KID": lambda score: _if_known(score.kid, ".4g"),
    "IS": lambda score: _if_known(score.inception_score, ".2f"),
    "precision": lambda score: _if_known(score.precision, ".3f"),
    "recall": lambda score: _if_known(score.recall, ".3f"),
    "agreement": lambda score: _if_known(score.agreement, ".1%"),
}


def as_table(protocol: Protocol, scores: Mapping[str, Mapping[int, Score]]) -> str:
    """Markdown: a row for each model at each number of steps; columns of what is known."""
    rows = [
        {"model": model, "steps": str(steps), **{name: cell(s) for name, cell in _COLUMNS.items()}}
        for model, by_steps in scores.items()
        for steps, s in by_steps.items()
    ]
    head = [name for name in rows[0] if any(row[name] for row in rows)]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    lines += [[row[name] for name in head] for row in rows]
    table = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    return f"{table}\n\nProtocol `{protocol.id}`.\n"


def _if_known(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def as_card(
    config: ArtifactConfig,
    sha256: str,
    protocol: Protocol,
    scores: Mapping[str, Mapping[int, Score]],
) -> str:
    """Model card of the student, Markdown; the sheet lies beside it."""
    low, high = config.guidance_low, config.guidance_high
    facts = {
        "objective": f"{OBJECTIVES[config.objective]}, {config.conditioning} conditioning",
        "steps recommended": ", ".join(map(str, config.recommended_nfe)),
        "guidance baked in": f"{config.guidance_scale:g} on t in [{low:g}, {high:g}]",
        "images trained on": f"{config.images_seen:,}",
        "EMA σ_rel": f"{config.ema_sigma_rel:g}",
        "weights sha256": f"`{sha256}`",
        "teacher sha256": f"`{config.teacher_sha256}`",
        "latent manifest sha256": f"`{config.latent_manifest_sha256}`",
        "autoencoder": config.autoencoder_id,
        **_of_texts(config),
        "config hash": f"`{config.config_hash}`",
    }
    lines = [f"| {name} | {value} |" for name, value in facts.items()]
    conditioned, agreement = (
        f"with {protocol.label_policy} labels",
        ("; agreement is the share of samples that this extractor sees as the class asked for"),
    )
    if protocol.label_policy == ROWS:
        conditioned, agreement = "of the texts of the latent set", ""
    return (
        f"# Few-step generator, distilled by {OBJECTIVES[config.objective]}\n\n"
        f"![samples]({SHEET})\n\n"
        f"## Quality\n\n{as_table(protocol, scores)}\n"
        f"FID over {protocol.samples:,} samples {conditioned}, in the "
        f"features of `{protocol.extractor}` (sha256 `{protocol.extractor_sha256[:12]}…`), against "
        f"the reference `{protocol.reference_sha256[:12]}…`{agreement}.\n\n"
        "## Origin\n\n| | |\n|---|---|\n" + "\n".join(lines) + "\n"
    )


def _of_texts(config: ArtifactConfig) -> dict[str, str]:
    """What only a model of texts tells."""
    if config.architecture.num_classes:
        return {}
    encoder = f"{config.text_encoder_id} (sha256 `{config.text_encoder_sha256}`)"
    return {
        "text encoder": encoder if config.text_encoder_id else "not known",
        "time shift": f"{config.shift:g}",
    }
