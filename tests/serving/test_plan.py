"""What is refused before a service starts, who may use it."""

from __future__ import annotations

import hashlib
import io
import socket
from typing import Any

import numpy as np
import pytest
from PIL import Image
from prometheus_client import CollectorRegistry, Counter, Histogram, start_http_server
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from facm_core.errors import InvalidInputError
from facm_platform.config import Refused
from facm_platform.serving import ServeConfig, prepare
from facm_platform.serving.config import BatchingConfig, LimitsConfig, ReplicasConfig
from facm_platform.serving.contract import encode_png
from facm_platform.serving.load import LoadConfig
from facm_platform.serving.load import prepare as prepare_load
from facm_platform.serving.plan import TOKEN_VARIABLE
from facm_platform.serving.prometheus import cluster_metrics
from facm_platform.serving.service import build_app
from facm_platform.tracking import TrackingConfig
from tests.conftest import free_port
from tests.serving.shop import MODEL, Shop


def config(shop: Shop, **changes: Any) -> ServeConfig:
    given = {"model": MODEL, "port": free_port(), "tracking": TrackingConfig(uri=shop.store.uri)}
    return ServeConfig(**(given | changes))


def test_what_would_be_served(shop: Shop) -> None:
    described = prepare(config(shop, replicas=ReplicasConfig(number=3))).describe()
    assert "serve digits version 1 (champion, sha256" in described
    assert "3 replicas with 1 CPUs each" in described
    assert "bearer token: none" in described


def test_what_cannot_be_served(shop: Shop) -> None:
    with pytest.raises(Refused, match="has no nobody in sqlite"):
        prepare(config(shop, alias="nobody"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(InvalidInputError, match="nothing can listen there"):
            prepare(config(shop, port=taken.getsockname()[1]))
    broken = shop.register(seed=9)
    shop.store.client.set_registered_model_alias(MODEL, "broken", broken.number)
    weights = shop.weights(broken.number)
    kept = weights.read_bytes()
    weights.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    with pytest.raises(Refused, match=r"version 3 is not served: .*damaged"):
        prepare(config(shop, alias="broken"))
    weights.write_bytes(kept)
    name = "facm.model_sha256"
    shop.store.client.set_model_version_tag(MODEL, broken.number, name, "0" * 64)
    with pytest.raises(Refused, match="not the one evaluated"):
        prepare(config(shop, alias="broken"))


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: ServeConfig(model="a/b"), "model"),
        (lambda: ServeConfig(model="a", alias=""), "alias"),
        (lambda: ServeConfig(model="a", poll_seconds=0), "poll_seconds"),
        (lambda: ServeConfig(model="a", port=70_000), "port"),
        (lambda: ServeConfig(model="a", batching=BatchingConfig(images=8)), "limits.count"),
        (lambda: LimitsConfig(count=0), "count"),
        (lambda: LimitsConfig(seconds=-1), "seconds"),
        (lambda: LimitsConfig(prompt=0), "prompt"),
        (lambda: LimitsConfig(body_bytes=1000), "prompt"),
        (lambda: BatchingConfig(images=0), "images"),
        (lambda: BatchingConfig(wait_seconds=-1), "wait_seconds"),
        (lambda: ReplicasConfig(number=0), "number"),
        (lambda: ReplicasConfig(cpus=0), "cpus"),
        (lambda: LoadConfig(connections=0), "connections"),
        (lambda: LoadConfig(seed=-1), "seed"),
    ],
)
def test_bad_values_name_their_field(make: Any, field: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        make()
    assert caught.value.field == field


def test_an_empty_token_is_no_token(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, " ")
    with pytest.raises(InvalidInputError, match="empty"):
        prepare(config(shop))
    monkeypatch.setenv(TOKEN_VARIABLE, "secret")
    plan = prepare(config(shop))
    assert plan.token_sha256 == hashlib.sha256(b"secret").digest()
    assert "secret" not in plan.describe() + repr(plan)


def test_without_the_token_nothing_is_drawn(shop: Shop) -> None:
    """A stranger gets past no route that draws or tells; health and the page are for everybody."""
    asked: list[str] = []

    class Nobody:
        async def draw(self, order: Any) -> None:
            asked.append("draw")
            raise TimeoutError

        async def describe(self) -> None:
            asked.append("describe")
            raise TimeoutError

        def count(self, status: int, seconds: float) -> None: ...

    app = build_app(Nobody(), config(shop), hashlib.sha256(b"secret").digest())  # type: ignore[arg-type]
    client = TestClient(app)
    for given in (None, "Bearer ", "Bearer wrong", "Bearer secre", "Basic secret", "Bearer é"):
        headers = {} if given is None else {"Authorization": given.encode()}
        for method, path in (("POST", "/generate"), ("GET", "/model"), ("GET", "/metrics")):
            answer = client.request(method, path, headers=headers, json={"class": 1})
            assert answer.status_code == 401, (given, path)
            assert answer.headers["WWW-Authenticate"] == "Bearer"
            assert answer.json() == {"detail": "a bearer token is needed"}
    assert asked == []
    right = {"Authorization": "Bearer secret"}
    answer = client.post("/generate", headers=right, json={"class": 1})
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
    assert asked == ["draw"]
    assert client.get("/healthz").status_code == 200
    assert client.get("/").status_code == 200
    assert client.get("/readyz").status_code == 503


def test_a_failure_is_no_traceback(shop: Shop) -> None:
    class Broken:
        async def draw(self, order: Any) -> None:
            raise RuntimeError("of the inside")

        def count(self, status: int, seconds: float) -> None: ...

    app = build_app(Broken(), config(shop), None)  # type: ignore[arg-type]
    answer = TestClient(app).post("/generate", json={"class": 1})
    assert answer.status_code == 500
    assert answer.json() == {"detail": "the request failed; the server's log says why"}


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (2, "LA"), (3, "RGB"), (4, "RGBA")])
def test_pictures_of_any_channels_and_odd_sides(channels: int, mode: str) -> None:
    pixels = np.random.default_rng(0).integers(256, size=(5, 7, channels), dtype=np.uint8)
    with Image.open(io.BytesIO(encode_png(pixels))) as image:
        assert (image.mode, image.size) == (mode, (7, 5))
        assert np.array_equal(np.asarray(image).reshape(5, 7, channels), pixels)
    with pytest.raises(InvalidInputError, match="no PNG has 5 channels"):
        encode_png(np.zeros((5, 7, 5), np.uint8))


