"""The bytes of an image file to the pixels that the autoencoder sees."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from facm_platform.latents.images.base import BrokenImageError

IMAGE_SUFFIXES = (
    ".bmp",
    ".gif",
    ".jpeg",
    ".jpg",
    ".png",
    ".ppm",
    ".tif",
    ".tiff",
    ".webp",
)

# No others, whatever the name of the file says: some of Pillow's formats run other programs.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")

_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA")

# From here on Pillow suspects a file made to fill the memory; as RGB 256 MiB.
_MAX_PIXELS = (256 << 20) // 3


def decode(content: bytes, size: int) -> NDArray[np.float32]:
    """The central square of the image in the file `content`: float32 (3, size, size) in [-1, 1].

    Pixels as ADM prepared them (arXiv 2105.05233, image_datasets.py of its code), on whose crop
    the published ImageNet statistics rest: transparency is dropped, not blended, and the
    orientation in a photograph's metadata is not applied.

    Raises:
        BrokenImageError: empty, damaged or truncated, of another format or colour space than
            8-bit grey, palette or RGB, animated, or too large.
    """
    if not content:
        raise BrokenImageError("empty")
    try:
        square = _centre_crop(_rgb(content), size)
    except (BrokenImageError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise BrokenImageError("not an image of a known format") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BrokenImageError("too many pixels") from error
    except Exception as error:
        # Pillow's readers meet damage with errors of a dozen types.
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise BrokenImageError(f"damaged ({reason})") from error
    values = np.asarray(square).astype(np.float32) / 127.5 - 1
    return np.ascontiguousarray(values.transpose(2, 0, 1))


def _rgb(content: bytes) -> Image.Image:
    with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
        _check_pixels(*image.size)
        if image.mode not in _MODES:
            raise BrokenImageError(f"colours of mode {image.mode}, not 8-bit grey, palette or RGB")
        # Pillow would reduce these while it reads, and call the mode RGB.
        if any(";16" in str(tile) for tile in image.tile):
            raise BrokenImageError("16 bits a channel, not 8")
        # The second picture of an MPO is a camera's other eye or preview, not a next frame.
        if image.format != "MPO" and getattr(image, "is_animated", False):
            raise BrokenImageError("animated, or of several pages")
        image.load()
        # Pillow would warn that it is dropped.
        image.info.pop("transparency", None)
        return image.convert("RGB")


def _centre_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's: halved while twice too large, the rest bicubic, then the middle of the long side."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    _check_pixels(width, height)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _check_pixels(width: int, height: int) -> None:
    if width * height > _MAX_PIXELS:
        raise BrokenImageError(f"too many pixels ({width} x {height})")
