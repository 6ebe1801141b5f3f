"""The sample sheet: a picture for the eye, one row per class, one group of columns per sampler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

_BACKGROUND, _INK, _FAINT = (255, 255, 255), (28, 32, 40), (118, 126, 140)
_TILE_PIXELS = 48  # an image is enlarged by the whole factor that comes nearest to this
_GAP, _GROUP_GAP, _MARGIN = 3, 22, 18
_HEADING, _LABEL_WIDTH = 46, 34
_FONT, _SMALL_FONT = 15, 12


@dataclass(frozen=True)
class Group:
    """Columns of the sheet.

    Attributes:
        heading: First line above them, e.g. ``student``.
        subheading: Second line, e.g. ``1 step``.
        images: uint8 (C, H, W) by (label, number among that label).
    """

    heading: str
    subheading: str
    images: Mapping[tuple[int, int], Tensor]


def sheet_size(groups: int, classes: int, samples: int, image_size: int) -> tuple[int, int]:
    """Width and height in pixels of the sheet that `draw_sheet` makes."""
    tile = image_size * _scale(image_size)
    group_width = samples * tile + (samples - 1) * _GAP
    width = 2 * _MARGIN + _LABEL_WIDTH + groups * group_width + (groups - 1) * _GROUP_GAP
    height = 2 * _MARGIN + _HEADING + classes * tile + (classes - 1) * _GAP
    return width, height


def draw_sheet(path: Path, groups: Sequence[Group], classes: int, samples: int) -> None:
    """Write the sheet as a PNG.

    Args:
        path: File to write.
        groups: From left to right; the same noise stands in the same place of every group.
        classes: Number of rows, labels 0 … classes − 1.
        samples: Columns of a group. An image that a group lacks stays empty.
    """
    size = max(image.shape[-1] for group in groups for image in group.images.values())
    tile = size * _scale(size)
    sheet = Image.new("RGB", sheet_size(len(groups), classes, samples, size), _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    font, small = ImageFont.load_default(_FONT), ImageFont.load_default(_SMALL_FONT)
    group_width = samples * tile + (samples - 1) * _GAP
    top = _MARGIN + _HEADING
    for label in range(classes):
        middle = top + label * (tile + _GAP) + tile // 2
        draw.text((_MARGIN + 8, middle), str(label), _FAINT, font, anchor="lm")
    for index, group in enumerate(groups):
        left = _MARGIN + _LABEL_WIDTH + index * (group_width + _GROUP_GAP)
        centre = left + group_width // 2
        draw.text((centre, _MARGIN + 8), group.heading, _INK, font, anchor="mm")
        draw.text((centre, _MARGIN + 28), group.subheading, _FAINT, small, anchor="mm")
        for (label, number), image in group.images.items():
            if label < classes and number < samples:
                place = (left + number * (tile + _GAP), top + label * (tile + _GAP))
                sheet.paste(_enlarged(image), place)
    sheet.save(path, optimize=True)


def _scale(image_size: int) -> int:
    return max(1, round(_TILE_PIXELS / image_size))


def _enlarged(image: Tensor) -> Image.Image:
    """RGB, every pixel a crisp square."""
    channels, height, width = image.shape
    rgb = image.expand(3, -1, -1) if channels == 1 else image[:3]
    pixels = rgb.permute(1, 2, 0).contiguous().to(torch.uint8).numpy()
    scale = _scale(max(height, width))
    picture = Image.fromarray(pixels, "RGB")
    return picture.resize((width * scale, height * scale), Image.Resampling.NEAREST)
