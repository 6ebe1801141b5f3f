"""Which images: the configuration, and the source that it names."""

from __future__ import annotations

from dataclasses import dataclass

from facm_core.errors import InvalidInputError, require, require_one_of
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
        num_classes: Labels are in [0, num_classes); for parquet and webdataset only, where labels
            are read.
        image_column: Column of encoded images; for parquet only.
        label_column: Column of integer labels; for parquet only, where labels are read.
        text_column: Column of texts; for parquet only, where texts are read.
    """

    kind: str = "digits"
    uri: str = ""
    size: int = 0
    num_classes: int = 0
    image_column: str = "image"
    label_column: str = "label"
    text_column: str = ""

    def __post_init__(self) -> None:
        require_one_of("kind", self.kind, KINDS)
        for name in ("size", "num_classes"):
            value = getattr(self, name)
            require(value >= 0, name, value, "negative", "Give at least 1")
        self._check("uri", is_needed=self.kind != "digits")
        self._check("size", is_needed=self.kind != "digits")
        if self.kind not in _COUNTED:
            self._check("num_classes", is_needed=False)
        for name in ("image_column", "label_column", "text_column"):
            if self.kind != "parquet":
                self._check(name, is_needed=False)
        for name in ("label_column", "text_column"):
            column, problem = getattr(self, name), "the column of the images"
            require(column != self.image_column, name, column, problem, "Name another one")

    def check_read(self, *, labels: bool, texts: bool) -> None:
        """Raise `InvalidInputError` unless what is given is what reading these takes."""
        problem = "there are no texts beside its images"
        remedy = "Use another kind, or the names of its classes"
        require(not texts or self.kind != "digits", "kind", self.kind, problem, remedy)
        if self.kind in _COUNTED:
            self._check("num_classes", is_needed=labels)
        if self.kind == "parquet":
            self._check("text_column", is_needed=texts)
            if not labels:
                self._check("label_column", is_needed=False)

    def _check(self, name: str, *, is_needed: bool) -> None:
        value = getattr(self, name)
        is_given = value != getattr(ImagesConfig, name)
        needed = "needs it" if is_needed else "has no use for it"
        remedy = f"Give {name}" if is_needed else "Leave it away"
        require(is_given == is_needed, name, value, f"kind={self.kind} {needed}", remedy)


def image_source(
    config: ImagesConfig, field: str = "source", *, labels: bool = True, texts: bool = False
) -> ImageSource:
    """The source that `config` names, once it has been looked at: reachable, and not empty.

    Args:
        config: Which.
        field: Name of `config` in the whole configuration, for errors now and later.
        labels: Whether labels are needed; what is stored with each image is not read without need.
        texts: Whether the texts beside the images are needed.

    Raises:
        InvalidInputError: options that reading these has no use for, or needs; nothing there, or
            not what the kind says, as far as the names of the files and the columns of the first
            one tell.
    """
    try:
        config.check_read(labels=labels, texts=texts)
    except InvalidInputError as error:
        raise error.inside(field) from None
    uri, size, classes = config.uri, config.size, config.num_classes
    if config.kind == "folder":
        return folder_images(uri, size, texts, field)
    if config.kind == "parquet":
        columns = (config.image_column, config.label_column, config.text_column)
        return parquet_images(uri, size, classes, *columns, field)
    if config.kind == "webdataset":
        return webdataset_images(uri, size, classes, texts, field)
    return DigitImages()
