"""Which images: the configuration, and the source that it names."""

from __future__ import annotations

from dataclasses import dataclass

from facm_core.errors import require, require_one_of
from facm_platform.latents.images.base import ImageSource
from facm_platform.latents.images.digits import DigitImages
from facm_platform.latents.images.folder import folder_images
from facm_platform.latents.images.parquet import parquet_images
from facm_platform.latents.images.webdataset import webdataset_images

KINDS = ("digits", "folder", "parquet", "webdataset")

_COUNTED = ("parquet", "webdataset")


@dataclass(frozen=True, kw_only=True)
class ImagesConfig:
    """Where images come from.

    Attributes:
        kind: ``digits`` (scikit-learn's, for trials), ``folder`` (image files, a folder for each
            class), ``parquet`` or ``webdataset`` (tar archives).
        uri: Folder or ``s3://`` address of the images, or of one archive; not for digits.
        size: Pixels of the side of the square that is cut from the middle; not for digits.
        num_classes: Labels are in [0, num_classes); for parquet and webdataset only.
        image_column: Column of encoded images; for parquet only.
        label_column: Column of integer labels; for parquet only.
    """

    kind: str = "digits"
    uri: str = ""
    size: int = 0
    num_classes: int = 0
    image_column: str = "image"
    label_column: str = "label"

    def __post_init__(self) -> None:
        require_one_of("kind", self.kind, KINDS)
        for name in ("size", "num_classes"):
            value = getattr(self, name)
            require(value >= 0, name, value, "negative", "Give at least 1")
        self._check("uri", is_needed=self.kind != "digits")
        self._check("size", is_needed=self.kind != "digits")
        self._check("num_classes", is_needed=self.kind in _COUNTED)
        for name in ("image_column", "label_column"):
            if self.kind != "parquet":
                self._check(name, is_needed=False)
        column = self.label_column
        problem = "the column of the images"
        require(column != self.image_column, "label_column", column, problem, "Name another one")

    def _check(self, name: str, *, is_needed: bool) -> None:
        value = getattr(self, name)
        is_given = value != getattr(ImagesConfig, name)
        needed = "needs it" if is_needed else "has no use for it"
        remedy = f"Give {name}" if is_needed else "Leave it away"
        require(is_given == is_needed, name, value, f"kind={self.kind} {needed}", remedy)


def image_source(config: ImagesConfig, field: str = "source") -> ImageSource:
    """The source that `config` names, once it has been looked at: reachable, and not empty.

    Args:
        config: Which.
        field: Name of `config` in the whole configuration, for errors now and later.

    Raises:
        InvalidInputError: nothing there, or not what the kind says, as far as the names of the
            files and the columns of the first one tell.
    """
    if config.kind == "folder":
        return folder_images(config.uri, config.size, field)
    if config.kind == "parquet":
        columns = (config.image_column, config.label_column)
        return parquet_images(config.uri, config.size, config.num_classes, *columns, field)
    if config.kind == "webdataset":
        return webdataset_images(config.uri, config.size, config.num_classes, field)
    return DigitImages()
