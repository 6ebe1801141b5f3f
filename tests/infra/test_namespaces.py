"""Where a launcher may run: nowhere that a packet can leave."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.infra.namespaces import Machine, Namespace, Network, WayOut, missing, refuse_a_way_out

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))


@pytest.fixture
def network(tmp_path: Path) -> Iterator[Network]:
    network = Network(tmp_path)
    yield network
    network.end()


def printed(namespace: Namespace, *command: str) -> str:
    return namespace.start(*command, output=subprocess.PIPE).communicate(timeout=20)[0]


@pytest.mark.parametrize(
    "route",
    [
        "default via 10.20.0.9",
        "default via 10.20.0.9 table 7",
        "default dev bridge",
        "0.0.0.0/1 via 10.20.0.9",
        "192.0.2.0/24 dev bridge",
        "10.0.0.0/8 dev bridge",
        "10.20.3.0/24 via 10.20.0.9",
        "-6 default via fe80::9 dev bridge",
    ],
)
def test_nothing_starts_where_a_route_leads_out(
    network: Network, route: str, tmp_path: Path
) -> None:
    assert printed(network, "echo", "hello") == "hello\n"
    family, add = ("-6", route[3:]) if route.startswith("-6") else ("-4", route)
    assert printed(network, "ip", family, "route", "add", *add.split()) == ""
    with pytest.raises(WayOut, match="nothing is started"):
        network.start("touch", str(tmp_path / "started"), output=subprocess.DEVNULL)
    with pytest.raises(WayOut):
        Machine(network, "late", "10.20.0.20", {})
    assert not (tmp_path / "started").exists()


def test_this_machine_itself_is_refused() -> None:
    with_default = subprocess.run(["ip", "route", "show", "default"], capture_output=True)
    if not with_default.stdout:
        pytest.skip("this machine has no default route")
    with pytest.raises(WayOut, match="default"):
        refuse_a_way_out(os.getpid())
