"""The process of `test_weights.py` whose memory is measured."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel

from facm_platform.config.sections import RunConfig
from facm_platform.registry import read_artifact
from facm_platform.registry.artifact import write_artifact
from facm_platform.registry.import_wan import ImportWanConfig, ImportWanPlan, prepare
from facm_platform.tracking.store import TrackingConfig
from tests.anonymous import Peak, anonymous_bytes, return_freed_memory
from tests.core.ranks import be_a_rank
from tests.tiny_wan import SIDE, TEXT, write_pipeline

# Two experts of 67 MiB each in float32.
LARGER = {"num_attention_heads": 4, "attention_head_dim": 128, "ffn_dim": 2048, "num_layers": 4}
LARGER |= {"in_channels": 4, "out_channels": 4, "text_dim": 12, "freq_dim": 32}


def one_case(case: dict[str, Any]) -> dict[str, Any]:
    return_freed_memory()
    folder = Path(case["folder"])
    write_pipeline(folder / "small", boundary=0.5)
    parts = ("transformer", "transformer_2")
    shutil.copytree(folder / "small", folder / "large", ignore=shutil.ignore_patterns(*parts))
    for part in parts:
        network = WanTransformer3DModel(**LARGER, rope_max_seq_len=16).to(torch.bfloat16)
        network.save_pretrained(folder / "large" / part, max_shard_size="20MB")
    del network
    imported(planned(folder, "small"), folder)  # imports, pools, threads
    large = planned(folder, "large")
    file = folder / "large-teacher" / "model.safetensors"
    imported_peak = peak(lambda: imported(large, folder))
    read = peak(lambda: read_artifact(str(file.parent)))
    held = peak(lambda: [(name, tensor.float()) for name, tensor in large._weights()])
    return {
        "import": imported_peak,
        "read": read,
        "held": held,
        "weights": file.stat().st_size,
        "tensor": 4 * LARGER["ffn_dim"] * 512,
    }


def planned(folder: Path, name: str) -> ImportWanPlan:
    tracking = TrackingConfig(uri=f"sqlite:///{folder}/mlflow.db")
    config = ImportWanConfig(
        run=RunConfig(name=name, storage_uri=str(folder / "runs"), tracking=tracking),
        source_uri=str(folder / name),
        height=SIDE,
        width=SIDE,
        tokens=TEXT[0],
        output_uri=str(folder / f"{name}-teacher"),
    )
    return prepare(config)


def imported(plan: ImportWanPlan, folder: Path) -> None:
    write_artifact(Path(plan.output_uri), plan._weights(), plan._artifact())
    read_artifact(plan.output_uri)


def peak(work: Callable[[], object]) -> int:
    """Of this process's own memory, above what it had before."""
    gc.collect()
    before = anonymous_bytes()
    with Peak() as most:
        kept = work()  # noqa: F841
    return most.bytes - before


if __name__ == "__main__":
    be_a_rank(one_case)
