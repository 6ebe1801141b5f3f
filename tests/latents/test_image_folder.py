"""Folders of images: every image once, with its label and key."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator

import pytest

from facm_core.errors import InvalidInputError
from tests.latents.pictures import SIZE, Place, coloured, contents, gathered

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
