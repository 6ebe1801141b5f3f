"""One service for the tests of a file that need none of their own."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from facm_platform.serving import ServeConfig, prepare
from facm_platform.serving.config import BatchingConfig, LimitsConfig
from facm_platform.tracking import TrackingConfig, connect_store
from tests.conftest import free_port
from tests.serving.shop import MODEL, Shop, open_shop


@pytest.fixture(scope="session")
def shop(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Shop:
    """A registry with two versions; the first is the champion."""
    root = tmp_path_factory.mktemp("shop")
    shutil.copy(empty_database, root / "mlflow.db")
    store = connect_store(TrackingConfig(uri=f"sqlite:///{root / 'mlflow.db'}"), root)
    return open_shop(store, root)


@dataclass(frozen=True)
class Served:
    """A service and what it serves."""

    url: str
    shop: Shop
    config: ServeConfig


# Not of the session: a cluster has one Ray Serve, with one port.
@pytest.fixture(scope="module")
def served(shop: Shop, ray_cluster: None) -> Iterator[Served]:
    """The champion of the shop, with little room for those who wait."""
    config = ServeConfig(
        model=MODEL,
        port=free_port(),
        poll_seconds=0.2,
        tracking=TrackingConfig(uri=shop.store.uri),
        limits=LimitsConfig(count=8, waiting=24),
        batching=BatchingConfig(images=16),
    )
    plan = prepare(config)
    with plan.running():
        yield Served(plan.address, shop, config)
