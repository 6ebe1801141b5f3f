"""A real service on loopback: what it draws, what it refuses, and what it survives."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from email.message import Message
from typing import Any

import numpy as np
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from facm_platform.registry.versions import CHAMPION
from tests.serving.conftest import Served
from tests.serving.shop import MODEL


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Message
    content: bytes

    @property
    def detail(self) -> str:
        return str(json.loads(self.content)["detail"])


def call(url: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> Answer:
    request = urllib.request.Request(
        url, body, {"Content-Type": "application/json"} | (headers or {})
    )
    try:
        with urllib.request.urlopen(request, timeout=90) as answer:
            return Answer(answer.status, answer.headers, answer.read())
    except urllib.error.HTTPError as error:
        return Answer(error.code, error.headers, error.read())


def generate(served: Served, **body: Any) -> Answer:
    return call(f"{served.url}/generate", json.dumps(body).encode())


def ask_for(label: int, seed: int, steps: int = 1, **more: Any) -> dict[str, Any]:
    return {"class": label, "seed": seed, "steps": steps} | more


def version_of(served: Served) -> str:
    return str(json.loads(call(f"{served.url}/readyz").content)["version"])


def wait_until(done: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize(("label", "seed", "steps"), [(3, 7, 1), (9, 2**53 - 1, 2), (0, 0, 8)])
def test_it_draws_what_the_model_draws(served: Served, label: int, seed: int, steps: int) -> None:
    answer = generate(served, **ask_for(label, seed, steps))
    assert (answer.status, answer.headers["Content-Type"]) == (200, "image/png")
    assert answer.headers["X-Model-Version"] == "1"
    assert answer.headers["X-Seed"] == str(seed)
    assert answer.content == served.shop.png("1", label, seed, steps)


def test_without_seed_and_steps(served: Served) -> None:
    answer = generate(served, **{"class": 4})
    seed = int(answer.headers["X-Seed"])
    assert answer.headers["X-Steps"] == "1", "the fewest that are recommended"
    assert answer.content == served.shop.png("1", 4, seed)
    assert int(generate(served, **{"class": 4}).headers["X-Seed"]) != seed


def test_several_images_in_every_format(served: Served) -> None:
    expected = [served.shop.pixels("1", 5, seed, steps=2) for seed in (40, 41, 42)]
    asked = ask_for(5, 40, 2, count=3)

    several = json.loads(generate(served, **asked).content)
    assert several["seeds"] == [40, 41, 42]
    assert (several["model"], several["version"], several["steps"]) == (MODEL, "1", 2)
    pictures = [base64.b64decode(png) for png in several["png"]]
    assert pictures == [served.shop.png("1", 5, seed, steps=2) for seed in (40, 41, 42)]

    answer = generate(served, **asked, format="npy")
    assert answer.headers["Content-Type"] == "application/x-npy"
    array = np.load(io.BytesIO(answer.content), allow_pickle=False)
    assert array.dtype == np.uint8
    assert np.array_equal(array, np.stack(expected)[..., None])

    listed = json.loads(generate(served, **asked, format="json").content)
    assert np.array_equal(np.array(listed["images"])[..., 0], np.stack(expected))


def test_a_seed_is_the_same_whatever_it_was_batched_with(served: Served) -> None:
    """Requests of all sizes and steps at once; each as if it had been the only one."""
    random = np.random.default_rng(0)
    asked = [
        ask_for(int(random.integers(10)), 1000 + i, int(random.integers(1, 4))) for i in range(60)
    ]
    for i in range(0, 60, 3):
        asked[i] = ask_for(2, 77, 2, count=1 + i % 5)
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda body: generate(served, **body), asked))
    for body, answer in zip(asked, answers, strict=True):
        assert answer.status == 200
        if body.get("count", 1) == 1:
            first = answer.content
        else:
            first = base64.b64decode(json.loads(answer.content)["png"][0])
        assert first == served.shop.png("1", body["class"], body["seed"], body["steps"])


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ('{"class": 10}', "class: the model has 10 classes. Use 0 to 9"),
        ('{"class": 1e30}', "class: the model has 10 classes"),
        ('{"class": -1}', "class: Input should be greater"),
        ('{"class": "3"}', "class: Input should be a valid integer"),
        ('{"class": true}', "class: Input should be a valid integer"),
        ('{"class": null}', "class: Input should be a valid integer"),
        ('{"class": NaN}', "class: Input should be a valid integer"),
        ('{"class": ' + "9" * 5000 + "}", ""),
        ("{}", "class: Field required"),
        ('{"prompt": "a cat"}', "prompt: this model draws classes and knows no text"),
        ('{"class": 1, "prompt": "a cat"}', "prompt: this model draws classes"),
        ('{"class": 1, "steps": 0}', "steps: Input should be greater"),
        ('{"class": 1, "steps": 9}', "steps: Input should be less than or equal to 8"),
        ('{"class": 1, "steps": 1.5}', "steps: Input should be a valid integer"),
        ('{"class": 1, "seed": -1}', "seed: Input should be greater"),
        ('{"class": 1, "seed": 9007199254740992}', "seed: Input should be less"),
        ('{"class": 1, "seed": "x"}', "seed: Input should be a valid integer"),
        ('{"class": 1, "count": 0}', "count: Input should be greater"),
        ('{"class": 1, "count": 9}', "count: Input should be less than or equal to 8"),
        ('{"class": 1, "count": 1e400}', "count: Input should be a valid integer"),
        ('{"class": 1, "format": "gif"}', "format: Input should be 'png', 'npy' or 'json'"),
        ('{"class": 1, "size": 512}', "size: Extra inputs are not permitted"),
        ('{"class": 1, "\\ud800": 1}', ""),
        ('{"class": 1', "not JSON, at character 11"),
        ("", ""),
        ("[]", ""),
        ("null", ""),
        ("[" * 10_000, ""),
        (b"\xff\xfe\x00", ""),
    ],
)
def test_what_cannot_be_drawn_is_explained(served: Served, body: str | bytes, message: str) -> None:
    content = body if isinstance(body, bytes) else body.encode()
    answer = call(f"{served.url}/generate", content)
    assert 400 <= answer.status < 500, answer
    assert answer.detail
    assert message in answer.detail


def test_only_json_is_read(served: Served) -> None:
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    assert call(f"{served.url}/generate", b'{"class": 1}', form).status == 422
    assert call(f"{served.url}/generate").status == 405
    assert call(f"{served.url}/elsewhere").status == 404


def test_long_requests_are_not_read(served: Served) -> None:
    long = b'{"class": 1' + b" " * 20_000 + b"}"
    answer = call(f"{served.url}/generate", long)
    assert (answer.status, answer.detail) == (413, "the request is longer than 16,384 bytes")

    class Chunks:
        """Of no length that could be told."""

        def __iter__(self) -> Iterator[bytes]:
            yield from (long[start : start + 999] for start in range(0, len(long), 999))

    request = urllib.request.Request(
        f"{served.url}/generate",
        Chunks(),  # type: ignore[arg-type]
        {"Content-Type": "application/json", "Transfer-Encoding": "chunked"},
    )
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=60)
    assert caught.value.code == 413


def test_a_full_service_says_so(served: Served) -> None:
    """More at once than may wait: some are told to come again, the others are served right."""
    body = ask_for(1, 5, 8, count=8)
    with ThreadPoolExecutor(128) as pool:
        answers = list(pool.map(lambda _: generate(served, **body), range(256)))
    statuses = Counter(answer.status for answer in answers)
    assert set(statuses) == {200, 429}, statuses
    expected = served.shop.png("1", 1, 5, 8)
    for answer in answers:
        if answer.status == 429:
            assert answer.headers["Retry-After"] == "1"
            assert "too many requests are waiting" in answer.detail
        else:
            assert base64.b64decode(json.loads(answer.content)["png"][0]) == expected
    assert generate(served, **body).status == 200, "and then has room again"


def test_what_it_tells_of_itself(served: Served) -> None:
    assert json.loads(call(f"{served.url}/healthz").content)["status"] == "ok"
    assert json.loads(call(f"{served.url}/readyz").content) == {"status": "ready", "version": "1"}
    model = json.loads(call(f"{served.url}/model").content)
    assert (model["model"], model["version"], model["classes"]) == (MODEL, "1", 10)
    assert (model["takes"], model["max_prompt"]) == ("class", None)
    assert (model["image_shape"], model["max_count"], model["max_steps"]) == ([1, 8, 8], 8, 8)
    assert model["sha256"] == served.shop.versions["1"].tags["model_sha256"]
    page = call(f"{served.url}/")
    assert page.headers["Content-Type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["Content-Security-Policy"]
    assert b"http" not in page.content.replace(b"http-equiv", b""), (
        "it loads nothing from elsewhere"
    )
    schema = json.loads(call(f"{served.url}/openapi.json").content)
    properties = schema["components"]["schemas"]["GenerateRequest"]["properties"]
    assert properties["class"]["maximum"] == 9
    assert "prompt" not in properties
    assert schema["components"]["schemas"]["GenerateRequest"]["required"] == ["class"]
    assert properties["count"]["maximum"] == 8


def metric(served: Served, name: str, **labels: str) -> float:
    """Sum over processes."""
    text = call(f"{served.url}/metrics").content.decode()
    return sum(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )


def test_metrics_count_images_and_batches(served: Served) -> None:
    generate(served, **ask_for(1, 1, count=8))
    generate(served, **{"class": 77})
    # Ray collects them every few seconds.
    wait_until(lambda: metric(served, "ray_facm_images_total", version="1") >= 8)
    wait_until(lambda: metric(served, "ray_facm_requests_total", status="422") >= 1)
    wait_until(lambda: metric(served, "ray_facm_request_seconds_count") >= 2)
    wait_until(lambda: metric(served, "ray_facm_batch_images_count") >= 1)
    wait_until(lambda: metric(served, "ray_facm_version") == 1)


@contextmanager
def asking(
    served: Served, clients: int = 8, seeds: int = 10**6, **more: Any
) -> Iterator[list[tuple[dict[str, Any], Answer]]]:
    """Keep asking, from several threads; gives what was asked and answered until the end."""
    seen: list[tuple[dict[str, Any], Answer]] = []
    over = threading.Event()

    def client(number: int) -> None:
        seed = number * 10_000
        while not over.is_set():
            body = ask_for(seed % 10, seed % seeds, **more)
            seen.append((body, generate(served, **body)))
            seed += 1

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield seen
    finally:
        over.set()
        for thread in threads:
            thread.join()


def check(served: Served, seen: list[tuple[dict[str, Any], Answer]]) -> Counter[str]:
    """Every answer is the picture of the version that it names; how many each has drawn."""
    for body, answer in seen:
        version = answer.headers["X-Model-Version"]
        assert answer.status == 200, answer
        assert answer.content == served.shop.png(version, body["class"], body["seed"])
    return Counter(answer.headers["X-Model-Version"] for _, answer in seen)


def test_the_alias_moves_and_no_request_notices(served: Served) -> None:
    shop = served.shop
    first, second = shop.versions["1"], shop.versions["2"]
    damaged = shop.register(seed=3)
    weights = shop.weights(damaged.number)
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    try:
        with asking(served) as seen:
            wait_until(lambda: len(seen) > 20)
            shop.promote(second)
            wait_until(lambda: version_of(served) == "2")
            weights.write_bytes(content)
            shop.promote(damaged)
            time.sleep(2)
            assert version_of(served) == "2", "a damaged version is not served"
            shop.store.client.delete_registered_model_alias(MODEL, CHAMPION)
            time.sleep(1)
            assert version_of(served) == "2", "nor none"
            shop.promote(first)
            wait_until(lambda: version_of(served) == "1", seconds=120)
        drawn = check(served, seen)
        assert set(drawn) == {"1", "2"}
    finally:
        shop.promote(first)


def test_a_replica_dies_and_no_request_notices(served: Served) -> None:
    (replica,) = [p for p in psutil.process_iter(["name", "cmdline"]) if is_replica(p)]
    # Requests that take long, so that it dies with some on its hands.
    with asking(served, clients=12, seeds=10, steps=8, count=8) as seen:
        wait_until(lambda: len(seen) > 20)
        before = len(seen)
        os.kill(replica.pid, signal.SIGKILL)
        wait_until(lambda: len(seen) > before + 40, seconds=120)
    expected = {seed: served.shop.pngs("1", seed, seed, 8, 8) for seed in range(10)}
    for body, answer in seen:
        assert answer.status == 200, answer
        pictures = [base64.b64decode(png) for png in json.loads(answer.content)["png"]]
        assert pictures == expected[body["seed"]]


def is_replica(process: psutil.Process) -> bool:
    """Of this test's cluster: another may run beside it."""
    command = " ".join(process.info["cmdline"] or ())
    if "ServeReplica:facm:model" not in command:
        return False
    return os.getpid() in [parent.pid for parent in process.parents()]
