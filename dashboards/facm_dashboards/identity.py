"""Who asks: their login goes on to MLflow, which decides what they see and may do."""

from __future__ import annotations

import base64
import binascii
import hashlib
from contextvars import ContextVar
from dataclasses import dataclass

from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from mlflow.tracking.request_header.abstract_request_header_provider import RequestHeaderProvider
from mlflow.tracking.request_header.registry import _request_header_provider_registry
from mlflow.utils.rest_utils import http_request

_PERMISSION = "/api/3.0/mlflow/users/permissions/get"
_USER = "/api/2.0/mlflow/users/get"
_PROMOTERS = ("EDIT", "MANAGE")


@dataclass(frozen=True)
class Visitor:
    """Of a request.

    Attributes:
        authorization: Its header; None where there is none.
    """

    authorization: str | None = None

    @property
    def key(self) -> str:
        """Under which what they may see is kept; tells nothing of the password."""
        return hashlib.sha256((self.authorization or "").encode()).hexdigest()

    @property
    def name(self) -> str | None:
        """As they call themselves."""
        scheme, _, encoded = (self.authorization or "").partition(" ")
        if scheme.lower() != "basic":
            return None
        try:
            return base64.b64decode(encoded, validate=True).decode().partition(":")[0] or None
        except (binascii.Error, UnicodeDecodeError):
            return None


visitor: ContextVar[Visitor] = ContextVar("visitor", default=Visitor())  # noqa: B039  (frozen)


class _Login(RequestHeaderProvider):
    """Puts the visitor's login on every request to MLflow."""

    def in_context(self) -> bool:
        return visitor.get().authorization is not None

    def request_headers(self) -> dict[str, str]:
        return {"Authorization": visitor.get().authorization or ""}


def forward_logins() -> None:
    """From now on; once is enough."""
    known = any(isinstance(one, _Login) for one in _request_header_provider_registry)
    if not known:
        _request_header_provider_registry.register(_Login)  # type: ignore[no-untyped-call]


def may_promote(client: MlflowClient, model: str) -> bool:
    """Whether MLflow lets the visitor change the model; anybody, where it asks for no login."""
    name, store = visitor.get().name, client._tracking_client.store
    if name is None or not hasattr(store, "get_host_creds"):
        # Without a login a server that asks for one has refused them before.
        return True
    answer = http_request(  # type: ignore[no-untyped-call]
        store.get_host_creds(),
        _PERMISSION,
        "GET",
        params={"username": name, "resource_type": "registered_model", "resource_id": model},
    )
    if answer.status_code == 404:
        # A server without logins knows no permissions; whatever name they sent means nothing.
        return True
    if answer.status_code == 200 and answer.json().get("permission") in _PROMOTERS:
        return True
    # MLflow lets its administrators do everything, whatever is written of the model.
    user = http_request(  # type: ignore[no-untyped-call]
        store.get_host_creds(), _USER, "GET", params={"username": name}
    )
    return user.status_code == 200 and bool(user.json()["user"]["is_admin"])


def asks_for_login(error: Exception) -> bool:
    """Whether MLflow wants to know who it is."""
    return isinstance(error, MlflowException) and status_of(error) == 401


def status_of(error: MlflowException) -> int:
    """HTTP status that MLflow gives it."""
    return int(error.get_http_status_code())  # type: ignore[no-untyped-call]
