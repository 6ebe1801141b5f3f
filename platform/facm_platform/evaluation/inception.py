"""Inception v3 as FID means it: TensorFlow's of 2015-12-05, in torch-fidelity's port."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from facm_core.checkpoints import read_checkpoint
from facm_core.errors import InvalidInputError
from facm_platform.evaluation.extractor import Extractor, Seen
from facm_platform.storage import absolute, file_sha256, node_copy

FILE = "weights-inception-2015-12-05-6726825d.pth"
"""Of torch-fidelity's release v0.2.0; the end of its name is how its SHA-256 begins."""

# Of the 192 channels of mixed_6/conv, as ADM's evaluator takes them for sFID (17 · 17 · 7).
_SPATIAL_CHANNELS, _SPATIAL = 7, 17 * 17 * 7


class InceptionV3(Extractor):
    """Pool_3 features (2048), logits without bias (1008), and the 2023 spatial ones of sFID."""

    classes = 1008
    spatial_dimension = _SPATIAL
    resize = "bilinear-tf1-299"
    precision = "float32"

    def __init__(self, network: FeatureExtractorInceptionV3, uri: str, sha256: str) -> None:
        super().__init__(uri, sha256, name="inception-v3-tf", dimension=2048)
        self._network = network
        self._spatial: Tensor | None = None
        network.Mixed_6d.branch1x1.register_forward_hook(self._keep)

    def to(self, device: torch.device, dtype: torch.dtype) -> InceptionV3:
        """Moved and converted in place; returns self."""
        self._network.to(device=device, dtype=dtype)
        self._network.feature_extractor_internal_dtype = dtype
        return self

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Seen:
        """Resized as TensorFlow 1 does."""
        device = self._network.fc.weight.device
        features, logits = self._network(images.to(device))
        assert self._spatial is not None
        return Seen(features, logits, spatial=self._spatial)

    def _keep(self, _module: object, _inputs: object, output: Tensor) -> None:
        # In TensorFlow's order, channels last, which statistics in files have.
        self._spatial = output[:, :_SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)


def load_inception(uri: str, field: str = "features_uri") -> InceptionV3:
    """Read the weights.

    Args:
        uri: Of the file that torch-fidelity publishes.
        field: Configuration field that named it, for messages.

    Raises:
        InvalidInputError: nothing there, or another file.
    """
    address = absolute(uri, field)
    try:
        with node_copy(address) as file, tempfile.TemporaryDirectory(prefix="facm-") as folder:
            sha256 = file_sha256(file)
            # torch-fidelity would unpickle the file: it is given one of our own.
            safe = Path(folder, FILE)
            torch.save(dict(read_checkpoint(file, field)), safe)
            network = FeatureExtractorInceptionV3(
                "inception-v3-compat",
                ["2048", "logits_unbiased"],
                feature_extractor_weights_path=str(safe),
            )
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise _unusable(field, uri, "there is no such file") from None
    except InvalidInputError as error:
        raise _unusable(field, uri, error.problem) from None
    except RuntimeError as error:
        raise _unusable(field, uri, "its tensors are not Inception's") from error
    return InceptionV3(network, address, sha256)


def _unusable(field: str, uri: str, problem: str) -> InvalidInputError:
    remedy = (
        f"Download {FILE} from the release v0.2.0 of torch-fidelity, and give its address; "
        "nothing here fetches it"
    )
    return InvalidInputError(field, uri, f"not Inception's weights: {problem}", remedy)
