"""The sample sheet, as another program reads it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from facm_platform.evaluation.sheet import Group, draw_sheet, sheet_size


def images(value: int, channels: int = 1, size: int = 8) -> dict[tuple[int, int], torch.Tensor]:
    return {
        (label, number): torch.full((channels, size, size), value + label, dtype=torch.uint8)
        for label in range(4)
        for number in range(2)
    }


def test_size_and_content(tmp_path: Path) -> None:
    groups = [Group("real", "", images(10)), Group("student", "1 step", images(90))]
    draw_sheet(tmp_path / "sheet.png", groups, classes=4, samples=2)
    with Image.open(tmp_path / "sheet.png") as picture:
        assert picture.format == "PNG"
        assert picture.size == sheet_size(groups=2, classes=4, samples=2, image_size=8)
        pixels = np.asarray(picture.convert("RGB"))
    # Every tile is 48 × 48 pixels of exactly its value: enlarged without smoothing.
    for value in (*range(10, 14), *range(90, 94)):
        assert (pixels == value).all(axis=-1).sum() == 2 * 48 * 48
    assert pixels[0, 0].tolist() == [255, 255, 255]
    # The headings are there: ink above the first row.
    assert (pixels[:64] < 100).any()


def test_nearest_neighbour_keeps_every_pixel_a_square(tmp_path: Path) -> None:
    image = torch.arange(64, dtype=torch.uint8).reshape(1, 8, 8)
    draw_sheet(tmp_path / "sheet.png", [Group("real", "", {(0, 0): image})], classes=1, samples=1)
    pixels = np.asarray(Image.open(tmp_path / "sheet.png").convert("L"))
    height, width = pixels.shape
    right = width - 18 - (124 - 48) // 2  # in the middle of what its subheading needs
    tile = pixels[height - 18 - 48 : height - 18, right - 48 : right]
    assert np.array_equal(tile, np.kron(image[0].numpy(), np.ones((6, 6), np.uint8)))


def test_subheadings_of_narrow_groups_stay_apart(tmp_path: Path) -> None:
    image = {(0, 0): torch.zeros(1, 8, 8, dtype=torch.uint8)}
    groups = [Group("student", f"{steps} steps · FID 16.47", image) for steps in (40, 50)]
    draw_sheet(tmp_path / "sheet.png", groups, classes=1, samples=1)
    pixels = np.asarray(Image.open(tmp_path / "sheet.png").convert("L"))
    inked = np.flatnonzero((pixels[40:60] < 200).any(axis=0))
    # One gap, wider than those between words.
    assert (np.diff(inked) > 12).sum() == 1


def test_colour_images_and_missing_ones(tmp_path: Path) -> None:
    some = {key: image for key, image in images(50, channels=3, size=32).items() if key[1] == 0}
    draw_sheet(tmp_path / "sheet.png", [Group("a", "b", some)], classes=3, samples=2)
    with Image.open(tmp_path / "sheet.png") as picture:
        assert picture.size == sheet_size(groups=1, classes=3, samples=2, image_size=32)
