"""jobs/sheet.py: pictures, scores against transformers' own, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    PreTrainedTokenizerFast,
)

from facm_core.errors import InvalidInputError
from facm_platform.config import load_config
from facm_platform.config.sections import RunConfig
from facm_platform.evaluation import prompt_sheet
from facm_platform.evaluation.prompt_sheet import ScoreProtocol, SheetConfig, prepare
from facm_platform.evaluation.scores import ScoreConfig, load_scorer
from facm_platform.evaluation.sheet import Column, draw_prompt_sheet
from facm_platform.latents import LatentManifest
from facm_platform.prompts import read_prompts
from facm_platform.registry import load_artifact
from facm_platform.registry.generator import Generator
from facm_platform.tracking import Store, TrackingConfig
from tests.tiny_wan import TextWorld, write_student, write_text_world
from tests.world import World

PROMPTS = ["a red barn in the snow", "two cats asleep", "a lighthouse " * 12]


def write_clip(folder: Path, seed: int = 0) -> None:
    """A tiny random CLIP with its processor."""
    words = sorted({word for prompt in PROMPTS for word in prompt.split()})
    names = ["<pad>", "<unk>", "<start>", "<end>", *words]
    tokenizer = Tokenizer(WordLevel({name: k for k, name in enumerate(names)}, "<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 2), ("<end>", 3)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", bos_token="<start>"
    )
    text = {"vocab_size": len(names), "max_position_embeddings": 12, "eos_token_id": 3}
    small = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    small |= {"num_hidden_layers": 2, "projection_dim": 8}
    vision = {"image_size": 8, "patch_size": 4}
    config = CLIPConfig(text_config=text | small, vision_config=vision | small, projection_dim=8)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        CLIPModel(config).save_pretrained(folder)
    size = {"height": 8, "width": 8}
    images = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size=size)
    CLIPProcessor(images, fast).save_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sheet")
    write_text_world(folder, PROMPTS)
    write_clip(folder / "clip")
    write_clip(folder / "pick", seed=1)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    return folder


def config(folder: Path, root: Path, **changes: Any) -> SheetConfig:
    given = SheetConfig(
        run=RunConfig(
            name="sheet",
            storage_uri=str(root),
            tracking=TrackingConfig(uri=f"sqlite:///{root}/mlflow.db"),
        ),
        student_uri=str(folder / "student"),
        teacher_uri=str(folder / "teacher"),
        prompts_uri=str(folder / "prompts.txt"),
        nfe=(1, 3),
        teacher_steps=5,
        scores=(
            {"kind": "clip", "weights_uri": str(folder / "clip")},
            {"kind": "pickscore", "weights_uri": str(folder / "pick")},
        ),
        batch_size=2,
        seed=4,
    )
    return dataclasses.replace(given, **changes)


def expected(folder: Path, images: torch.Tensor, prompts: list[str]) -> tuple[Any, Any]:
    """Cosines and logits of transformers' own, all pairs at once."""
    model, processor = CLIPModel.from_pretrained(folder), CLIPProcessor.from_pretrained(folder)
    pictures = [Image.fromarray(image[:3].permute(1, 2, 0).numpy(), "RGB") for image in images]
    given = processor(
        text=prompts,
        images=pictures,
        padding=True,
        truncation=True,
        max_length=12,
        return_tensors="pt",
    )
    with torch.no_grad():
        logits = model(**given).logits_per_image.diagonal()
    return logits / model.logit_scale.exp().detach(), logits


def test_scores_are_those_of_transformers(folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (24, 3, 12, 12), generator=generator, dtype=torch.uint8)
    prompts = [PROMPTS[k % 3] for k in range(24)]
    cosines, logits = expected(folder / "clip", images, prompts)
    assert float(cosines.min()) < 0 < float(cosines.max())
    clip = load_scorer(ScoreConfig(kind="clip", weights_uri=str(folder / "clip")))
    pick = load_scorer(ScoreConfig(kind="pickscore", weights_uri=str(folder / "clip")))
    assert clip(list(images), prompts) == pytest.approx((100 * cosines.clamp(0)).tolist(), abs=1e-3)
    assert pick(list(images), prompts) == pytest.approx(logits.tolist(), abs=1e-4)
    assert clip(list(images[:1]), prompts[:1]) == clip(list(images), prompts)[:1]
    grey, rgb = images[:1, :1], images[:1, :1].expand(-1, 3, -1, -1)
    assert clip(list(grey), prompts[:1]) == clip(list(rgb), prompts[:1])
    assert clip.sha256 == pick.sha256


