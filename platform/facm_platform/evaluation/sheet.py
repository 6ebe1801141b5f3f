"""The sample sheet: a picture for the eye, one row per class, one group of columns per sampler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

_BACKGROUND, _INK, _FAINT = (255, 255, 255), (28, 32, 40), (118, 126, 140)
_TILE_PIXELS = 48  # an image is enlarged by the whole factor that comes nearest to this
_GAP, _GROUP_GAP, _MARGIN = 3, 22, 18
_HEADING, _LABEL_WIDTH = 46, 34
_FONT, _SMALL_FONT = 15, 12
_GROUP_WIDTH = 124  # at least, for its subheading


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
    group_width = max(_GROUP_WIDTH, _images_width(samples, tile))
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
    group_width = max(_GROUP_WIDTH, _images_width(samples, tile))
    top = _MARGIN + _HEADING
    for label in range(classes):
        middle = top + label * (tile + _GAP) + tile // 2
        draw.text((_MARGIN + 8, middle), str(label), _FAINT, font, anchor="lm")
    for index, group in enumerate(groups):
        left = _MARGIN + _LABEL_WIDTH + index * (group_width + _GROUP_GAP)
        centre = left + group_width // 2
        left = centre - _images_width(samples, tile) // 2
        draw.text((centre, _MARGIN + 8), group.heading, _INK, font, anchor="mm")
        draw.text((centre, _MARGIN + 28), group.subheading, _FAINT, small, anchor="mm")
        for (label, number), image in group.images.items():
            if label < classes and number < samples:
                place = (left + number * (tile + _GAP), top + label * (tile + _GAP))
                sheet.paste(_enlarged(image), place)
    sheet.save(path, optimize=True)


def _images_width(samples: int, tile: int) -> int:
    return samples * tile + (samples - 1) * _GAP


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


# Of a sheet of prompts.
_LARGEST_TILE, _COLUMN_WIDTH, _PROMPT_WIDTH, _CAPTION = 256, 150, 250, 16


@dataclass(frozen=True)
class Column:
    """Of a sheet of prompts.

    Attributes:
        heading: First line above it, e.g. ``student``.
        subheading: Second line, e.g. ``2 steps``.
        note: Third line, e.g. of its scores; maybe empty.
        images: uint8 (C, H, W), one a prompt.
        captions: What stands below each of them, maybe nothing.
    """

    heading: str
    subheading: str
    note: str
    images: Sequence[Tensor]
    captions: Sequence[str]


def draw_prompt_sheet(path: Path, prompts: Sequence[str], columns: Sequence[Column]) -> None:
    """Write a PNG: a row for each prompt, which stands at its left.

    Args:
        path: File to write.
        prompts: From top to bottom.
        columns: From left to right; images larger than 256 pixels are made smaller.
    """
    sizes = [_picture(image).size for column in columns for image in column.images]
    tile, height = (max(side) for side in zip(*sizes, strict=True))
    width = max(tile, _COLUMN_WIDTH)
    caption = _CAPTION if any(any(column.captions) for column in columns) else 0
    heading = _HEADING + (20 if any(column.note for column in columns) else 0)
    first, row_height = _MARGIN + _PROMPT_WIDTH, height + caption + 2 * _GAP
    size = (
        first + len(columns) * (width + _GROUP_GAP) - _GROUP_GAP + _MARGIN,
        2 * _MARGIN + heading + len(prompts) * row_height,
    )
    sheet = Image.new("RGB", size, _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    # Prompts, and ×, have more letters than Pillow's own font.
    file = str(Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"))
    font, small = (ImageFont.truetype(file, pixels) for pixels in (_FONT - 1, _SMALL_FONT - 1))
    line = _SMALL_FONT + 4
    for row, prompt in enumerate(prompts):
        top = _MARGIN + heading + row * row_height
        lines = _wrapped(prompt, small, _PROMPT_WIDTH - _GROUP_GAP, row_height // line)
        middle = top + height // 2 - (len(lines) - 1) * line // 2
        for number, text in enumerate(lines):
            draw.text((_MARGIN, middle + number * line), text, _INK, small, anchor="lm")
    for index, column in enumerate(columns):
        left = first + index * (width + _GROUP_GAP)
        centre = left + width // 2
        draw.text((centre, _MARGIN + 8), column.heading, _INK, font, anchor="mm")
        for number, text in enumerate((column.subheading, column.note)):
            draw.text((centre, _MARGIN + 28 + 18 * number), text, _FAINT, small, anchor="mm")
        for row, (image, text) in enumerate(zip(column.images, column.captions, strict=True)):
            top = _MARGIN + heading + row * row_height
            sheet.paste(_picture(image), (centre - tile // 2, top))
            draw.text((centre, top + height + _CAPTION // 2), text, _FAINT, small, anchor="mm")
    sheet.save(path, optimize=True)


def _picture(image: Tensor) -> Image.Image:
    """Enlarged, or no larger than a tile may be."""
    picture = _enlarged(image)
    picture.thumbnail((_LARGEST_TILE, _LARGEST_TILE), Image.Resampling.LANCZOS)
    return picture


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int, lines: int) -> list[str]:
    """So many lines of so many pixels, broken between words if it can be; what is cut off: …"""
    found = [""]
    for word in text.split():
        if found[-1] and font.getlength(f"{found[-1]} {word}") <= width:
            found[-1] += f" {word}"
            continue
        found.append("")
        for letter in word:
            if font.getlength(found[-1] + letter) > width:
                found.append("")
            found[-1] += letter
    found = list(filter(None, found))
    if len(found) <= lines:
        return found
    last = found[lines - 1]
    while last and font.getlength(f"{last}…") > width:
        last = last[:-1]
    return [*found[: lines - 1], f"{last}…"]
