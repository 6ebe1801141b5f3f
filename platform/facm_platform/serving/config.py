"""What is served, where, and how much of it at once."""

from __future__ import annotations

from dataclasses import dataclass, field

from facm_core.errors import require
from facm_platform.registry.versions import CHAMPION, check_model_name
from facm_platform.tracking import TrackingConfig

# Of a character, as JSON may write it (\ud83d\udc31), and of all else in a request.
_JSON_BYTES, _OTHER_BYTES = 12, 256


@dataclass(frozen=True, kw_only=True)
class LimitsConfig:
    """What one request may ask for, and how many may wait.

    Attributes:
        count: Images of a request.
        steps: Evaluations of the network for an image.
        prompt: Characters of a prompt.
        body_bytes: Of a request; longer ones are answered with 413.
        waiting: Requests that wait for a place at a replica; more are answered with 429.
        seconds: After so many a request is answered with 503.
    """

    count: int = 16
    steps: int = 8
    prompt: int = 1000
    body_bytes: int = 16_384
    waiting: int = 256
    seconds: float = 60.0

    def __post_init__(self) -> None:
        for name in ("count", "steps", "prompt", "body_bytes", "waiting"):
            _require_positive(name, getattr(self, name))
        _require_positive("seconds", self.seconds)
        longest = self.prompt * _JSON_BYTES + _OTHER_BYTES
        require(
            longest <= self.body_bytes,
            "prompt",
            self.prompt,
            f"a request with so many characters may have {longest:,} bytes, and body_bytes are "
            f"{self.body_bytes:,}",
            f"Use body_bytes of at least {longest}, or a shorter prompt",
        )


@dataclass(frozen=True, kw_only=True)
class BatchingConfig:
    """How requests are put together.

    Attributes:
        images: Most images that the network draws at once; 1 draws them one by one.
        wait_seconds: How long the first request of a batch waits for others.
    """

    images: int = 64
    wait_seconds: float = 0.005

    def __post_init__(self) -> None:
        _require_positive("images", self.images)
        remedy = "Use 0 or a few milliseconds"
        require(self.wait_seconds >= 0, "wait_seconds", self.wait_seconds, "negative", remedy)


@dataclass(frozen=True, kw_only=True)
class ReplicasConfig:
    """The processes that draw. Those that take the requests need next to nothing.

    Attributes:
        number: Of them.
        cpus: Of each.
        gpu: Whether each has a GPU.
    """

    number: int = 1
    cpus: int = 1
    gpu: bool = False

    def __post_init__(self) -> None:
        _require_positive("number", self.number)
        _require_positive("cpus", self.cpus)


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """One registered model behind one address.

    A bearer token, where requests must carry one, comes from the environment
    (``FACM_SERVE_TOKEN``), never from here.

    Attributes:
        model: Registered model.
        alias: Its version that is served; when the alias moves, so do the replicas.
        poll_seconds: How often they look.
        host: Address to listen on.
        port: The same.
        storage_uri: Where the embedded MLflow store lies, as in the other jobs' ``run``.
        tracking: MLflow.
        limits: Of requests.
        batching: Of requests.
        replicas: Of the model.
    """

    model: str
    alias: str = CHAMPION
    poll_seconds: float = 5.0
    host: str = "127.0.0.1"
    port: int = 8000
    storage_uri: str = "runs"
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    batching: BatchingConfig = field(default_factory=BatchingConfig)
    replicas: ReplicasConfig = field(default_factory=ReplicasConfig)

    def __post_init__(self) -> None:
        check_model_name("model", self.model)
        check_model_name("alias", self.alias)
        _require_positive("poll_seconds", self.poll_seconds)
        remedy = "Use a port from 1 to 65535"
        require(0 < self.port < 65536, "port", self.port, "not a port", remedy)
        require(
            self.limits.count <= self.batching.images,
            "limits.count",
            self.limits.count,
            f"a request of so many fits into no batch of {self.batching.images}",
            "Use batching.images of at least as many",
        )


def _require_positive(field: str, value: float) -> None:
    require(value > 0, field, value, "not positive", "Use a number above 0")