def test_metrics_of_several_nodes_are_one_answer() -> None:
    nodes, servers = [], []
    for number in (1, 2):
        registry = CollectorRegistry()
        images = Counter("ray_facm_images", "Images.", ["node"], registry=registry)
        images.labels(node=str(number)).inc(number)
        Histogram("ray_serve_seconds", "Seconds.", registry=registry).observe(0.1)
        Counter("ray_other", "Of no interest.", registry=registry).inc()
        port = free_port()
        servers.append(start_http_server(port, "127.0.0.1", registry)[0])
        nodes.append({"Alive": True, "NodeManagerAddress": "127.0.0.1", "MetricsExportPort": port})
    dead = {"Alive": False, "NodeManagerAddress": "127.0.0.1", "MetricsExportPort": free_port()}
    try:
        text = cluster_metrics([*nodes, dead]).decode()
        with pytest.raises(OSError, match="refused"):
            cluster_metrics([dead | {"Alive": True}])
    finally:
        for server in servers:
            server.shutdown()
    assert text.count("# TYPE ray_facm_images_total") == 1
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert {"ray_facm_images", "ray_serve_seconds"} <= set(families)
    assert not any("other" in name for name in families)
    counted = {
        sample.labels["node"]: sample.value
        for sample in families["ray_facm_images"].samples
        if sample.name == "ray_facm_images_total"
    }
    assert counted == {"1": 1, "2": 2}


def test_no_service_to_put_load_on() -> None:
    with pytest.raises(InvalidInputError, match="no service answers there"):
        prepare_load(LoadConfig(url=f"http://127.0.0.1:{free_port()}"))