@pytest.mark.usefixtures("ray_cluster")
def test_everything_it_leaves(folder: Path, store: Store, tmp_path: Path) -> None:
    root = tmp_path / "runs"
    plan = prepare(config(folder, root))
    result = plan.execute()
    values = json.loads((root / "sheet" / "sheet.json").read_text())
    assert values["prompts"] == [prompt.strip() for prompt in PROMPTS]
    columns = [(one["model"], one["steps"]) for one in values["columns"]]
    assert columns == [("teacher", 5), ("student", 1), ("student", 3)]

    prompts = values["prompts"]
    for column in values["columns"]:
        generator = Generator.load(str(folder / column["model"]))
        seeds = [4 * 2**32 + row for row in range(3)]
        images = generator.generate(prompts, seeds, column["steps"])
        cosines, _ = expected(folder / "clip", images, prompts)
        scores = (100 * cosines.clamp(0)).tolist()
        assert column["scores"]["clip"]["images"] == pytest.approx(scores, abs=1e-3)
        _, logits = expected(folder / "pick", images, prompts)
        assert column["scores"]["pickscore"]["images"] == pytest.approx(logits.tolist(), abs=1e-4)
        prefix = "teacher_" if column["model"] == "teacher" else ""
        for kind in ("clip", "pickscore"):
            mean = np.mean(column["scores"][kind]["images"])
            assert column["scores"][kind]["mean"] == pytest.approx(mean)
            name = f"{prefix}{kind}_nfe{column['steps']}"
            assert result.metrics[name] == column["scores"][kind]["mean"]

    assert result.run_id is not None
    run = store.client.get_run(result.run_id)
    assert run.data.metrics == pytest.approx(result.metrics)
    assert run.data.tags["facm.clip_protocol_id"] == values["protocols"]["clip"]["id"]
    assert run.data.tags["facm.model_sha256"] == load_artifact(str(folder / "student")).sha256
    files = {file.path for file in store.client.list_artifacts(result.run_id)}
    assert {"sheet.png", "sheet.json"} <= files
    with Image.open(root / "sheet" / "sheet.png") as picture:
        assert picture.width > 3 * 150


def test_a_protocol_is_known_by_all_that_counts() -> None:
    protocol = ScoreProtocol(
        kind="clip",
        weights_sha256="a",
        prompts_sha256="b",
        prompts=16,
        seed=0,
        nfe=(2, 4, 8),
        teacher_steps=40,
    )
    assert protocol.id.startswith("clip-16-")
    changes: list[dict[str, Any]] = [
        {"kind": "pickscore"},
        {"weights_sha256": "c"},
        {"prompts_sha256": "c"},
        {"prompts": 8},
        {"seed": 1},
        {"nfe": (2, 4)},
        {"teacher_steps": None},
    ]
    assert {name for change in changes for name in change} == {
        field.name for field in dataclasses.fields(protocol)
    }
    ids = {dataclasses.replace(protocol, **change).id for change in changes}
    assert len(ids | {protocol.id}) == 1 + len(changes)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"guidance_scale": 1.0}, "4 steps"),
        ({"guidance_scale": 3.0}, "2×4 evaluations"),
        ({"guidance_scale": 3.0, "guidance_low": 0.2, "shift": 1.0}, "7 evaluations in 4 steps"),
    ],
)
def test_how_often_a_teacher_is_asked(folder: Path, changes: dict[str, Any], told: str) -> None:
    teacher = load_artifact(str(folder / "teacher")).config
    assert prompt_sheet.evaluations(dataclasses.replace(teacher, **changes), 4) == told


