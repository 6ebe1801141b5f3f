"""The stack in containers, as far as a file can tell; no container runs here."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.infra.stack import Ports, Stack

LOCAL = Path(__file__).resolve().parents[2] / "infra" / "local"


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    """The file, with its anchors resolved."""
    parsed: dict[str, Any] = yaml.safe_load((LOCAL / "compose.yaml").read_text())
    return parsed


def test_what_it_has(compose: dict[str, Any]) -> None:
    assert set(compose["services"]) == {
        *("postgres", "s3", "mlflow", "ray", "prometheus", "grafana", "board"),
    }


def test_images_are_pinned_or_ours(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        ours = service["image"] == "facm" and service["build"]
        assert ours or re.search(r"@sha256:[0-9a-f]{64}$", service["image"]), name


def test_nothing_listens_beyond_this_machine(compose: dict[str, Any]) -> None:
    for service in compose["services"].values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))


def test_containers_are_hardened(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name


def test_every_secret_is_a_file_that_is_made(compose: dict[str, Any], tmp_path: Path) -> None:
    stack = Stack(folder=tmp_path / "stack", ports=Ports())
    stack.make_container_secrets()
    assert (tmp_path / "stack" / "secrets").stat().st_mode & 0o777 == 0o700
    for name, secret in compose["secrets"].items():
        assert secret == {"file": f"../../runs/stack/secrets/{name}"}
        assert len(stack.secret(name)) >= 40
    used = {name for service in compose["services"].values() for name in service.get("secrets", ())}
    assert used == set(compose["secrets"])
    for service in compose["services"].values():
        for variable in service.get("environment", {}):
            assert not re.search(r"(KEY|TOKEN|SECRET|PASSWORD)$", variable), variable


def test_the_board_has_no_login_of_its_own(compose: dict[str, Any]) -> None:
    assert "trainer_password" not in compose["services"]["board"]["secrets"]
    assert not any("TRACKING" in v for v in compose["services"]["board"]["environment"])
