"""Pixels of an image: the crop of ADM, and what is no image."""

from __future__ import annotations

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from facm_platform.latents.images import BrokenImageError
from facm_platform.latents.images.pixels import decode
from tests.latents.pictures import encoded, photo


def adm(image: Image.Image, size: int) -> NDArray[np.float32]:
    """The transformation of ADM's ImageDataset, step by step as it is described there."""
    pil = image.convert("RGB")
    while min(*pil.size) >= 2 * size:
        pil = pil.resize(tuple(x // 2 for x in pil.size), resample=Image.BOX)
    scale = size / min(*pil.size)
    pil = pil.resize(tuple(round(x * scale) for x in pil.size), resample=Image.BICUBIC)
    array = np.array(pil)
    y, x = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    cropped = array[y : y + size, x : x + size].astype(np.float32) / 127.5 - 1
    return np.transpose(cropped, [2, 0, 1])


@pytest.mark.parametrize("size", [8, 31, 64])
@pytest.mark.parametrize("shape", [(47, 33), (33, 47), (131, 64), (64, 64), (9, 301), (200, 203)])
def test_the_crop_is_that_of_adm(shape: tuple[int, int], size: int) -> None:
    image = photo(*shape)
    pixels = decode(encoded(image, "PNG"), size)

    assert (pixels.shape, pixels.dtype) == ((3, size, size), np.float32)
    assert np.array_equal(pixels, adm(image, size))


def test_the_range_of_the_pixels() -> None:
    values = np.array([0, 51, 255], np.uint8).repeat(3).reshape(1, 3, 3).repeat(3, 0)
    pixels = decode(encoded(Image.fromarray(values), "BMP"), 3)
    assert pixels[:, 1, :].tolist() == [[-1.0, pytest.approx(-0.6), 1.0]] * 3


def with_alpha(mode: str) -> Image.Image:
    image = photo(13, 11).convert(mode)
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


@pytest.mark.parametrize(
    ("mode", "content"),
    [
        ("1", encoded(photo(13, 11).convert("1"), "PNG")),
        ("L", encoded(photo(13, 11).convert("L"), "JPEG")),
        ("LA", encoded(with_alpha("LA"), "PNG")),
        ("P", encoded(photo(13, 11).quantize(16), "GIF")),
        ("P", encoded(photo(13, 11).quantize(4), "PNG", transparency=bytes([0, 128, 255, 255]))),
        ("PA", encoded(photo(13, 11).quantize(16).convert("PA"), "TIFF")),
        ("RGB", encoded(photo(13, 11), "WEBP")),
        ("RGB", encoded(photo(13, 11), "PPM")),
        ("RGB", encoded(photo(13, 11), "JPEG", progressive=True)),
        ("RGBA", encoded(with_alpha("RGB"), "PNG")),
    ],
)
def test_every_kind_of_colours_becomes_rgb(mode: str, content: bytes) -> None:
    with Image.open(io.BytesIO(content)) as image, warnings.catch_warnings():
        assert image.mode == mode
        warnings.simplefilter("ignore")
        expected = adm(image, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(decode(content, 8), expected)


def test_the_second_picture_of_a_camera_is_no_animation() -> None:
    content = encoded(photo(13, 11), "MPO", save_all=True, append_images=[photo(13, 11, 1)])
    first = encoded(photo(13, 11), "JPEG")
    assert np.array_equal(decode(content, 8), decode(first, 8))


def png(width: int, height: int, depth: int, colours: int, rows: bytes) -> bytes:
    """A PNG that Pillow does not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    head = struct.pack(">IIBBBBB", width, height, depth, colours, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def test_16_bit_colours_are_refused() -> None:
    """Pillow reads them as 8-bit RGB without a word."""
    values = np.random.default_rng(0).integers(0, 1 << 16, (8, 8, 3), dtype=np.uint16)
    content = png(8, 8, 16, 2, b"".join(b"\0" + row.astype(">u2").tobytes() for row in values))
    with pytest.raises(BrokenImageError, match="16 bits a channel"):
        decode(content, 8)


ANIMATED = {"save_all": True, "append_images": [photo(13, 11, 1)]}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"This is not an image.\n" * 9, "not an image of a known format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image of a known format"),
        (encoded(photo(64, 64), "JPEG")[:-400], r"damaged \(image file is truncated"),
        (encoded(photo(13, 11), "PNG")[:-40], r"damaged \(image file is truncated"),
        (encoded(photo(13, 11).convert("CMYK"), "JPEG"), "colours of mode CMYK, not 8-bit"),
        (encoded(photo(13, 11).convert("L").convert("I;16"), "PNG"), "colours of mode I;16"),
        (encoded(photo(13, 11).convert("I"), "TIFF"), "colours of mode I, not"),
        (encoded(photo(13, 11).convert("F"), "TIFF"), "colours of mode F, not"),
        (encoded(photo(13, 11), "GIF", **ANIMATED), "animated"),
        (encoded(photo(13, 11), "PNG", **ANIMATED), "animated"),
        (encoded(photo(13, 11), "WEBP", **ANIMATED), "animated"),
        (encoded(photo(13, 11), "TIFF", **ANIMATED), "animated, or of several pages"),
        (png(20_000, 20_000, 8, 2, b""), "too many pixels"),
        (png(10_000, 10_000, 8, 2, b""), "too many pixels"),
        (png(0, 8, 8, 2, b""), "not an image of a known format"),
        (png(1, 2_000_000, 1, 0, bytes(4_000_000)), r"too many pixels \(8 x 16000000\)"),
    ],
)
def test_what_is_broken_says_why_in_a_line(content: bytes, reason: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with pytest.raises(BrokenImageError, match=f"^{reason}") as caught:
            decode(content, 8)
    assert len(str(caught.value).splitlines()) == 1
    assert "0x" not in str(caught.value)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM"])
def test_no_truncated_image_passes_for_a_whole_one(format: str) -> None:
    content = encoded(photo(13, 11), format)
    whole = decode(content, 8)
    survivors = 0
    for length in range(len(content)):
        try:
            # What may be missing is the end of the file, behind the last pixel.
            assert np.array_equal(decode(content[:length], 8), whole)
            survivors += 1
        except BrokenImageError:
            continue
    assert survivors <= 20
