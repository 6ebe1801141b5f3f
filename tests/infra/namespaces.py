"""Machines that nobody outside can be reached from: nested namespaces on this one.

A launcher of clusters runs nowhere else. The addresses that moto makes up look public, and one that
found a route to them would try its keys on strangers' machines.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable
from ipaddress import ip_network
from pathlib import Path
from typing import IO, Any

import psutil

NETWORK = ip_network("10.20.0.0/16")
GATEWAY = "10.20.0.1"
"""Where the services are that AWS would offer. It forwards nothing."""

_INSIDE = [NETWORK, *map(ip_network, ("127.0.0.0/8", "::1/128", "fe80::/10", "ff00::/8"))]
_TOOLS = ("chroot", "ip", "nsenter", "openssl", "rsync", "/usr/sbin/sshd", "unshare")
_UNSHARE = ["unshare", "--net", "--pid", "--mount", "--uts", "--fork", "--mount-proc"]
# Nothing of the environment of the tests: it may hold the credentials of a real account.
_ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}


class WayOut(RuntimeError):
    """A network namespace in which packets may leave."""


def missing() -> str | None:
    """Why no machines can be made here, or None."""
    if os.geteuid() != 0:
        return "namespaces need root"
    if absent := [tool for tool in _TOOLS if shutil.which(tool, path=_ENVIRONMENT["PATH"]) is None]:
        return f"not installed: {', '.join(absent)}"
    made = subprocess.run([*_UNSHARE, "true"], capture_output=True, text=True)
    return None if made.returncode == 0 else f"no namespaces here: {made.stderr.strip()}"


def refuse_a_way_out(process: int) -> None:
    """Make sure that from the network namespace of that process no packet gets any further.

    Raises:
        WayOut: there is a route to anything but `NETWORK` and the namespace itself.
    """
    for family in ("-4", "-6"):
        everything = "0.0.0.0/0" if family == "-4" else "::/0"
        for route in json.loads(_ip(process, family, "-json", "route", "show", "table", "all")):
            target = ip_network(everything if route["dst"] == "default" else route["dst"])
            inside = any(
                target.version == known.version and target.subnet_of(known) for known in _INSIDE
            )
            if not inside or route.keys() & {"gateway", "via", "nexthops"}:
                raise WayOut(f"nothing is started where a route leads out: {route}")


class Namespace:
    """Network, process and mount namespaces whose end is the end of every process within.

    Args:
        init: Process 1. Says a line when it is ready, and then reads its standard input.
        within: Whose process and mount namespaces hold these.
        log: Where its errors go.
    """

    def __init__(self, *init: str, log: Path, within: Namespace | None = None) -> None:
        command = [*_UNSHARE, *init]
        if within is not None:
            refuse_a_way_out(within.init)
            command = [*within._enter, *command]
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                command,
                env=_ENVIRONMENT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._input = self._process.stdin
        if not self._process.stdout.readline():
            raise RuntimeError(log.read_text())
        self.init: int = psutil.Process(self._process.pid).children(recursive=True)[-1].pid
        spaces = ("--net", "--pid", "--mount", "--uts", "--root", "--wd")
        self._enter = ["nsenter", f"--target={self.init}", *spaces]
        self._started: list[subprocess.Popen[str]] = []

    def start(self, *command: str, output: IO[Any] | int) -> subprocess.Popen[str]:
        """Start a process in it, in an empty environment.

        Raises:
            WayOut: see `refuse_a_way_out`. The process was not started.
        """
        refuse_a_way_out(self.init)
        process = subprocess.Popen(
            [*self._enter, *command],
            env=_ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._started.append(process)
        return process

    def end(self) -> None:
        """Kill process 1, and with it all the others."""
        if self._process.poll() is None:
            os.kill(self.init, signal.SIGKILL)
        for process in (self._process, *self._started):
            process.wait()


class Network(Namespace):
    """What machines are connected to. It ends with this process, whatever becomes of it."""

    def __init__(self, folder: Path) -> None:
        # Reads a pipe that only we write to.
        super().__init__("sh", "-c", "echo ready; exec cat", log=folder / "network.log")
        self.folder = folder
        _ip_batch(
            self.init,
            "link set lo up",
            "link add bridge type bridge",
            f"address add {GATEWAY}/{NETWORK.prefixlen} dev bridge",
            "link set bridge up",
        )
        refuse_a_way_out(self.init)

    def processes(self) -> list[str]:
        """Command lines of all that runs in it, on its machines too."""
        script = "for file in /proc/[0-9]*/cmdline; do tr '\\0' ' ' < $file; echo; done"
        listed, _ = self.start("sh", "-c", script, output=subprocess.PIPE).communicate()
        return [line.strip() for line in listed.splitlines() if line and script not in line]


class Machine(Namespace):
    """A machine with a root of its own, whose process 1 is an SSH server.

    Args:
        network: Where it is plugged in.
        name: Of the host.
        address: In `NETWORK`.
        files: Contents by absolute path; nobody else may read them.
        user: Who logs in, and is root under another name: Python may lie in root's home.
    """

    def __init__(
        self, network: Network, name: str, address: str, files: dict[str, str], user: str = "ubuntu"
    ) -> None:
        self.place = place = network.folder / name
        home = f"/home/{user}"
        files = files | {
            "/etc/hosts": f"127.0.0.1 localhost\n{address} {name}\n",
            "/etc/passwd": f"{user}:*:0:0::{home}:/bin/bash\n{Path('/etc/passwd').read_text()}",
            "/etc/resolv.conf": "",
            "/etc/shadow": "",
        }
        for path, content in files.items():
            file = place / "files" / path.removeprefix("/")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(content)
            file.chmod(0o700 if content.startswith("#!") else 0o600)
        (place / "root").mkdir()
        script = str(Path(__file__).with_name("machine.sh"))
        super().__init__(
            "sh", script, name, str(place), *python_folders(), log=place / "log", within=network
        )
        port = f"port{self.init}"
        _ip_batch(
            network.init,
            f"link add {port} type veth peer name eth0 netns {self.init}",
            f"link set {port} master bridge up",
        )
        _ip_batch(
            self.init,
            "link set lo up",
            f"address add {address}/{NETWORK.prefixlen} dev eth0",
            "link set eth0 up",
        )
        refuse_a_way_out(self.init)
        self._input.write(b"go\n")
        self._input.flush()
        self._shell = ["env", f"HOME={home}", f"USER={user}", "bash", "-c"]

    def shell(self, script: str, output: IO[Any] | int = subprocess.PIPE) -> subprocess.Popen[str]:
        """Start what its user would type."""
        return self.start(*self._shell, f"cd; . ./.bashrc; {script}", output=output)


def python_folders() -> list[str]:
    """Where this Python and its packages are, by every name that they have."""
    paths = [Path(path) for path in (sys.prefix, sys.base_prefix)]
    names = {str(name) for path in paths for name in (path, path.resolve())}
    return sorted(name for name in names if not name.startswith("/usr"))


def _ip(process: int, *arguments: str, commands: Iterable[str] = ()) -> str:
    """Run ``ip`` in the network namespace of that process."""
    done = subprocess.run(
        ["nsenter", f"--net=/proc/{process}/ns/net", "ip", *arguments],
        env=_ENVIRONMENT,
        input="\n".join(commands),
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise RuntimeError(f"ip {' '.join([*arguments, *commands])}: {done.stderr}")
    return done.stdout


def _ip_batch(process: int, *commands: str) -> None:
    _ip(process, "-batch", "-", commands=commands)
