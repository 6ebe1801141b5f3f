"""What a latent set consists of. A set without a manifest does not exist."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from facm_core.errors import InvalidInputError, require
from facm_platform import storage
from facm_platform.latents.statistics import ChannelStatistics
from facm_platform.latents.tables import RowFormat

if TYPE_CHECKING:
    from torch import Tensor

MANIFEST = "manifest.json"
SCHEMA_VERSION = 1
GIVEN = ", given normalisation"
"""Ends `created_by` of a set whose normalisation is not of its rows."""

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
class Quarantined:
    """An input that is not in the set.

    Attributes:
        key: Where it comes from.
        reason: What is wrong with it.
    """

    key: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class LatentManifest(RowFormat):
    """The contents of a latent set, and how to normalise them.

    Attributes:
        rows: Rows over all parts.
        mean: Per channel, over every row (and its mirror image, where there is one), of the
            latents as a network sees them; or the autoencoder's or the teacher's own.
        std: Population standard deviation per channel, over the same.
        autoencoder_id: ``identity`` or the address of the weights.
        autoencoder_sha256: Hash of that autoencoder.
        parts: In the order of the rows.
        encoding_sha256: Hash of all that determines the contents; equal ones need no new encoding.
        created_by: Tool and version, and whether the normalisation was given.
        class_names: Meaning of the labels, where it is known.
        quarantined: Inputs that could not be read.
    """

    schema_version: int = SCHEMA_VERSION
    rows: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    autoencoder_id: str
    autoencoder_sha256: str
    parts: tuple[Part, ...]
    encoding_sha256: str
    created_by: str
    class_names: tuple[str, ...] = ()
    quarantined: tuple[Quarantined, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        part_rows = sum(part.rows for part in self.parts)
        names = [part.name for part in self.parts]
        channels = self.latent_shape[:1]
        for holds, name, problem in (
            (self.rows > 0, "rows", "the set has no rows"),
            (self.rows == part_rows, "rows", f"the parts hold {part_rows} rows"),
            (len(set(names)) == len(names), "parts", "a part is listed twice"),
            ((len(self.mean),) == channels, "mean", "not one number for each channel"),
            ((len(self.std),) == channels, "std", "not one number for each channel"),
            (all(map(math.isfinite, self.mean)), "mean", "not finite"),
            (all(math.isfinite(s) and s > 0 for s in self.std), "std", "not finite and positive"),
            (
                len(self.class_names) in (0, self.num_classes),
                "class_names",
                f"not one for each of num_classes = {self.num_classes}",
            ),
        ):
            require(holds, name, getattr(self, name), problem, _RESTORE)

    @property
    def row_format(self) -> RowFormat:
        """The columns of every part."""
        return RowFormat(**{f.name: getattr(self, f.name) for f in dataclasses.fields(RowFormat)})

    @staticmethod
    def of(
        format: RowFormat,
        made: Iterable[tuple[Part, ChannelStatistics]],
        **fields: Any,
    ) -> LatentManifest:
        """The manifest of the given parts, whose statistics are merged; other fields are given,
        among them `mean` and `std` where those of the rows are not used.
        """
        parts = []
        statistics = ChannelStatistics.empty(format.latent_shape[0])
        for part, of_part in made:
            parts.append(part)
            statistics = statistics.merge(of_part)
        computed: dict[str, Any] = {"rows": sum(part.rows for part in parts)}
        if "std" not in fields:
            computed["mean"] = tuple(statistics.mean.tolist())
            computed["std"] = tuple(statistics.std().tolist())
        return LatentManifest(
            **{f.name: getattr(format, f.name) for f in dataclasses.fields(RowFormat)},
            **computed | fields,
            parts=tuple(parts),
        )

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
        extra = sorted(filter(is_part, sizes.keys() - {part.name for part in manifest.parts}))
        require(
            not extra,
            field,
            uri,
            f"{', '.join(extra[:3])}: {len(extra)} part(s) that the manifest does not know",
            "Remove them, or restore the manifest they belong to",
        )
        return manifest

    def save(self, uri: str) -> None:
        """Write the manifest, atomically. To be called last: it is what makes the set exist.

        Raises:
            FileExistsError: a manifest is there already, perhaps written in the same moment.
        """
        text = json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True, allow_nan=False)
        storage.create_bytes(storage.join(uri, MANIFEST), f"{text}\n".encode())

    @cached_property
    def sha256(self) -> str:
        """Hash of the canonical JSON: the identity of the set, its parts included."""
        values = dataclasses.asdict(self)
        canonical = json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(canonical.encode()).hexdigest()

    def normalise(self, latents: Tensor) -> Tensor:
        """(latents - mean) / std per channel, for (B, C, H, W) of any float type; float32."""
        values, mean, std = self._prepared(latents)
        return values.sub_(mean).div_(std)

    def denormalise(self, latents: Tensor) -> Tensor:
        """latents * std + mean per channel, for (B, C, H, W) of any float type; float32."""
        values, mean, std = self._prepared(latents)
        return values.mul_(std).add_(mean)

    def _prepared(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A float32 copy to be changed in place (memory is slower than arithmetic), mean, std."""
        import torch  # seconds, which processes that only read rows need not spend

        values = latents.to(torch.float32, copy=True)
        mean, std = (values.new_tensor(each)[:, None, None] for each in (self.mean, self.std))
        return values, mean, std


def part_name(index: int) -> str:
    """File name of part number `index`."""
    return f"part-{index:05d}.parquet"


def is_part(name: str) -> bool:
    """Whether a file of that name is a part of a set."""
    return re.fullmatch(r"part-\d{5,}\.parquet", name) is not None


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
        quarantined = tuple(Quarantined(**entry) for entry in values.pop("quarantined"))
        return LatentManifest(parts=parts, quarantined=quarantined, **_frozen(values))
    except InvalidInputError as error:
        problem = f"{error.field} = {error.value!r}: {error.problem}"
        raise InvalidInputError(field, manifest_uri, problem, error.remedy) from None
    except (KeyError, TypeError, AttributeError) as error:
        problem = f"not a manifest of a latent set ({error})"
        raise InvalidInputError(field, manifest_uri, problem, _RESTORE) from None


def _frozen(values: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
