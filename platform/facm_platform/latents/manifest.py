"""What a latent set consists of. A set without a manifest does not exist."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from numpy.typing import NDArray

from facm_core.errors import InvalidInputError, require, require_one_of
from facm_platform import storage
from facm_platform.latents.tables import COLUMNS, DTYPES, LatentShape

if TYPE_CHECKING:
    from torch import Tensor

MANIFEST = "manifest.json"
SCHEMA_VERSION = 1

_RESTORE = "Restore the file, or encode the set again with jobs/encode.py and overwrite=true"


@dataclass(frozen=True, kw_only=True)
class Part:
    """One Parquet file of a set.

    Attributes:
        name: File name inside the folder of the set.
        rows: Rows in the file.
        bytes: Size of the file.
        sha256: Hash of the file.
        row_groups: Rows of each of its row groups, in order.
    """

    name: str
    rows: int
    bytes: int
    sha256: str
    row_groups: tuple[int, ...]

    def __post_init__(self) -> None:
        require(
            self.rows == sum(self.row_groups) and all(rows > 0 for rows in self.row_groups),
            f"parts[{self.name}].row_groups",
            self.row_groups,
            f"they do not add up to the part's {self.rows} rows",
            _RESTORE,
        )


@dataclass(frozen=True, kw_only=True)
class LatentManifest:
    """The contents of a latent set, and how to normalise them.

    Attributes:
        rows: Rows over all parts.
        latent_shape: (C, H, W) of one latent.
        latent_dtype: ``float32`` or ``float16``, as stored.
        num_classes: Labels are in [0, num_classes).
        mean: Per channel, over every row, of the stored values.
        std: Population standard deviation per channel, over every row.
        autoencoder_id: Name for `facm_core.autoencoders.load_autoencoder`.
        autoencoder_sha256: Hash of that autoencoder.
        columns: Columns of every part.
        parts: In the order of the rows.
        encoding_sha256: Hash of all that determines the contents; equal ones need no new encoding.
        created_by: Tool and version.
    """

    schema_version: int = SCHEMA_VERSION
    rows: int
    latent_shape: LatentShape
    latent_dtype: str
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    autoencoder_id: str
    autoencoder_sha256: str
    columns: tuple[str, ...] = COLUMNS
    parts: tuple[Part, ...]
    encoding_sha256: str
    created_by: str

    def __post_init__(self) -> None:
        part_rows = sum(part.rows for part in self.parts)
        names = [part.name for part in self.parts]
        channels = self.latent_shape[:1]
        for holds, name, problem in (
            (len(self.latent_shape) == 3, "latent_shape", "not of the form (C, H, W)"),
            (self.rows > 0, "rows", "the set has no rows"),
            (self.rows == part_rows, "rows", f"the parts hold {part_rows} rows"),
            (len(set(names)) == len(names), "parts", "a part is listed twice"),
            (self.num_classes > 0, "num_classes", "not positive"),
            ((len(self.mean),) == channels, "mean", "not one number for each channel"),
            ((len(self.std),) == channels, "std", "not one number for each channel"),
            (all(map(math.isfinite, self.mean)), "mean", "not finite"),
            (all(math.isfinite(s) and s > 0 for s in self.std), "std", "not finite and positive"),
            (set(COLUMNS) <= set(self.columns), "columns", f"lacks one of {', '.join(COLUMNS)}"),
        ):
            require(holds, name, getattr(self, name), problem, _RESTORE)
        require_one_of("latent_dtype", self.latent_dtype, DTYPES)

    @staticmethod
    def load(uri: str, field: str = "data.uri") -> LatentManifest:
        """The manifest of the set at `uri`, checked against the files that lie there.

        Raises:
            InvalidInputError: no manifest, of a newer schema, inconsistent, a part missing or of
                another size, or the store cannot be reached. `field` is the one at fault.
        """
        storage.check_reachable(uri, field)
        manifest = _parse(_read(uri, field), storage.join(uri, MANIFEST), field)
        sizes = storage.list_files(uri)
        for part in manifest.parts:
            found = sizes.get(part.name)
            problem = (
                "is missing"
                if found is None
                else f"has {found} bytes where the manifest says {part.bytes}"
            )
            require(found == part.bytes, field, uri, f"the part {part.name} {problem}", _RESTORE)
        return manifest

    def save(self, uri: str) -> None:
        """Write the manifest, atomically. To be called last: it is what makes the set exist."""
        text = json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True, allow_nan=False)
        storage.write_bytes(storage.join(uri, MANIFEST), f"{text}\n".encode())

    @cached_property
    def sha256(self) -> str:
        """Hash of the canonical JSON: the identity of the set, its parts included."""
        values = dataclasses.asdict(self)
        canonical = json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(canonical.encode()).hexdigest()

    @overload
    def normalise(self, latents: Tensor) -> Tensor: ...
    @overload
    def normalise(self, latents: NDArray[np.floating[Any]]) -> NDArray[np.float32]: ...
    def normalise(self, latents: Any) -> Any:
        """(latents - mean) / std per channel, for (B, C, H, W); float32, of the kind given."""
        values, mean, std = self._prepared(latents)
        return (values - mean) / std

    @overload
    def denormalise(self, latents: Tensor) -> Tensor: ...
    @overload
    def denormalise(self, latents: NDArray[np.floating[Any]]) -> NDArray[np.float32]: ...
    def denormalise(self, latents: Any) -> Any:
        """latents * std + mean per channel, for (B, C, H, W); float32, of the kind given."""
        values, mean, std = self._prepared(latents)
        return values * std + mean

    def _prepared(self, latents: Any) -> tuple[Any, Any, Any]:
        mean = np.array(self.mean, np.float32)[:, None, None]
        std = np.array(self.std, np.float32)[:, None, None]
        if isinstance(latents, np.ndarray):
            return latents.astype(np.float32, copy=False), mean, std
        values = latents.float()
        return values, values.new_tensor(mean), values.new_tensor(std)


def _read(uri: str, field: str) -> Any:
    manifest_uri = storage.join(uri, MANIFEST)
    try:
        return json.loads(storage.read_bytes(manifest_uri))
    except FileNotFoundError:
        raise InvalidInputError(
            field,
            uri,
            f"no latent set: there is no {MANIFEST}, and a set without one does not exist",
            f"Write one with jobs/encode.py output_uri={uri}",
        ) from None
    except ValueError as error:
        raise InvalidInputError(field, manifest_uri, f"not JSON ({error})", _RESTORE) from None


def _parse(values: Any, manifest_uri: str, field: str) -> LatentManifest:
    version = values.get("schema_version") if isinstance(values, dict) else None
    require(
        version == SCHEMA_VERSION,
        field,
        manifest_uri,
        f"its schema_version is {version!r}, this program reads {SCHEMA_VERSION}",
        "Use the version of this program that wrote it, or encode the set again",
    )
    try:
        parts = tuple(Part(**_frozen(part)) for part in values.pop("parts"))
        return LatentManifest(parts=parts, **_frozen(values))
    except InvalidInputError as error:
        problem = f"{error.field} = {error.value!r}: {error.problem}"
        raise InvalidInputError(field, manifest_uri, problem, error.remedy) from None
    except (KeyError, TypeError, AttributeError) as error:
        problem = f"not a manifest of a latent set ({error})"
        raise InvalidInputError(field, manifest_uri, problem, _RESTORE) from None


def _frozen(values: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
