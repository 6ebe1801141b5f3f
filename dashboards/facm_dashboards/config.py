"""What the board is told, and whether it may listen where it is told to."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import requests

from facm_core.errors import InvalidInputError, require
from facm_platform.tracking import TrackingConfig, embedded_root

_LOGINS = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")
_PROBE = "/api/2.0/mlflow/experiments/get-by-name?experiment_name=Default"


@dataclass(frozen=True, kw_only=True)
class BoardConfig:
    """Where the board listens and what it reads.

    Attributes:
        host: Address to listen on.
        port: To listen on.
        names: Host names that requests may use beside those of loopback and `host`.
        storage_uri: Of the runs: promotions are kept below it, and the embedded MLflow store.
        tracking: MLflow.
    """

    host: str = "127.0.0.1"
    port: int = 5050
    names: tuple[str, ...] = ()
    storage_uri: str = "runs"
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        require(0 <= self.port < 2**16, "port", self.port, "no TCP port", "Use e.g. 5050")
        for name in self.names:
            fits = name and not set(name) & set("*/:@ ")
            require(bool(fits), "names", name, "no host name", "Use e.g. board.example.org")

    @property
    def tracking_uri(self) -> str:
        """The URI in force."""
        return self.tracking.resolve(embedded_root(self.storage_uri))

    @property
    def hosts(self) -> frozenset[str]:
        """Host names that requests may use."""
        return frozenset({"localhost", "127.0.0.1", "::1", self.host, *self.names})


def check_bind(config: BoardConfig) -> None:
    """Raise `InvalidInputError` if the board would show or change things for strangers.

    Raises:
        InvalidInputError: it is to listen beyond this machine, and MLflow asks nobody who they
            are; or it has a login of its own, which every visitor would use.
    """
    for name in _LOGINS:
        require(
            name not in os.environ,
            name,
            "…",
            "every visitor of the board would act under this login",
            "Unset it: the board asks each visitor for their own",
        )
    parts = urlsplit(config.tracking_uri)
    require(
        not (parts.scheme.startswith("http") and "@" in parts.netloc),
        "tracking.uri",
        f"{parts.scheme}://…@{parts.netloc.rpartition('@')[2]}",
        "every visitor of the board would act under its login",
        "Leave the login out of it: the board asks each visitor for their own",
    )
    if not _is_loopback(config.host) and not _asks_who(config.tracking_uri):
        raise InvalidInputError(
            "host",
            config.host,
            "other machines could look and promote, and the tracking store asks nobody who they "
            "are (or does not answer)",
            "Use 127.0.0.1 and an SSH tunnel, or a tracking server with --app-name basic-auth "
            "behind TLS",
        )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _asks_who(uri: str) -> bool:
    """Whether a request without a login is refused."""
    if not uri.startswith(("http://", "https://")):
        return False
    try:
        return requests.get(uri.rstrip("/") + _PROBE, timeout=10).status_code == 401
    except requests.RequestException:
        return False
