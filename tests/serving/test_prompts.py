"""A service of a model that takes prompts."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from schemathesis import GenerationMode

from facm_core.errors import InvalidInputError
from facm_platform.serving import ServeConfig, prepare
from facm_platform.serving.config import BatchingConfig, LimitsConfig
from facm_platform.serving.load import Body, LoadConfig, ask
from facm_platform.serving.load import prepare as prepare_load
from facm_platform.tracking import TrackingConfig, connect_store
from tests.conftest import free_port
from tests.serving.test_fuzz import fuzz
from tests.serving.test_service import Answer, call
from tests.serving.text_shop import MODEL, PROMPTS, TextShop, open_text_shop

LONGEST = 300


@dataclass(frozen=True)
class ServedTexts:
    """A service, and what it serves."""

    url: str
    shop: TextShop


@pytest.fixture(scope="module")
def texts(
    tmp_path_factory: pytest.TempPathFactory, empty_database: Path, ray_cluster: None
) -> Iterator[ServedTexts]:
    root = tmp_path_factory.mktemp("texts")
    shutil.copy(empty_database, root / "mlflow.db")
    store = connect_store(TrackingConfig(uri=f"sqlite:///{root / 'mlflow.db'}"), root)
    shop = open_text_shop(store, root)
    plan = prepare(
        ServeConfig(
            model=MODEL,
            port=free_port(),
            tracking=TrackingConfig(uri=store.uri),
            limits=LimitsConfig(count=8, prompt=LONGEST),
            batching=BatchingConfig(images=16),
        )
    )
    assert "by prompt of up to 300 characters" in plan.describe()
    with plan.running():
        yield ServedTexts(plan.address, shop)


def generate(texts: ServedTexts, **body: Any) -> Answer:
    return call(f"{texts.url}/generate", json.dumps(body).encode())


def test_it_draws_what_the_generator_draws(texts: ServedTexts) -> None:
    for prompt in (*PROMPTS, "\N{CAT}" * LONGEST):
        answer = generate(texts, prompt=prompt, seed=7, steps=3)
        assert (answer.status, answer.headers["Content-Type"]) == (200, "image/png"), answer.detail
        assert answer.content == texts.shop.png(prompt, 7, steps=3)
    several = json.loads(generate(texts, prompt=PROMPTS[0], seed=40, count=3).content)
    assert several["steps"] == 2, "the fewest that are recommended"
    pictures = [base64.b64decode(png) for png in several["png"]]
    assert pictures == [texts.shop.png(PROMPTS[0], seed) for seed in (40, 41, 42)]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("{}", "prompt: Field required. Say what to draw."),
        ('{"class": 3}', "class: this model draws prompts and knows no classes. Give prompt"),
        ('{"class": 3, "prompt": "a cat"}', "class: this model draws prompts"),
        ('{"prompt": null}', "prompt: Input should be a valid string"),
        ('{"prompt": 3}', "prompt: Input should be a valid string"),
        ('{"prompt": ["a"]}', "prompt: Input should be a valid string"),
        ('{"prompt": ""}', "prompt: String should have at least 1 character"),
        ('{"prompt": " \\n "}', "prompt: String should match pattern"),
        ('{"prompt": "\\u001f"}', "prompt: empty"),
        ('{"prompt": "\\ud800"}', "prompt: "),
        (json.dumps({"prompt": "x" * 301}), "prompt: String should have at most 300 characters"),
        ('{"prompt": "a", "steps": 9}', "steps: Input should be less than or equal to 8"),
    ],
)
def test_what_cannot_be_drawn_is_explained(texts: ServedTexts, body: str, message: str) -> None:
    answer = call(f"{texts.url}/generate", body.encode())
    assert answer.status == 422, answer
    assert message in answer.detail


def test_what_it_tells_of_itself(texts: ServedTexts) -> None:
    model = json.loads(call(f"{texts.url}/model").content)
    assert (model["takes"], model["classes"], model["max_prompt"]) == ("prompt", None, LONGEST)
    schema = json.loads(call(f"{texts.url}/openapi.json").content)
    request = schema["components"]["schemas"]["GenerateRequest"]
    assert request["required"] == ["prompt"]
    assert "class" not in request["properties"]
    prompt = request["properties"]["prompt"]
    assert (prompt["minLength"], prompt["maxLength"]) == (1, LONGEST)
    assert "default" not in prompt
    assert b'<textarea name="prompt"' in call(f"{texts.url}/").content


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_requests_of_any_kind(texts: ServedTexts, mode: GenerationMode) -> None:
    fuzz(f"{texts.url}/openapi.json", mode)


def test_load_by_prompt(texts: ServedTexts, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text(f"{PROMPTS[0]}\n  {PROMPTS[2]}  \n", encoding="utf-8")
    given = LoadConfig(url=texts.url, prompts_uri=str(file), requests=8, connections=4, seed=5)
    plan = prepare_load(given)
    assert "2 prompts" in plan.describe()
    seen: list[Body] = []

    def judge(body: Body, answer: aiohttp.ClientResponse, content: bytes) -> None:
        assert content == texts.shop.png(body["prompt"], body["seed"])
        seen.append(body)

    load = asyncio.run(ask(plan.config, plan.subjects, judge))
    assert load.statuses == {200: 8}
    asked = {(body["prompt"], body["seed"]) for body in seen}
    assert asked == {(PROMPTS[(0, 2)[i % 2]], 5 + i) for i in range(8)}
    with pytest.raises(InvalidInputError, match=r"prompts_uri = None: the model takes a prompt"):
        prepare_load(LoadConfig(url=texts.url))
