"""What samples are compared with: statistics of real images, in a file that several runs share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError

from facm_core.errors import InvalidInputError, require
from facm_core.metrics import Gaussian
from facm_platform import storage
from facm_platform.evaluation.extractor import Extractor
from facm_platform.evaluation.measured import Measured, Reference
from facm_platform.evaluation.real import LATENTS, NpzImages, RealImages
from facm_platform.latents import LatentManifest

_OURS, _ADM = ".safetensors", ".npz"
_EXTRACTOR = "extractor_sha256"

Look = Callable[[RealImages], Iterable[Measured]]
"""Look at all pieces of some images, in their order; see `Evaluator.real`."""


@dataclass(frozen=True)
class ReferenceFile:
    """Where a reference lies.

    Attributes:
        uri: Of the file, absolute: ours, or an ``.npz`` as ADM's evaluator reads it.
        sha256: What a protocol names: the latent set's manifest, or the file.
        exists: Whether it is there already; else it is to be made of the latent set.
    """

    uri: str
    sha256: str
    exists: bool


def reference_name(extractor: Extractor, manifest: LatentManifest) -> str:
    """Of the file for a latent set, where a configuration names none."""
    return f"reference-{extractor.sha256[:12]}-{manifest.sha256[:12]}{_OURS}"


def find_reference(
    uri: str, extractor: Extractor, manifest: LatentManifest, field: str = "reference_uri"
) -> ReferenceFile:
    """The reference of a configuration.

    Args:
        uri: Of an ``.npz``, or of a file of ours; one that is not there yet is made of every row of
            the latent set.
        extractor: In whose features.
        manifest: Of the latent set.
        field: Configuration field that named it, for messages.

    Raises:
        InvalidInputError: no such ``.npz``, another kind of file, or one of another extractor or
            latent set.
    """
    address = storage.absolute(uri, field)
    there = storage.exists(address)
    if address.endswith(_ADM):
        require(there, field, uri, "nothing lies there", "Mend the address")
        with storage.node_copy(address) as file:
            width = len(_statistics(file, field, uri)["mu"])
            sha256 = storage.file_sha256(file)
        problem = f"it has {width} features, this extractor {extractor.dimension}"
        remedy = "Use the extractor it was made by"
        require(width == extractor.dimension, field, uri, problem, remedy)
        return ReferenceFile(address, sha256, exists=True)
    kinds = f"neither {_OURS} nor {_ADM}"
    require(address.endswith(_OURS), field, uri, kinds, "Name a file of one of these kinds")
    if not there:
        return ReferenceFile(address, manifest.sha256, exists=False)
    with storage.node_copy(address) as file:
        facts = _facts(file, field, uri)
        sha256 = storage.file_sha256(file)
    theirs = facts[_EXTRACTOR]
    require(
        theirs == extractor.sha256,
        field,
        uri,
        f"it was made by the extractor {theirs[:12]}…, not by {extractor.sha256[:12]}…",
        "Use the extractor it was made by, or another file",
    )
    if (latents := facts.get(LATENTS)) is not None:
        problem = f"it is of the latent set {latents[:12]}…, not {manifest.sha256[:12]}…"
        require(latents == manifest.sha256, field, uri, problem, "Use another file")
        sha256 = manifest.sha256
    return ReferenceFile(address, sha256, exists=True)


def make_reference(
    uri: str, images: RealImages, extractor: Extractor, look: Look, *, keep: int, shown: int = 0
) -> Reference:
    """Look at real images, and keep the result.

    Args:
        uri: Of the file, absolute.
        images: The images.
        extractor: In whose features.
        look: See `Look`.
        keep: Features of so many are kept.
        shown: So many images of a class are kept, of those that `look` gives.
    """
    total, numbers = Measured(extractor, keep), Counter[int]()
    for part in look(images):
        some, part.shown = part.shown, {}
        total.merge(part)
        for (label, _), image in sorted(some.items(), key=lambda entry: entry[0]):
            if numbers[label] < shown:
                total.shown[label, numbers[label]] = image
                numbers[label] += 1
    facts = {_EXTRACTOR: extractor.sha256, images.kind: images.id}
    state = {name: tensor.contiguous() for name, tensor in total.state_dict().items()}
    storage.write_bytes(uri, safetensors.torch.save(state, facts))
    return Reference.of(total)


def read_reference(file: ReferenceFile, extractor: Extractor, look: Look, keep: int) -> Reference:
    """A reference that exists.

    Args:
        file: Where it lies.
        extractor: In whose features.
        look: See `Look`: an ``.npz`` holds images, whose features it does not.
        keep: Features of so many of these.
    """
    with storage.node_copy(file.uri) as path:
        if file.uri.endswith(_OURS):
            state = safetensors.torch.load(path.read_bytes())
            return Reference.of(Measured(extractor, keep).load_state_dict(state))
        given = _statistics(path, "reference_uri", file.uri)
    spatial = None
    if extractor.spatial_dimension is not None and "mu_s" in given:
        spatial = _gaussian(given["mu_s"], given["sigma_s"])
    looked = [part.features for part in look(NpzImages(file.uri, keep))]
    return Reference(
        gaussian=_gaussian(given["mu"], given["sigma"]),
        spatial=spatial,
        features=torch.cat(looked) if looked else None,
        agreement=None,
        shown={},
    )


def _statistics(path: Path, field: str, uri: str) -> dict[str, NDArray[Any]]:
    """Those of an ``.npz``; nothing in it is unpickled."""
    wanted = ("mu", "sigma", "mu_s", "sigma_s")
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in wanted if name in file}
    except (ValueError, OSError, EOFError) as error:
        raise InvalidInputError(field, uri, f"not an .npz: {error}", "Mend the file") from error
    missing = [name for name in wanted[:2] if name not in found]
    remedy = "Use one that ADM's evaluator reads, e.g. VIRTUAL_imagenet256_labeled.npz"
    require(not missing, field, uri, f"it lacks {' and '.join(missing)}", remedy)
    return found


def _gaussian(mean: NDArray[Any], covariance: NDArray[Any]) -> Gaussian:
    return Gaussian(*(torch.from_numpy(a.astype(np.float64)) for a in (mean, covariance)))


def _facts(path: Path, field: str, uri: str) -> dict[str, str]:
    """What a file of ours says of itself."""
    try:
        with safetensors.safe_open(str(path), "pt") as file:
            facts = file.metadata() or {}
    except SafetensorError as error:
        raise InvalidInputError(field, uri, f"damaged: {error}", "Make it again") from error
    problem = "no reference of jobs/reference.py"
    require(_EXTRACTOR in facts, field, uri, problem, "Give one, or a name that is free")
    return facts
