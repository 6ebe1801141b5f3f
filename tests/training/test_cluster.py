"""Which cluster a job joins."""

from __future__ import annotations

import socket

import pytest

from facm_platform import cluster


def test_a_cluster_that_is_gone_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        monkeypatch.setattr(cluster, "read_ray_address", lambda: address)
        assert cluster.cluster_address() is None  # Ray finds it by itself
    assert cluster.cluster_address() == "local"


def test_what_the_user_names_goes_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "ray://somewhere:10001")
    monkeypatch.setattr(cluster, "read_ray_address", lambda: "127.0.0.1:1")
    assert cluster.cluster_address() is None


def test_no_cluster_was_ever_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(cluster, "read_ray_address", lambda: None)
    assert cluster.cluster_address() is None
