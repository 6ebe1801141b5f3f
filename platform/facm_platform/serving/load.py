"""Load on a service, from a process of its own: how many images a second, and how long each takes.

The seed of request i is ``seed + i · count``, so that two loads ask for the same images.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import numpy as np

from facm_core.errors import InvalidInputError, require
from facm_platform.config import JobResult, Refused
from facm_platform.prompts import read_prompts
from facm_platform.serving.plan import TOKEN_VARIABLE

_TRY_AGAIN = (429, 503)
_SECONDS = 120.0

Body = dict[str, Any]
Judge = Callable[[Body, aiohttp.ClientResponse, bytes], None]


@dataclass(frozen=True, kw_only=True)
class LoadConfig:
    """What to ask of which service.

    Attributes:
        url: Its address.
        prompts_uri: UTF-8 file of prompts, one a line, for a model that takes them: request i asks
            for prompt i modulo them. A model of classes is asked for class after class.
        requests: How many.
        connections: Requests under way at a time; 1 asks for one after the other.
        count: Images of each.
        steps: Of each; None for the service's own.
        seed: Of the first image.
    """

    url: str = "http://127.0.0.1:8000"
    prompts_uri: str | None = None
    requests: int = 1000
    connections: int = 64
    count: int = 1
    steps: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("requests", "connections", "count"):
            value = getattr(self, name)
            require(value >= 1, name, value, "below 1", "Use a whole number from 1")
        require(self.seed >= 0, "seed", self.seed, "negative", "Use a whole number from 0")


@dataclass
class Load:
    """What was seen.

    Attributes:
        latencies: Seconds from the first attempt to the answer, of each request.
        statuses: How often each came, those of repeated attempts too.
        seconds: From the first request to the last answer.
    """

    latencies: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    seconds: float = 0.0

    def metrics(self, count: int) -> dict[str, float]:
        """As a job tells them; `count` images a request."""
        p50, p99 = np.percentile(self.latencies, [50, 99]) if self.latencies else (np.nan, np.nan)
        return {
            "images_per_second": len(self.latencies) * count / self.seconds,
            "latency_p50_seconds": float(p50),
            "latency_p99_seconds": float(p99),
            **{f"status_{status}": times for status, times in sorted(self.statuses.items())},
        }


@dataclass(frozen=True)
class LoadPlan:
    """A service that answers, and what to ask of it."""

    config: LoadConfig
    model: str
    version: str
    subjects: tuple[Body, ...]

    def describe(self) -> str:
        """What would be asked."""
        config = self.config
        taken = "classes" if config.prompts_uri is None else "prompts"
        return (
            f"ask {config.url} ({self.model} version {self.version}, {len(self.subjects)} {taken}) "
            f"{config.requests:,} times for {config.count} images, over {config.connections} "
            "connections"
        )

    def execute(self) -> JobResult:
        """Ask, and tell.

        Raises:
            Refused: a request was answered with an error.
        """
        print(self.describe(), flush=True)
        load = asyncio.run(ask(self.config, self.subjects))
        metrics = load.metrics(self.config.count)
        print(
            f"{metrics['images_per_second']:.1f} images/s, half within "
            f"{metrics['latency_p50_seconds']:.3f} s, 99 % within "
            f"{metrics['latency_p99_seconds']:.3f} s",
            flush=True,
        )
        result = JobResult(
            run_id=None, run_name=self.model, artifact_uri=self.config.url, metrics=metrics
        )
        failed = {s: n for s, n in load.statuses.items() if s != 200 and s not in _TRY_AGAIN}
        if failed:
            raise Refused(f"answers that are errors, by status: {failed}", result)
        return result


def prepare(config: LoadConfig) -> LoadPlan:
    """Ask the service what it serves.

    Raises:
        InvalidInputError: nothing of the kind answers, or it takes prompts and there are none, or
            the other way round.
    """

    async def look() -> Any:
        async with _session() as session, session.get(f"{config.url}/model") as answer:
            answer.raise_for_status()
            return await answer.json()

    try:
        model = asyncio.run(look())
    except (aiohttp.ClientError, TimeoutError) as error:
        problem = f"no service answers there ({error})"
        remedy = f"Start one with jobs/serve.py; its token, if any, in {TOKEN_VARIABLE}"
        raise InvalidInputError("url", config.url, problem, remedy) from error
    return LoadPlan(config, model["model"], model["version"], _subjects(config, model))


def _subjects(config: LoadConfig, model: Body) -> tuple[Body, ...]:
    takes, uri = model["takes"], config.prompts_uri
    needed = takes == "prompt"
    remedy = "Give a file of prompts" if needed else "Leave it away"
    require((uri is not None) == needed, "prompts_uri", uri, f"the model takes a {takes}", remedy)
    if uri is None:
        return tuple({"class": label} for label in range(model["classes"]))
    return tuple({"prompt": prompt} for prompt in read_prompts(uri))


async def ask(
    config: LoadConfig,
    subjects: Sequence[Body],
    judge: Judge | None = None,
    reached: Callable[[int], Awaitable[None]] | None = None,
) -> Load:
    """Make the requests.

    Args:
        config: Which.
        subjects: Classes or prompts; request i asks for number i modulo them.
        judge: Sees every request that was served, with its answer.
        reached: Called with every number of requests that were made so far.
    """
    load = Load()
    numbers = iter(range(config.requests))

    async def client(session: aiohttp.ClientSession) -> None:
        for number in numbers:
            if reached is not None:
                await reached(number)
            body = {**subjects[number % len(subjects)], "count": config.count}
            body |= {"seed": config.seed + number * config.count, "steps": config.steps}
            begin = time.perf_counter()
            answer, content = await _ask_until_served(session, config.url, body, load)
            if answer.status == 200:
                load.latencies.append(time.perf_counter() - begin)
                if judge is not None:
                    judge(body, answer, content)

    begin = time.perf_counter()
    async with _session(config.connections) as session:
        await asyncio.gather(*(client(session) for _ in range(config.connections)))
    load.seconds = time.perf_counter() - begin
    return load


async def _ask_until_served(
    session: aiohttp.ClientSession, url: str, body: Body, load: Load
) -> tuple[aiohttp.ClientResponse, bytes]:
    """Once, or again while the service says that it is full."""
    while True:
        async with session.post(f"{url}/generate", json=body) as answer:
            content = await answer.read()
        load.statuses[answer.status] += 1
        if answer.status not in _TRY_AGAIN:
            return answer, content
        await asyncio.sleep(float(answer.headers.get("Retry-After", 1)))


def _session(connections: int = 1) -> aiohttp.ClientSession:
    token = os.environ.get(TOKEN_VARIABLE)
    return aiohttp.ClientSession(
        headers={"Authorization": f"Bearer {token}"} if token else {},
        connector=aiohttp.TCPConnector(limit=connections),
        timeout=aiohttp.ClientTimeout(total=_SECONDS),
    )
