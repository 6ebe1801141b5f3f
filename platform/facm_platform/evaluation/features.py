"""Feature extractor for small images: a convolutional classifier, named by the hash of its weights.

Its penultimate layer gives the features of the Fréchet distance, its logits the class it sees.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from facm_core.autoencoders import ImageShape
from facm_core.errors import InvalidInputError, require
from facm_core.pixels import dequantise
from facm_platform.evaluation.extractor import Extractor, Seen
from facm_platform.latents import LatentManifest
from facm_platform.storage import absolute, join, node_copy, write_bytes

WEIGHTS, DESCRIPTION = "features.safetensors", "features.json"


@dataclass(frozen=True, kw_only=True)
class FeaturesInfo:
    """What ``features.json`` tells besides the hash of the weights.

    Attributes:
        name: Short name, part of protocol ids.
        channels: Channels of an image.
        size: Height and width of an image; a multiple of 4.
        num_classes: Classes it tells apart.
        dimension: Width of a feature vector.
        test_accuracy: Share of held-out images that it classifies rightly.
        latent_manifest_sha256: Hash of the latent set it was fitted on.
    """

    name: str
    channels: int
    size: int
    num_classes: int
    dimension: int = 64
    test_accuracy: float
    latent_manifest_sha256: str

    def __post_init__(self) -> None:
        require(
            self.size >= 4 and self.size % 4 == 0,
            "size",
            self.size,
            "not a multiple of 4, so it cannot be halved twice",
            "Use another feature extractor for these images",
        )


class Classifier(nn.Module):
    """Three convolutions and two linear layers: images (B, C, S, S) -> features, logits.

    SiLU and not ReLU, so that no feature is constant over a set.
    """

    def __init__(self, info: FeaturesInfo, width: int = 32) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(info.channels, width, kernel_size=3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, width, kernel_size=3, padding=1),
            nn.SiLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, kernel_size=3, padding=1),
            nn.SiLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(2 * width * (info.size // 4) ** 2, info.dimension),
            nn.SiLU(),
        )
        self.head = nn.Linear(info.dimension, info.num_classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, dimension) and logits (B, num_classes)."""
        features = self.body(images)
        return features, self.head(features)


class FeatureExtractor(Extractor):
    """A fitted classifier.

    Attributes:
        info: What it is.
    """

    def __init__(self, network: Classifier, uri: str, info: FeaturesInfo, sha256: str) -> None:
        super().__init__(uri, sha256, name=info.name, dimension=info.dimension)
        self.classes = info.num_classes
        self._network = network.eval().requires_grad_(False)
        self.info = info

    @property
    def accuracy(self) -> float:
        """Share of held-out images that it classifies rightly."""
        return self.info.test_accuracy

    @property
    def describe(self) -> str:
        """With how good it is."""
        return f"{super().describe}, test accuracy {self.accuracy:.2%}"

    def check(self, field: str, shape: ImageShape, manifest: LatentManifest | None = None) -> None:
        """It was fitted to one latent set, whose labels it tells apart.

        Features are all that is taken from it on a set with texts: another set of such images will
        do.
        """
        info = self.info
        facts: list[tuple[str, object, object]] = [
            ("images", (info.channels, info.size, info.size), shape)
        ]
        if manifest is not None and manifest.num_classes:
            facts += [
                ("classes", info.num_classes, manifest.num_classes),
                ("latent set", info.latent_manifest_sha256, manifest.sha256),
            ]
        labels = manifest is None or manifest.num_classes
        which = "this latent set" if labels else "a set of such images with labels"
        again = f"Fit one to {which} with jobs/fit_features.py"
        for what, ours, theirs in facts:
            problem = f"its {what} was {ours}, here it is {theirs}"
            require(ours == theirs, field, self.uri, problem, again)

    def to(self, device: torch.device, dtype: torch.dtype) -> FeatureExtractor:
        """Moved and converted in place; returns self."""
        self._network.to(device=device, dtype=dtype)
        return self

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Seen:
        """Its penultimate layer, and the classes of the latent set that it was fitted to."""
        parameter = next(self._network.parameters())
        features, logits = self._network(dequantise(images.to(parameter.device), parameter.dtype))
        return Seen(features, logits, labels=logits.argmax(dim=1))


def save_features(uri: str, network: Classifier, info: FeaturesInfo) -> FeatureExtractor:
    """Store a fitted classifier in the folder `uri`; ``features.json`` comes last."""
    weights = safetensors.torch.save(
        {name: tensor.float().contiguous() for name, tensor in network.state_dict().items()}
    )
    sha256 = hashlib.sha256(weights).hexdigest()
    address = absolute(uri, "output_uri")
    write_bytes(join(address, WEIGHTS), weights)
    description = {**dataclasses.asdict(info), "weights_sha256": sha256}
    write_bytes(join(address, DESCRIPTION), (json.dumps(description, indent=2) + "\n").encode())
    return FeatureExtractor(network, address, info, sha256)


def load_features(uri: str, field: str = "features_uri") -> FeatureExtractor:
    """Read a feature extractor.

    Args:
        uri: Its folder or ``s3://`` prefix.
        field: Configuration field that named it, for messages.

    Raises:
        InvalidInputError: nothing there, not a feature extractor, or a damaged file.
    """
    address = absolute(uri, field)
    try:
        with node_copy(address) as folder:
            values = json.loads((folder / DESCRIPTION).read_text())
            weights = (folder / WEIGHTS).read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise _unusable(field, uri, f"{Path(str(error.filename or uri)).name} is missing") from None
    except ValueError as error:
        raise _unusable(field, uri, f"{DESCRIPTION} is not JSON ({error})") from error
    sha256 = hashlib.sha256(weights).hexdigest()
    try:
        recorded = values.pop("weights_sha256")
        problem = f"{WEIGHTS} is damaged: its sha256 is {sha256}, {DESCRIPTION} says {recorded}"
        require(sha256 == recorded, field, uri, problem, "Fit it again with jobs/fit_features.py")
        info = FeaturesInfo(**values)
        network = Classifier(info)
        network.load_state_dict(safetensors.torch.load(weights), strict=True)
    except (KeyError, TypeError, AttributeError, SafetensorError, RuntimeError) as error:
        raise _unusable(field, uri, f"{type(error).__name__}: {error}") from error
    return FeatureExtractor(network, address, info, sha256)


def _unusable(field: str, uri: str, problem: str) -> InvalidInputError:
    remedy = "Fit one with jobs/fit_features.py"
    return InvalidInputError(field, uri, f"not a feature extractor: {problem}", remedy)
