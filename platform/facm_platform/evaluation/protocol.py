"""What a number of ours means: everything that two evaluations must share to be comparable."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from facm_core.errors import InvalidInputError, require
from facm_platform.latents import LatentManifest

ROWS = "rows"
LABEL_POLICIES = ("balanced", "random", ROWS)

# One stride between seeds: the samples of two seeds never share noise.
SEED_STRIDE = 2**32


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How samples are drawn, prepared and compared.

    Attributes:
        extractor: Name of the feature extractor.
        extractor_sha256: Hash of its weights.
        reference_sha256: Hash of what the samples are compared with: the manifest of a latent set
            (every row, decoded and prepared like the samples), or a file of statistics.
        samples: Number of samples.
        seed: Sample i draws all its noise from ``seed · 2³² + i``, whoever computes it.
        label_policy: ``balanced``: sample i has label i mod num_classes; ``random``: each label is
            drawn uniformly, by the seed and i; ``rows``: sample i is of the text of row i mod rows
            of the latent set, in the order of `real.DecodedSet`.
        quantisation: ``uint8-round``: to the nearest of 256 levels of [-1, 1], half to even.
        resize: How the extractor makes its size of them; ``none``: it sees them as they are.
        precision: Floating type of network, decoder and extractor. In float32 a batch of another
            size rounds differently, and now and then a pixel falls to another grey level.
        kept_features: Kernel distance, precision and recall are of so many features a side, the
            first ones.
        name: Of the published protocol that it is; None for one of our own.
    """

    extractor: str
    extractor_sha256: str
    reference_sha256: str
    samples: int
    seed: int
    label_policy: str = "balanced"
    quantisation: str = "uint8-round"
    resize: str = "none"
    precision: str = "float64"
    kept_features: int = 10_000
    name: str | None = None

    @property
    def id(self) -> str:
        """Readable name and a hash of every field; equal ids, comparable numbers."""
        canonical = json.dumps(dataclasses.asdict(self), sort_keys=True)
        digest = hashlib.sha256(canonical.encode()).hexdigest()[:12]
        return f"{self.name or f'{self.extractor}-{self.samples}'}-{digest}"

    def sample_seeds(self, start: int, stop: int) -> list[int]:
        """Seeds of the samples [start, stop)."""
        return [self.seed * SEED_STRIDE + i for i in range(start, stop)]

    def sample_labels(self, start: int, stop: int, count: int) -> Tensor:
        """Labels of the samples [start, stop), int64, below `count`; or their rows."""
        if self.label_policy in ("balanced", ROWS):
            return torch.arange(start, stop) % count
        draws = [np.random.default_rng((self.seed, i)) for i in range(start, stop)]
        return torch.tensor([int(draw.integers(count)) for draw in draws])


def label_policy(manifest: LatentManifest, asked: str | None, field: str = "label_policy") -> str:
    """How the samples that are compared with a latent set are conditioned.

    Args:
        manifest: Of the set.
        asked: One of `LABEL_POLICIES`; None for ``balanced``, or ``rows`` where rows have texts.
        field: Configuration field that named it, for messages.

    Raises:
        InvalidInputError: rows have labels and it is for texts, or the other way round.
    """
    texts = manifest.num_classes == 0
    policy = asked or (ROWS if texts else LABEL_POLICIES[0])
    have, fit = ("texts", ROWS) if texts else ("labels", "balanced or random")
    fits = (policy == ROWS) == texts
    require(
        fits, field, policy, f"the rows of data.uri have {have}", f"Use {fit}, or leave it away"
    )
    return policy


PUBLISHED: dict[str, dict[str, object]] = {
    # The weights: torch-fidelity's weights-inception-2015-12-05-6726825d.pth.
    "adm-imagenet256-50k": {
        "extractor": "inception-v3-tf",
        "extractor_sha256": "6726825d",
        "samples": 50_000,
        "label_policy": "balanced",
    },
}
"""Name -> what a protocol of that name has; of hashes, how they begin."""


def check_published(field: str, protocol: Protocol) -> None:
    """Raise `InvalidInputError` unless the protocol is what its name says."""
    if protocol.name is None:
        return
    differing = [
        f"{name} is {getattr(protocol, name)!r}, not {wanted!r}"
        for name, wanted in PUBLISHED[protocol.name].items()
        if not str(getattr(protocol, name)).startswith(str(wanted))
    ]
    if differing:
        remedy = "Use what the protocol says, or leave its name away"
        raise InvalidInputError(field, protocol.name, "; ".join(differing), remedy)


def dtype_of(precision: str) -> torch.dtype:
    """The floating type that a protocol names."""
    return {"float32": torch.float32, "float64": torch.float64}[precision]
