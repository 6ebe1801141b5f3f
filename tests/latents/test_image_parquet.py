"""Images in Parquet files: every image once, with its label and key."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from facm_core.errors import InvalidInputError
from tests.latents.pictures import SIZE, Place, coloured, contents, gathered

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
