"""Sources of images: every image once, with its label and key, and the pixels of ADM's crop."""

from __future__ import annotations

import io
import json
import pickle
import struct
import tarfile
import tracemalloc
import warnings
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits

from facm_core.errors import InvalidInputError
from facm_platform.latents.images import (
    BrokenImageError,
    ImagesConfig,
    ImageSource,
    Sample,
    image_source,
)
from facm_platform.latents.images.pixels import decode

SIZE = 8


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Noise on a slope: no two pixels, rows or columns are the same."""
    noise = np.random.default_rng(seed).integers(0, 100, (height, width, 3))
    slope = np.linspace(0, 155, width * height).reshape(height, width, 1)
    return Image.fromarray((noise + slope).astype(np.uint8))


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def coloured(index: int) -> bytes:
    """A PNG of one colour, that of `index`."""
    return encoded(Image.new("RGB", (SIZE, SIZE), (index // 256, index % 256, 255)), "PNG")


def index_of(pixels: NDArray[np.float32]) -> int:
    """The index that the image was `coloured` by."""
    assert (pixels.shape, pixels.dtype) == ((3, SIZE, SIZE), np.float32)
    high, low, blue = np.rint((pixels[:, 0, 0] + 1) * 127.5).astype(int)
    assert blue == 255
    return int(high * 256 + low)


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


def gathered(source: ImageSource, part_rows: int, seed: int = 0) -> list[list[Sample]]:
    """The samples of every piece, each read by a copy of the source from a copy of the piece."""
    worker = pickle.dumps(source)
    assert len(worker) < 10_000
    pieces = list(source.pieces(part_rows, seed))
    assert pieces == list(source.pieces(part_rows, seed))
    return [list(pickle.loads(worker).samples(json.loads(json.dumps(p)))) for p in pieces]


def contents(samples: list[Sample]) -> dict[str, tuple[int, int | str]]:
    """By key: the label, and the index of the image or why it is broken. Loads in threads."""

    def look(sample: Sample) -> tuple[int, int | str]:
        try:
            return sample.label, index_of(sample.load())
        except BrokenImageError as error:
            return sample.label, str(error)

    with ThreadPoolExecutor(4) as pool:
        found = dict(zip((s.key for s in samples), pool.map(look, samples), strict=True))
    assert len(found) == len(samples)
    return found


class Place:
    """A folder on either kind of store, to be filled."""

    def __init__(self, uri: str) -> None:
        self.uri = uri

    def put(self, name: str, content: bytes) -> None:
        if self.uri.startswith("s3://"):
            bucket, _, prefix = self.uri.removeprefix("s3://").partition("/")
            boto3.client("s3").put_object(Bucket=bucket, Key=f"{prefix}/{name}", Body=content)
            return
        path = Path(self.uri, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    def source(self, kind: str, name: str = "", **options: Any) -> ImageSource:
        uri = f"{self.uri}/{name}" if name else self.uri
        return image_source(ImagesConfig(kind=kind, uri=uri, size=SIZE, **options), "data")


@pytest.fixture(params=["folder", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "folder":
        return Place(str(tmp_path / "images"))
    return Place(f"{request.getfixturevalue('bucket')}/some/images")


@pytest.fixture
def here(tmp_path: Path) -> Place:
    return Place(str(tmp_path / "images"))


# Pixels


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


# Digits


def test_the_digits_are_those_of_scikit_learn() -> None:
    source = image_source(ImagesConfig())
    parts = gathered(source, 500)
    samples = [sample for part in parts for sample in part]
    expected, labels = load_digits(return_X_y=True)
    images = np.stack([sample.load() for sample in samples])

    assert [len(part) for part in parts] == [500, 500, 500, 297]
    assert np.array_equal((images.reshape(-1, 64) + 1) * 8, expected)
    assert (images.shape[1:], images.dtype) == ((1, 8, 8), np.float32)
    assert (source.image_shape, source.num_classes) == ((1, 8, 8), 10)
    assert [sample.label for sample in samples] == labels.tolist()
    assert [sample.key for sample in samples[:2]] == ["digits/00000", "digits/00001"]
    assert len(source.id) > 64
    assert source.id == image_source(ImagesConfig()).id


# Folders

CLASSES = ("ant", "bee-eater", "wasp")
SUFFIXES = (".png", ".PNG", ".JPEG", ".jpg")


def fill_classes(place: Place, per_class: int) -> dict[str, tuple[int, int | str]]:
    """What `contents` finds."""
    expected: dict[str, tuple[int, int | str]] = {}
    for label, name in enumerate(CLASSES):
        for number in range(per_class):
            key = f"{name}/{'deep/er/' if number % 2 else ''}{number}{SUFFIXES[number % 4]}"
            index = label * per_class + number
            place.put(key, coloured(index))
            expected[key] = (label, index)
    for other in ("ant/0.txt", "ant/.0.png", ".hidden/0.png", "README.md", "bee-eater/.x/1.jpg"):
        place.put(other, b"no image")
    return expected


def test_a_folder_gives_every_image_once_in_mixed_pieces(place: Place) -> None:
    expected = fill_classes(place, 20)
    source = place.source("folder")
    parts = gathered(source, 16, seed=1)

    assert contents([sample for part in parts for sample in part]) == expected
    assert [len(part) for part in parts] == [16, 16, 16, 12]
    assert all({sample.label for sample in part} == {0, 1, 2} for part in parts)
    assert (source.class_names, source.num_classes) == (CLASSES, 3)
    assert source.image_shape == (3, SIZE, SIZE)
    assert source.id == f"folder(uri='{place.uri}', size=8)"
    assert list(source.pieces(16, 2)) != list(source.pieces(16, 1))


def test_blocks_of_a_folder_are_mixed_each_by_itself(here: Place) -> None:
    fill_classes(here, 50)
    parts = gathered(here.source("folder"), 1)
    keys = [sample.key for part in parts for sample in part]

    # The listing comes in blocks of 64 parts, and the order of each is one of its own.
    ordered = sorted(keys)
    assert sorted(keys[:64]) == ordered[:64]
    assert sorted(keys[128:]) == ordered[128:]
    ranks = [[ordered.index(key) - start for key in keys[start : start + 64]] for start in (0, 64)]
    assert ranks[0] != ranks[1]


def test_a_flat_folder_is_one_class_and_names_may_be_odd(place: Place) -> None:
    names = ["a.png", "b#c?d %41.png", "é.PNG", "z+&'\".png"]
    for index, name in enumerate(names):
        place.put(name, coloured(index))
    source = place.source("folder")

    assert (source.class_names, source.num_classes) == ((), 1)
    expected = {name: (0, index) for index, name in enumerate(names)}
    assert contents([sample for part in gathered(source, 3) for sample in part]) == expected


def test_broken_and_missing_files_say_so_when_they_are_loaded(place: Place) -> None:
    place.put("a/empty.jpg", b"")
    place.put("a/gone.png", coloured(0))
    place.put("a/text.jpg", b"text")
    source = place.source("folder")
    (piece,) = source.pieces(9, 0)
    piece["files"].append(["a/never.png", 0])

    found = contents(list(source.samples(piece)))
    assert found == {
        "a/empty.jpg": (0, "empty"),
        "a/gone.png": (0, 0),
        "a/text.jpg": (0, "not an image of a known format"),
        "a/never.png": (0, "missing"),
    }


def test_a_folder_that_is_no_source_is_refused(place: Place) -> None:
    with pytest.raises(InvalidInputError, match=r"data\.uri = .*images'.*nothing there"):
        place.source("folder")
    place.put("a/notes.txt", b"")
    with pytest.raises(InvalidInputError, match=r"data\.uri = .*no file below it is one of \.bmp"):
        place.source("folder")
    place.put("a/1.png", coloured(1))
    with pytest.raises(InvalidInputError, match=r"data\.uri = .*a file. Give the folder"):
        place.source("folder", "a/1.png")

    source = place.source("folder")
    place.put("b/1.png", coloured(1))
    with pytest.raises(InvalidInputError, match=r"b/1.png.*not in one of 1 class folders"):
        list(source.pieces(9, 0))
    place.put("beside.png", coloured(1))
    with pytest.raises(
        InvalidInputError, match=r"images \(beside.png\) beside class folders \(a\)"
    ):
        place.source("folder")


@pytest.mark.usefixtures("object_store")
def test_a_bucket_that_does_not_exist_is_refused() -> None:
    with pytest.raises(InvalidInputError, match=r"data\.uri = .*bucket does not exist"):
        Place("s3://no-such-bucket/images").source("folder")


def test_the_memory_of_a_listing_does_not_grow_with_it(
    here: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    here.put("class/0.jpg", b"")
    source = here.source("folder")

    def peak_bytes(names: int) -> int:
        def listing(*_: object) -> Iterator[tuple[str, int]]:
            yield from ((f"class/{number:09d}.jpg", 1) for number in range(names))

        monkeypatch.setattr("facm_platform.storage.iter_files", listing)
        tracemalloc.start()
        found = sum(len(piece["files"]) for piece in source.pieces(16, 0))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert found == names
        return peak

    assert peak_bytes(200_000) < 1.2 * peak_bytes(5_000) < 1_000_000


# Parquet

HF_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def table_file(
    start: int, stop: int, group_rows: int, type: pa.DataType = HF_IMAGE, **columns: Any
) -> bytes:
    """Rows of `coloured` images with the labels index % 7, as the bytes of a Parquet file."""
    images = [coloured(index) for index in range(start, stop)]
    values = [{"bytes": image, "path": "x.png"} for image in images] if type == HF_IMAGE else images
    table = pa.table(
        {
            "id": list(range(start, stop)),
            "image": pa.array(columns.get("image", values), type),
            "label": pa.array(columns.get("label", [i % 7 for i in range(start, stop)])),
        }
    )
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=group_rows, write_page_checksum=True)
    return buffer.getvalue()


@pytest.mark.parametrize("type", [HF_IMAGE, pa.binary(), pa.large_binary()], ids=str)
def test_parquet_files_give_every_row_once(place: Place, type: pa.DataType) -> None:
    place.put("test-0.parquet", table_file(0, 50, 8, type))
    place.put("more/test-1.parquet", table_file(50, 73, 30, type))
    place.put("_SUCCESS", b"")
    place.put(".tmp/half.parquet", b"PAR1")
    source = place.source("parquet", num_classes=7)
    parts = gathered(source, 20)

    names = ["more/test-1.parquet#{}", "test-0.parquet#{}"]
    expected = {names[1].format(row): (row % 7, row) for row in range(50)}
    expected |= {names[0].format(row): ((row + 50) % 7, row + 50) for row in range(23)}
    assert contents([sample for part in parts for sample in part]) == expected
    # Whole row groups of one file: one that is larger than a part, then some of 8 and one of 2.
    assert [len(part) for part in parts] == [23, 16, 16, 18]
    assert (source.class_names, source.num_classes) == ((), 7)
    assert source.image_shape == (3, SIZE, SIZE)


def test_other_columns_and_a_single_file(place: Place) -> None:
    table = pq.read_table(io.BytesIO(table_file(0, 5, 5))).rename_columns(["id", "jpg.x", "cls"])
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    place.put("deep/one.parquet", buffer.getvalue())
    options = {"num_classes": 7, "image_column": "jpg.x", "label_column": "cls"}
    source = place.source("parquet", "deep/one.parquet", **options)

    (part,) = gathered(source, 100)
    assert contents(part) == {f"one.parquet#{row}": (row, row) for row in range(5)}
    assert "image_column='jpg.x', label_column='cls'" in source.id


def test_rows_without_image_or_label_are_broken(here: Place) -> None:
    images = [
        None,
        {"bytes": None, "path": "x"},
        {"bytes": b"", "path": "x"},
        {"bytes": coloured(3)},
    ]
    content = table_file(0, 4, 4, image=images, label=[1, 1, 1, None])
    here.put("a.parquet", content)

    (part,) = gathered(here.source("parquet", num_classes=7), 100)
    assert contents(part) == {
        "a.parquet#0": (1, "no image"),
        "a.parquet#1": (1, "no image"),
        "a.parquet#2": (1, "empty"),
        "a.parquet#3": (-1, "no label"),
    }


@pytest.mark.parametrize("label", [7, -1])
def test_a_label_that_there_is_not_is_an_error(here: Place, label: int) -> None:
    here.put("a.parquet", table_file(0, 2, 2, label=[0, label]))
    with pytest.raises(
        InvalidInputError, match=rf"data\.num_classes = 7: the label of a.parquet#1 is {label}\. "
    ):
        gathered(here.source("parquet", num_classes=7), 100)


def test_damaged_parquet_files_are_named(here: Place) -> None:
    content = table_file(0, 50, 10)
    here.put("a.parquet", content)
    here.put("b.parquet", content[:-100])
    source = here.source("parquet", num_classes=7)
    with pytest.raises(InvalidInputError, match=r"data\.uri = .*/b.parquet': damaged \("):
        list(source.pieces(10, 0))

    here.put("b.parquet", content[:300] + bytes(200) + content[500:])
    pieces = list(source.pieces(10, 0))
    with pytest.raises(InvalidInputError, match=r"/b.parquet': damaged \("):
        [list(source.samples(piece)) for piece in pieces]

    here.put("a.parquet", table_file(0, 55, 11))
    with pytest.raises(InvalidInputError, match=r"/a.parquet': not the file that it was"):
        list(source.samples(pieces[1]))
    Path(here.uri, "a.parquet").unlink()
    with pytest.raises(InvalidInputError, match=r"/a.parquet': missing"):
        list(source.samples(pieces[1]))


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"image_column": "img"}, r"data\.image_column = 'img': .*Give one of id, image, label"),
        ({"label_column": "class"}, r"data\.label_column = 'class': .*has no such column"),
        ({"image_column": "id"}, r"data\.image_column = 'id': .*its type is int64"),
        ({"label_column": "image", "image_column": "x"}, r"data\.image_column = 'x'"),
    ],
)
def test_columns_that_are_not_there_are_refused(
    here: Place, options: dict[str, str], problem: str
) -> None:
    here.put("a.parquet", table_file(0, 3, 3))
    with pytest.raises(InvalidInputError, match=problem):
        here.source("parquet", num_classes=7, **options)


def test_a_large_row_group_is_not_held_in_memory(here: Place) -> None:
    images = [bytes(np.random.default_rng(row).bytes(100_000)) for row in range(500)]
    Path(here.uri).mkdir()
    with pq.ParquetWriter(
        f"{here.uri}/a.parquet",
        pa.schema({"image": pa.binary(), "label": pa.int64()}),
        use_dictionary=False,
        write_batch_size=16,
    ) as writer:
        writer.write_table(pa.table({"image": images, "label": [0] * 500}))
    source = here.source("parquet", num_classes=1)
    (piece,) = source.pieces(500, 0)

    before = pa.total_allocated_bytes()
    peak = max(pa.total_allocated_bytes() - before for _ in source.samples(piece))
    assert peak < 25_000_000


# WebDataset


def archive(members: list[tuple[str, bytes]], **options: Any) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **options) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def shard(start: int, stop: int) -> bytes:
    """`coloured` images with the labels index % 7, in ``.cls`` and ``.json`` by turns."""
    members: list[tuple[str, bytes]] = []
    for index in range(start, stop):
        label = (".cls", f"{index % 7}\n") if index % 2 else (".json", f'{{"label": {index % 7}}}')
        members.append((f"{index:04d}{label[0]}", label[1].encode()))
        members.append((f"{index:04d}.seg.png", b"a mask, not the image"))
        members.append((f"{index:04d}.{'png' if index % 3 else 'JPG'}", coloured(index)))
    return archive(members)


def test_archives_give_every_image_once(place: Place) -> None:
    place.put("train-0.tar", shard(0, 20))
    place.put("train-1.tar", shard(20, 33))
    place.put("README", b"")
    source = place.source("webdataset", num_classes=7)
    parts = gathered(source, 5)

    assert [len(part) for part in parts] == [20, 13]
    assert contents([sample for part in parts for sample in part]) == {
        f"train-{index // 20}.tar/{index:04d}": (index % 7, index) for index in range(33)
    }
    assert (source.class_names, source.image_shape) == ((), (3, SIZE, SIZE))


def test_names_and_members_of_all_kinds(place: Place) -> None:
    members = [
        ("./", b""),
        ("./deep/1.2.png", b"not the image of 1"),
        ("./deep/1.png", coloured(1)),
        ("./deep/._1.png", b"of a Macintosh"),
        ("./deep/1.json", b'{"cls": 3, "caption": "x"}'),
        ("./deep/1.cls", b"2"),
        ("other/1.png", coloured(2)),
        ("other/1.cls", b"0"),
        ("LICENSE", b"no dot"),
        ("n" * 200 + "é.png", coloured(3)),
        ("n" * 200 + "é.cls", b"1"),
    ]
    place.put("one.tar", archive(members))
    (part,) = gathered(place.source("webdataset", "one.tar", num_classes=7), 5)

    assert contents(part) == {
        "one.tar/deep/1": (2, 1),
        "one.tar/other/1": (0, 2),
        f"one.tar/{'n' * 200}é": (1, 3),
    }


def test_what_lacks_image_or_label_is_broken(here: Place) -> None:
    image = coloured(1)
    members = [
        ("a.png", image),
        ("b.cls", b"1"),
        ("c.cls", b"cat"),
        ("c.png", image),
        ("d.json", b"{"),
        ("d.png", image),
        ("e.json", b'{"caption": 1}'),
        ("e.png", image),
        ("f.json", b'{"label": 3.7}'),
        ("f.png", image),
        ("g.jpg", image),
        ("g.png", image),
        ("g.cls", b"1"),
        ("h.png", b""),
        ("h.cls", b"1"),
    ]
    here.put("a.tar", archive(members))
    (part,) = gathered(here.source("webdataset", num_classes=7), 5)

    assert contents(part) == {
        "a.tar/a": (-1, "no label"),
        "a.tar/b": (1, "no image"),
        "a.tar/c": (-1, "the label is no integer"),
        "a.tar/d": (-1, "the .json is damaged"),
        "a.tar/e": (-1, "no label in the .json"),
        "a.tar/f": (-1, "the label is no integer"),
        "a.tar/g": (1, "several images"),
        "a.tar/h": (1, "empty"),
    }


def test_no_truncated_archive_passes_for_a_whole_one(here: Place) -> None:
    content = shard(0, 3)
    end = len(content.rstrip(b"\0")) + 1
    here.put("a.tar", content)
    source = here.source("webdataset", num_classes=7)
    (piece,) = source.pieces(5, 0)
    # Between blocks, where no member is cut, and inside of them.
    for length in (*range(0, end, 256), end):
        here.put("a.tar", content[:length])
        with pytest.raises(InvalidInputError, match=r"data\.uri = .*a.tar': truncated or damaged"):
            list(source.samples(piece))


def test_archives_that_cannot_be_used_are_named(here: Place) -> None:
    content = shard(0, 3)
    here.put("a.tar", content)
    source = here.source("webdataset", num_classes=7)
    (piece,) = source.pieces(5, 0)

    # The header of the second image's label.
    at = content.index(b"0001.cls")
    here.put("a.tar", content[:at] + b"X" + content[at + 1 :])
    with pytest.raises(InvalidInputError, match=r"a.tar': truncated or damaged \(bad checksum"):
        list(source.samples(piece))
    unsorted = [("1.png", coloured(1)), ("2.png", coloured(2)), ("1.cls", b"1"), ("2.cls", b"1")]
    here.put("a.tar", archive(unsorted))
    with pytest.raises(InvalidInputError, match=r"a.tar': the members of 1 do not follow"):
        list(source.samples(piece))
    here.put("a.tar", archive([("1.png", coloured(1)), ("1.cls", b"7")]))
    with pytest.raises(
        InvalidInputError, match=r"data\.num_classes = 7: the label of a.tar/1 is 7"
    ):
        list(source.samples(piece))
    Path(here.uri, "a.tar").unlink()
    with pytest.raises(InvalidInputError, match=r"a.tar': missing"):
        list(source.samples(piece))
    with pytest.raises(InvalidInputError, match=r"data\.uri = .*no file below it is one of \.tar"):
        here.source("webdataset", num_classes=7)


# The configuration


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"kind": "tfrecord"}, "kind = 'tfrecord': unknown choice. Use one of digits, folder"),
        ({"uri": "/data"}, "uri = '/data': kind=digits has no use for it. Leave it away"),
        ({"size": 8}, "size = 8: kind=digits has no use for it"),
        ({"num_classes": 10}, "num_classes = 10: kind=digits has no use for it"),
        ({"kind": "folder", "size": 8}, "uri = '': kind=folder needs it. Give uri"),
        ({"kind": "folder", "uri": "x"}, "size = 0: kind=folder needs it"),
        ({"kind": "folder", "uri": "x", "size": -8}, "size = -8: negative"),
        ({"kind": "folder", "uri": "x", "size": 8, "num_classes": 2}, "num_classes = 2: kind=fol"),
        ({"kind": "parquet", "uri": "x", "size": 8}, "num_classes = 0: kind=parquet needs it"),
        ({"kind": "webdataset", "uri": "x", "size": 8}, "num_classes = 0: kind=webdataset needs"),
        ({"label_column": "cls"}, "label_column = 'cls': kind=digits has no use for it"),
        (
            {"kind": "parquet", "uri": "x", "size": 8, "num_classes": 2, "image_column": "label"},
            "label_column = 'label': the column of the images",
        ),
    ],
)
def test_configurations_that_mean_nothing_are_refused(values: dict[str, Any], problem: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        ImagesConfig(**values)
    assert str(caught.value).startswith(problem)


@pytest.mark.parametrize(
    ("uri", "problem"),
    [
        ("ftp://host/images", "not an address of a folder"),
        ("s3://name:SECRET@bucket/images", "credentials in an address"),
    ],
)
def test_addresses_that_cannot_be_used_are_refused(uri: str, problem: str) -> None:
    with pytest.raises(InvalidInputError, match=f"data.uri = .*{problem}"):
        Place(uri).source("folder")
