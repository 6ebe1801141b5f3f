"""Images in WebDataset archives: every image once, with its label and key."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import pytest

from facm_core.errors import InvalidInputError
from tests.latents.pictures import SIZE, Place, coloured, contents, gathered


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
