"""What a source of images is told, and the one that needs nothing: the digits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_digits

from facm_core.errors import InvalidInputError
from facm_platform.latents.images import ImagesConfig, image_source
from tests.latents.pictures import Place, gathered


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
        ({"label_column": "cls"}, "label_column = 'cls': kind=digits has no use for it"),
        ({"text_column": "text"}, "text_column = 'text': kind=digits has no use for it"),
        (
            {"kind": "parquet", "uri": "x", "size": 8, "num_classes": 2, "image_column": "label"},
            "label_column = 'label': the column of the images",
        ),
        (
            {"kind": "parquet", "uri": "x", "size": 8, "text_column": "image"},
            "text_column = 'image': the column of the images",
        ),
    ],
)
def test_configurations_that_mean_nothing_are_refused(values: dict[str, Any], problem: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        ImagesConfig(**values)
    assert str(caught.value).startswith(problem)


LABELS, TEXTS = {"labels": True, "texts": False}, {"labels": False, "texts": True}


@pytest.mark.parametrize(
    ("kind", "values", "read", "problem"),
    [
        ("parquet", {}, LABELS, "num_classes = 0: kind=parquet needs it. Give num_classes"),
        ("webdataset", {}, LABELS, "num_classes = 0: kind=webdataset needs it"),
        ("webdataset", {"num_classes": 2}, TEXTS, "num_classes = 2: kind=webdataset has no use"),
        ("parquet", {}, TEXTS, "text_column = '': kind=parquet needs it"),
        ("parquet", {"num_classes": 2, "text_column": "a"}, LABELS, "text_column = 'a': kind=parq"),
        (
            "parquet",
            {"text_column": "a", "label_column": "b"},
            TEXTS,
            "label_column = 'b': kind=parquet has no use for it",
        ),
    ],
)
def test_what_is_read_decides_what_must_be_given(
    kind: str, values: dict[str, Any], read: dict[str, bool], problem: str
) -> None:
    config = ImagesConfig(kind=kind, uri="x", size=8, **values)
    with pytest.raises(InvalidInputError) as caught:
        image_source(config, "data", **read)
    assert str(caught.value).startswith(f"data.{problem}")


def test_digits_have_no_texts() -> None:
    with pytest.raises(InvalidInputError, match=r"source\.kind = 'digits': there are no texts"):
        image_source(ImagesConfig(), **TEXTS)
    assert image_source(ImagesConfig(), labels=False).class_names == tuple("0123456789")


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
