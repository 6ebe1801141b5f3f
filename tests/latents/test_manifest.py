"""The manifest: what it promises, and every way in which a set can break the promise."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from facm_core.errors import InvalidInputError
from facm_platform.latents import LatentManifest

Set = tuple[str, LatentManifest]
Values = dict[str, Any]


def edit(uri: str, change: Callable[[Values], object]) -> None:
    file = Path(uri, "manifest.json")
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


def test_what_is_saved_is_loaded(latent_set: Set) -> None:
    uri, manifest = latent_set
    loaded = LatentManifest.load(uri)

    assert loaded == manifest
    assert loaded.sha256 == manifest.sha256
    assert [len(part.row_groups) for part in loaded.parts] == [8, 6, 1]
    assert loaded.rows == sum(sum(part.row_groups) for part in loaded.parts) == 91


def test_any_difference_changes_the_hash(latent_set: Set) -> None:
    _, manifest = latent_set
    mean = (manifest.mean[0], np.nextafter(manifest.mean[1], 9))
    assert dataclasses.replace(manifest, mean=mean).sha256 != manifest.sha256


def test_normalise_is_per_channel_and_inverted_by_denormalise(latent_set: Set) -> None:
    _, manifest = latent_set
    latents = np.random.default_rng(0).normal(5, 2, (6, 2, 3, 4)).astype(np.float32)
    mean, std = (np.array(v).reshape(1, 2, 1, 1) for v in (manifest.mean, manifest.std))
    expected = (latents.astype(np.float64) - mean) / std

    given = torch.from_numpy(latents)
    normalised = manifest.normalise(given)

    assert normalised.dtype == torch.float32
    np.testing.assert_allclose(normalised, expected, rtol=1e-5, atol=1e-6)
    assert np.array_equal(given, latents)
    np.testing.assert_allclose(manifest.denormalise(normalised), latents, rtol=1e-6)
    halves = manifest.normalise(given.half())
    np.testing.assert_allclose(halves, (given.half().double() - mean) / std, atol=1e-6)


def test_a_folder_without_manifest_is_no_set(own_set: Set) -> None:
    uri, _ = own_set
    Path(uri, "manifest.json").unlink()
    with pytest.raises(InvalidInputError, match=r"data.uri = .*does not exist.*jobs/encode.py"):
        LatentManifest.load(uri)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda v: v.update(schema_version=2), "schema_version is 2, this program reads 1"),
        (lambda v: v.pop("schema_version"), "schema_version is None"),
        (lambda v: v.update(rows=90), "rows = 90: the parts hold 91 rows"),
        (lambda v: v["parts"].pop(), "rows = 91: the parts hold 87 rows"),
        (lambda v: v["parts"][1].update(rows=38), "do not add up to the part's 38 rows"),
        (lambda v: v.update(parts=[], rows=0), "the set has no rows"),
        (lambda v: v["parts"].__setitem__(1, v["parts"][0]), "listed twice|hold 104 rows"),
        (lambda v: v.update(mean=[0.0]), "not one number for each channel"),
        (lambda v: v.update(std=[1.0, 0.0]), "not finite and positive"),
        (lambda v: v.update(latent_dtype="int8"), "latent_dtype = 'int8': unknown choice"),
        (lambda v: v.update(latent_shape=[2, 12]), r"not of the form \(C, H, W\)"),
        (lambda v: v.update(num_classes=0), "rows have either labels or a text"),
        (lambda v: v.update(text_shape=[4, 8]), "rows have either labels or a text"),
        (lambda v: v.update(text_shape=[4], num_classes=0), r"not of the form \(tokens, features"),
        (lambda v: v.update(class_names=["cat"]), "not one for each of num_classes = 10"),
        (lambda v: v.update(extra=1), "unexpected keyword argument 'extra'"),
        (lambda v: v.pop("parts"), "not a manifest of a latent set"),
        (lambda v: v["parts"][2].update(bytes=1), "part-00002.parquet has .* manifest says 1"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(
    own_set: Set, change: Callable[[Values], object], problem: str
) -> None:
    uri, _ = own_set
    edit(uri, change)
    with pytest.raises(InvalidInputError, match=f"data.uri = .*({problem})"):
        LatentManifest.load(uri)


def test_a_missing_or_cut_part_is_named(own_set: Set) -> None:
    uri, manifest = own_set
    part = Path(uri, manifest.parts[1].name)
    content = part.read_bytes()

    part.write_bytes(content[:-10])
    with pytest.raises(InvalidInputError, match=rf"part-00001.parquet has {len(content) - 10} b"):
        LatentManifest.load(uri)
    part.unlink()
    with pytest.raises(InvalidInputError, match=r"part-00001.parquet is missing"):
        LatentManifest.load(uri)


def test_a_part_that_the_manifest_does_not_know_is_named(own_set: Set) -> None:
    uri, manifest = own_set
    Path(uri, "part-00003.parquet").write_bytes(Path(uri, manifest.parts[0].name).read_bytes())
    with pytest.raises(InvalidInputError, match=r"part-00003.parquet: 1 part\(s\) that the manif"):
        LatentManifest.load(uri)


def test_of_two_writers_one_wins(own_set: Set) -> None:
    uri, manifest = own_set
    with pytest.raises(FileExistsError):
        dataclasses.replace(manifest, created_by="another").save(uri)
    assert LatentManifest.load(uri).created_by == "test"


def test_a_manifest_that_is_no_json_is_refused(own_set: Set) -> None:
    uri, _ = own_set
    Path(uri, "manifest.json").write_bytes(b"{")
    with pytest.raises(InvalidInputError, match=r"manifest.json.*not JSON"):
        LatentManifest.load(uri)
