"""Results of an evaluation, and the texts made of them: table, JSON, model card."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass

from facm_platform.evaluation.protocol import Protocol
from facm_platform.registry import ArtifactConfig
from facm_platform.registry.artifact import OBJECTIVES

SHEET = "samples.png"


@dataclass(frozen=True)
class Score:
    """One model at one number of steps.

    Attributes:
        fid: Fréchet distance to the reference, in the features of the protocol.
        agreement: Share of samples that the extractor sees as the class asked for.
    """

    fid: float
    agreement: float


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
    reference_agreement: float
    sample_sheet: str
    model_name: str | None
    model_version: str | None

    def metrics(self) -> dict[str, float]:
        """Flat names: ``fid_nfe1``, ``agreement_nfe1``; the teacher's with its name before."""
        flat = {"reference_agreement": self.reference_agreement}
        for model, by_steps in self.scores.items():
            prefix = "" if model == "student" else f"{model}_"
            for steps, score in by_steps.items():
                flat[f"{prefix}fid_nfe{steps}"] = score.fid
                flat[f"{prefix}agreement_nfe{steps}"] = score.agreement
        return flat


def as_json(
    protocol: Protocol, scores: Mapping[str, Mapping[int, Score]], reference_agreement: float
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


def as_table(protocol: Protocol, scores: Mapping[str, Mapping[int, Score]]) -> str:
    """Markdown: one row per number of steps, FID and agreement of each model."""
    models = list(scores)
    steps = sorted({steps for by_steps in scores.values() for steps in by_steps})
    head = ["steps"] + [f"{model} {what}" for model in models for what in ("FID", "agreement")]
    lines = [head, ["---:"] * len(head)]
    for count in steps:
        cells = [str(count)]
        for model in models:
            score = scores[model].get(count)
            cells += ["", ""] if score is None else [f"{score.fid:.2f}", f"{score.agreement:.1%}"]
        lines.append(cells)
    table = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    return f"{table}\n\nProtocol `{protocol.id}`.\n"


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
        "config hash": f"`{config.config_hash}`",
    }
    lines = [f"| {name} | {value} |" for name, value in facts.items()]
    return (
        f"# Few-step generator, distilled by {OBJECTIVES[config.objective]}\n\n"
        f"![samples]({SHEET})\n\n"
        f"## Quality\n\n{as_table(protocol, scores)}\n"
        f"FID over {protocol.samples:,} samples with balanced labels, in the features of "
        f"`{protocol.extractor}` (sha256 `{protocol.extractor_sha256[:12]}…`), against every row "
        "of the latent set; agreement is the share of samples that this extractor sees as the "
        "class asked for.\n\n"
        "## Origin\n\n| | |\n|---|---|\n" + "\n".join(lines) + "\n"
    )
