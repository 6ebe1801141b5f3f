"""What has been made sure of before a service starts, and its life from then on."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from mlflow.exceptions import MlflowException
from ray import serve
from ray.serve import Application
from ray.serve.config import BackpressureConfig, HTTPOptions
from ray.serve.schema import LoggingConfig

from facm_core.errors import InvalidInputError, require
from facm_platform.cluster import connected, require_cpus
from facm_platform.config import JobResult, Refused
from facm_platform.registry.versions import Version, find_version
from facm_platform.serving.config import ServeConfig
from facm_platform.serving.model import Loaded, ModelReplica, load_version
from facm_platform.serving.service import Service
from facm_platform.tracking import check_store, embedded_root, new_client

TOKEN_VARIABLE = "FACM_SERVE_TOKEN"
_APPLICATION = "facm"
# Requests that a replica of `Service` has accepted beyond those that wait: health, pages, errors.
_SPARE_REQUESTS = 64
# Requests that wait at the proxy for such a replica: a burst takes a moment to be handed on, and
# what the replica refuses it refuses in the contract's own words. The proxy refuses only a flood.
_PROXY_REQUESTS = 4096
_RETRY_AFTER_SECONDS = 1.0
# A replica that dies is noticed, and replaced, after as many.
_HEALTH_CHECK_SECONDS = 2.0
_STARTS = 3


@dataclass(frozen=True)
class ServePlan:
    """A version that loads and draws, ready to be served."""

    config: ServeConfig
    tracking_uri: str
    loaded: Loaded
    token_sha256: bytes | None

    @property
    def address(self) -> str:
        """Where it answers."""
        return f"http://{self.config.host}:{self.config.port}"

    def describe(self) -> str:
        """What would be served, and how."""
        config, generator = self.config, self.loaded.generator
        replicas = config.replicas
        subject = f"{generator.num_classes} classes"
        if generator.takes_prompts:
            subject = f"by prompt of up to {config.limits.prompt} characters"
        device = "a GPU" if replicas.gpu else f"{replicas.cpus} CPUs"
        return (
            f"serve {self.loaded.version} ({config.alias}, sha256 {generator.sha256}) at "
            f"{self.address}\n"
            f"images of shape {list(generator.image_shape)}, {subject}; up "
            f"to {config.limits.count} a request, {config.limits.steps} steps\n"
            f"{replicas.number} replicas with {device} each, batches of up to "
            f"{config.batching.images} images, a look at the alias every "
            f"{config.poll_seconds:g} s\n"
            f"bearer token: {'needed' if self.token_sha256 else 'none'}"
        )

    def execute(self) -> JobResult:
        """Serve until SIGINT or SIGTERM."""
        # Ray has handlers of its own, and puts them in their place when it starts.
        with self.running(), _stop_asked() as stop:
            print(f"{self.loaded.version} is served at {self.address}", flush=True)
            if self.token_sha256 is None and not _is_loopback(self.config.host):
                print(f"anybody who reaches it may use it: {TOKEN_VARIABLE} is not set", flush=True)
            stop.wait()
            print("stopping", flush=True)
        version = self.loaded.version
        return JobResult(run_id=version.run_id, run_name=str(version), artifact_uri=self.address)

    @contextmanager
    def running(self) -> Iterator[None]:
        """The service, until the block ends; requests that were accepted are answered."""
        replicas = self.config.replicas
        with connected():
            require_cpus("replicas", replicas.number * replicas.cpus, spare=0)
            quiet = LoggingConfig(log_level="WARNING", enable_access_log=False)
            options = HTTPOptions(host=self.config.host, port=self.config.port)
            serve.start(http_options=options, logging_config=quiet)
            try:
                serve.run(self.application(), name=_APPLICATION, logging_config=quiet)
                yield
            finally:
                serve.shutdown()  # type: ignore[no-untyped-call]

    def application(self) -> Application:
        """The two deployments: many light requests, few heavy batches."""
        config = self.config
        # One batch at work, one that fills.
        ongoing = 2 * config.batching.images
        replicas = serve.deployment(
            name="model",
            num_replicas=config.replicas.number,
            ray_actor_options={
                "num_cpus": config.replicas.cpus,
                "num_gpus": int(config.replicas.gpu),
            },
            max_ongoing_requests=ongoing,
            max_queued_requests=config.limits.waiting,
            health_check_period_s=_HEALTH_CHECK_SECONDS,
            max_constructor_retry_count=_STARTS,
        )(ModelReplica).bind(config, self.tracking_uri, self.loaded.version)
        accepted = config.limits.waiting + config.replicas.number * ongoing + _SPARE_REQUESTS
        return serve.deployment(
            name="service",
            ray_actor_options={"num_cpus": 0},
            max_ongoing_requests=accepted,
            max_queued_requests=_PROXY_REQUESTS,
            backpressure_config=BackpressureConfig(
                status_code=429, retry_after_s=_RETRY_AFTER_SECONDS
            ),
            health_check_period_s=_HEALTH_CHECK_SECONDS,
        )(serve.ingress()(Service)).bind(config, replicas, self.token_sha256)


def prepare(config: ServeConfig) -> ServePlan:
    """Load the version that would be served; starts nothing.

    Raises:
        Refused: the model has no such alias, or what it leads to cannot be served.
        InvalidInputError: the tracking store does not answer, the port is taken, an empty token.
    """
    token_sha256 = _token_sha256()
    root = embedded_root(config.storage_uri)
    check_store(config.tracking, root)
    uri = config.tracking.resolve(root)
    version = find_version(new_client(uri), config.model, config.alias)
    if version is None:
        raise Refused(
            f"{config.model} has no {config.alias} in {uri}; make one with jobs/promote.py"
        )
    _check_port(config)
    return ServePlan(config, uri, _load(version, uri), token_sha256)


def _load(version: Version, uri: str) -> Loaded:
    try:
        return load_version(version, uri)
    except InvalidInputError as error:
        raise Refused(f"{version} is not served: {error}") from error
    except (MlflowException, OSError) as error:
        raise Refused(f"{version} cannot be fetched from {version.source} ({error})") from error


def _token_sha256() -> bytes | None:
    token = os.environ.get(TOKEN_VARIABLE)
    if token is None:
        return None
    remedy = "Give a token, or unset the variable"
    require(bool(token.strip()), TOKEN_VARIABLE, token, "empty", remedy)
    return hashlib.sha256(token.encode()).digest()


def _check_port(config: ServeConfig) -> None:
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((config.host, config.port))
        except OSError as error:
            address = f"{config.host}:{config.port}"
            problem = f"nothing can listen there ({error.strerror or error})"
            raise InvalidInputError("port", address, problem, "Use another host or port") from None


def _is_loopback(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")


@contextmanager
def _stop_asked() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set, instead of ending the process."""
    stop = threading.Event()
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda *_: stop.set()) for number in signals]
    try:
        yield stop
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)
