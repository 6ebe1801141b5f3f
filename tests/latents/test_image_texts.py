"""Texts beside images, where captions are made of them instead of labels."""

from __future__ import annotations

import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from facm_core.errors import InvalidInputError
from facm_platform.latents.images import BrokenImageError, ImageSource, Sample
from tests.latents.pictures import Place, coloured, gathered, index_of
from tests.latents.test_image_webdataset import archive

FILES = {"a": b"a cat\n", "b": None, "c": b"  \n", "d": b"\xff", "é.1": "ein Fluß".encode()}
FOUND = {
    "a": "a cat\n",
    "b": "no text",
    "c": "the text is blank",
    "d": "the text is not UTF-8",
    "é.1": "ein Fluß",
}


def texts(source: ImageSource) -> dict[str, str]:
    """By key: the text of an image, or why there is none."""

    def look(sample: Sample) -> str:
        assert sample.load_text is not None
        try:
            return sample.load_text()
        except BrokenImageError as error:
            return str(error)

    samples = [sample for part in gathered(source, 100) for sample in part]
    assert sorted(index_of(sample.load()) for sample in samples) == list(range(len(samples)))
    return {sample.key: look(sample) for sample in samples}


def test_a_folder_has_them_in_files_of_the_same_stem(place: Place) -> None:
    for index, (name, text) in enumerate(FILES.items()):
        place.put(f"pets/{name}.png", coloured(index))
        if text is not None:
            place.put(f"pets/{name}.txt", text)
    source = place.source("folder", texts=True)
    assert texts(source) == {f"pets/{name}.png": text for name, text in FOUND.items()}
    (samples,) = gathered(place.source("folder"), 100)
    assert {sample.load_text for sample in samples} == {None}


def test_a_webdataset_has_them_in_its_archives(place: Place) -> None:
    # The stem ends at the first dot.
    files = {name.replace(".", ""): text for name, text in FILES.items()}
    members = []
    for index, (name, text) in enumerate(files.items()):
        members.append((f"{name}.png", coloured(index)))
        if text is not None:
            members.append((f"{name}.txt", text))
    place.put("a.tar", archive(members))
    found = texts(place.source("webdataset", texts=True))
    assert found == {f"a.tar/{name.replace('.', '')}": text for name, text in FOUND.items()}
    # Labels, which nobody asked for, are not there.
    (samples,) = gathered(place.source("webdataset", texts=True), 100)
    assert {sample.label for sample in samples} == {-1}


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()], ids=str)
def test_parquet_has_them_in_a_column(place: Place, kind: pa.DataType) -> None:
    values = ["a cat", None, " ", "ein Fluß"]
    table = pa.table({"image": [coloured(i) for i in range(4)], "words": pa.array(values, kind)})
    table = table.append_column("n", pa.array(range(4)))
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    place.put("a.parquet", buffer.getvalue())
    source = place.source("parquet", texts=True, text_column="words")
    expected = ["a cat", "no text", "the text is blank", "ein Fluß"]
    assert texts(source) == {f"a.parquet#{row}": text for row, text in enumerate(expected)}
    assert source.id.endswith("label_column='label', text_column='words')")
    with pytest.raises(InvalidInputError, match=r"data\.text_column = 'x': .*no such column"):
        place.source("parquet", texts=True, text_column="x")
    with pytest.raises(InvalidInputError, match=r"text_column = 'n': .*type is int64.*texts str"):
        place.source("parquet", texts=True, text_column="n")