def test_the_recipe_has_sixteen_prompts() -> None:
    made = load_config(SheetConfig, "prompt_sheet", ["run.name=x", "student_uri=y"])
    assert (made.nfe, made.teacher_steps) == ((2, 4, 8), 40)
    prompts = read_prompts(str(Path(__file__).parents[2] / made.prompts_uri))
    assert len(set(prompts)) == 16
    scores = "scores=[{kind: clip, weights_uri: /w}]"
    one = load_config(SheetConfig, "prompt_sheet", ["run.name=x", "student_uri=y", scores])
    assert one.built_scores() == (ScoreConfig(kind="clip", weights_uri="/w"),)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nfe": ()}, "nfe"),
        ({"teacher_steps": 0}, "teacher_steps = 0: below 1"),
        ({"batch_size": 0}, "batch_size = 0: below 1"),
        ({"seed": -1}, "seed = -1: negative"),
        ({"scores": ("clip",)}, r"scores\.0 = 'clip': no mapping of kind and weights_uri"),
        ({"scores": ({"kind": "clip"},)}, r"scores\.0 = .* no mapping"),
        ({"scores": ({"kind": "x", "weights_uri": ""},)}, r"scores\.0\.kind = 'x'"),
        ({"scores": ({"kind": "clip", "weights_uri": ""},) * 2}, "scores = .* comes twice"),
    ],
)
def test_bad_values_name_their_field(
    folder: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidInputError, match=message):
        config(folder, tmp_path, **changes)


def test_what_is_refused(folder: Path, world: World, store: Store, tmp_path: Path) -> None:
    root = tmp_path / "runs"
    texts = TextWorld(folder, LatentManifest.load(str(folder / "set")))
    write_student(tmp_path / "stranger", texts.manifest, folder / "pipeline", seed=9)
    shutil.copytree(folder / "clip", tmp_path / "clip")
    (tmp_path / "clip" / "model.safetensors").unlink()
    broken = {"kind": "clip", "weights_uri": str(tmp_path / "clip")}
    other = {"kind": "clip", "weights_uri": str(folder / "pipeline" / "text_encoder")}
    for changes, message in (
        ({"student_uri": texts.teacher}, "student_uri = .* it is a teacher"),
        ({"student_uri": world.student}, "student_uri = .* it draws 10 classes, not prompts"),
        ({"student_uri": str(tmp_path / "stranger")}, "teacher_uri = .* student's teacher has"),
        ({"prompts_uri": str(tmp_path / "no.txt")}, "prompts_uri = .* no such file"),
        ({"scores": (broken,)}, r"scores\.0\.weights_uri = .* not a CLIP"),
        ({"scores": (other,)}, r"scores\.0\.weights_uri = .* it is a umt5, not a CLIP"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            prepare(config(folder, root, **changes))
    plan = prepare(config(folder, root, teacher_uri=None, scores=()))
    assert "3 prompts, student in [1, 3] steps" in plan.describe()


def test_pictures_of_all_sizes_and_prompts_of_all_lengths(tmp_path: Path) -> None:
    prompts = ["short", "word " * 200, "x" * 500]
    large = [torch.full((3, 512, 512), value, dtype=torch.uint8) for value in (0, 90, 180)]
    column = Column("teacher", "2×40", "CLIP 1", large, ["1", "2", "3"])
    draw_prompt_sheet(tmp_path / "sheet.png", prompts, [column, column])
    pixels = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert (pixels == 90).all(axis=-1).sum() >= 2 * 256 * 256
    assert pixels.shape[1] < 1000
    # Right of the prompts and left of the pictures there is nothing.
    assert (pixels[70:, 250:266] == 255).all()
    tall = Column("teacher", "", "", [torch.full((3, 40, 20), 90, dtype=torch.uint8)] * 3, [""] * 3)
    draw_prompt_sheet(tmp_path / "tall.png", prompts, [tall])
    pixels = np.asarray(Image.open(tmp_path / "tall.png"))
    assert (pixels == 90).all(axis=-1).sum() == 3 * 40 * 20, "none covers another"
