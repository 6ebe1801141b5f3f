"""A set looked into: numbers against numpy, every kind of damage by its name, pixels by pixels."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from facm_core.autoencoders import IdentityAutoencoder
from facm_core.errors import InvalidInputError
from facm_platform import storage
from facm_platform.config import Refused
from facm_platform.latents import LatentManifest, LatentStream, local_batches
from facm_platform.latents.contact_sheet import Grid, draw, sample
from facm_platform.latents.inspection import inspect, stats, verify
from facm_platform.latents.manifest import part_name
from facm_platform.latents.tables import RowFormat, values_of
from facm_platform.latents.writer import write_part
from tests.latents.conftest import FORMAT, PART_ROWS, rows
from tests.small import write_digits

Set = tuple[str, LatentManifest]
Values = dict[str, Any]
Printed = Callable[[], str]

EVERY_LATENT = np.concatenate([rows(part, count)[0] for part, count in enumerate(PART_ROWS)])


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str]) -> Printed:
    """Standard output since it was asked for last."""
    return lambda: capsys.readouterr().out


def edit(uri: str, **changes: Any) -> None:
    """Change fields of the manifest, one of them perhaps by a function of the old value."""
    file = Path(uri, "manifest.json")
    values = json.loads(file.read_text())
    for name, change in changes.items():
        values[name] = change(values[name]) if callable(change) else change
    file.write_text(json.dumps(values))


def flip_a_bit(file: Path) -> None:
    """Of the first latents."""
    content = bytearray(file.read_bytes())
    content[300] ^= 1
    file.write_bytes(content)


def write_set(uri: str, format: RowFormat, pieces: list[Values], **fields: Any) -> None:
    """A set with a part for each of `pieces`; `fields` of the manifest."""
    parts = tuple(
        write_part(uri, part_name(index), [format.table(piece)], format, 3 * format.row_bytes)[0]
        for index, piece in enumerate(pieces)
    )
    manifest = LatentManifest(
        **dataclasses.asdict(format)
        | {"mean": (0.0,) * format.latent_shape[0], "std": (1.0,) * format.latent_shape[0]}
        | fields,
        rows=sum(part.rows for part in parts),
        autoencoder_id=IdentityAutoencoder.id,
        autoencoder_sha256=IdentityAutoencoder.sha256,
        parts=parts,
        encoding_sha256="0",
        created_by="test",
    )
    manifest.save(uri)


# --- inspect ------------------------------------------------------------------------------------


def test_inspect_tells_sizes_format_and_labels(own_set: Set, printed: Printed) -> None:
    uri, manifest = own_set
    names = ["ant", "bee", "cat", *"defghij"]
    edit(uri, class_names=names, quarantined=[{"key": "7.png", "reason": "no image"}])

    result = inspect(uri)

    labels = np.concatenate([rows(part, count)[1] for part, count in enumerate(PART_ROWS)])
    counts = np.bincount(labels)
    text = printed()
    size = sum(Path(uri, part.name).stat().st_size for part in manifest.parts)
    assert result.run_id is None
    assert result.run_name == "latents inspect"
    assert result.artifact_uri == uri
    assert result.metrics == {
        "parts": 3,
        "rows": 91,
        "bytes": size,
        "quarantined": 1,
        "classes_without_rows": 0,
    }
    for expected in (
        "rows          91 in 3 parts",
        "row groups    15 of 1 to 7 rows",
        "latents       (2, 3, 4) float32\n",
        "conditioning  10 labels: ant, bee, cat, ...",
        f"mean          {manifest.mean[0]:.4g} {manifest.mean[1]:.4g}",
        f"manifest      sha256 {LatentManifest.load(uri).sha256}",
        "quarantined   1: 7.png (no image)",
        f"rows a class: min {counts.min()}, median {np.median(counts):g}, max {counts.max()}; 0 wi",
        f"  0 ant  {counts[0]:>2}  " + "#" * 40 + "\n",
    ):
        assert expected in text


def test_many_classes_become_ranges_and_empty_ones_are_told(
    tmp_path: Path, printed: Printed
) -> None:
    format = RowFormat(latent_shape=(1, 1, 1), latent_dtype="float16", num_classes=1000)
    labels = [0, 0, 0, 1, 999]
    values = {"latent": np.arange(5), "label": labels, "key": [str(n) for n in range(5)]}
    write_set(str(tmp_path), format, [values])

    assert inspect(str(tmp_path)).metrics["classes_without_rows"] == 997
    *_, header, ranges, first, second = printed().splitlines()[:-18]
    assert header == "rows a class: min 0, median 0, max 3; 997 without any: 2, 3, 4, ..."
    assert ranges == "mean over ranges of classes:"
    assert first == "  0-49     0.1  " + "#" * 40
    assert second == "  50-99      0"


def test_inspect_of_texts(tmp_path: Path, printed: Printed) -> None:
    format = RowFormat(latent_shape=(1, 2, 2), latent_dtype="float16", text_shape=(3, 2))
    values = {"latent": np.zeros((1, 4)), "key": ["a"], "text_mask": np.ones((1, 3))}
    write_set(str(tmp_path), format, [values | {"text_embedding": np.zeros((1, 6))}])
    assert "classes_without_rows" not in inspect(str(tmp_path)).metrics
    assert "conditioning  text (3, 2) float16" in printed()


def test_labels_that_the_manifest_does_not_know(own_set: Set) -> None:
    uri, _ = own_set
    edit(uri, num_classes=9)
    with pytest.raises(InvalidInputError, match=r"part-0000\d.parquet.*labels outside of \[0, 9\)"):
        inspect(uri)


# --- verify -------------------------------------------------------------------------------------


def test_a_whole_set_is_verified(latent_set: Set, printed: Printed) -> None:
    uri, manifest = latent_set
    result = verify(uri)
    size = sum(part.bytes for part in manifest.parts)
    assert result.metrics == {"parts": 3, "rows": 91, "bytes": size, "bad_parts": 0}
    progress = printed().splitlines()[:3]
    assert [line.split()[2] for line in progress] == ["55%", "96%", "100%"]
    assert progress[-1].split()[3:5] == ["3/3", "parts"]
    assert progress[-1].endswith("MB/s  0m00s left")


def test_every_bad_part_is_listed(own_set: Set) -> None:
    uri, manifest = own_set
    for index in (0, 2):
        flip_a_bit(Path(uri, part_name(index)))
    hashes = [hashlib.sha256(Path(uri, part.name).read_bytes()) for part in manifest.parts]

    with pytest.raises(Refused, match="bad parts, 2 of 3") as refusal:
        verify(uri)

    text = str(refusal.value)
    for index in (0, 2):
        expected, found = manifest.parts[index].sha256, hashes[index].hexdigest()
        assert f"  {part_name(index)}: its sha256 is {found}, not {expected}\n" in text
    assert part_name(1) not in text
    assert "make the set again with overwrite=true" in text
    assert refusal.value.result is not None
    assert refusal.value.result.metrics["bad_parts"] == 2


def test_parts_that_change_after_the_manifest_was_read(
    own_set: Set, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, manifest = own_set
    monkeypatch.setattr(LatentManifest, "load", staticmethod(lambda uri, field: manifest))
    cut = Path(uri, part_name(0))
    cut.write_bytes(cut.read_bytes()[:-10])
    Path(uri, part_name(1)).unlink()
    with pytest.raises(Refused) as refusal:
        verify(uri)
    size = manifest.parts[0].bytes
    assert f"{part_name(0)}: it has {size - 10} bytes, not {size}\n" in str(refusal.value)
    assert f"{part_name(1)}: it cannot be read (" in str(refusal.value)


def test_a_cut_part_is_refused_by_its_size(own_set: Set) -> None:
    uri, _ = own_set
    file = Path(uri, part_name(1))
    file.write_bytes(file.read_bytes()[:-10])
    for command in (inspect, verify, stats, sample):
        with pytest.raises(InvalidInputError, match=f"uri = .*{file.name} has .* bytes where"):
            command(uri)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            {"parts": lambda parts: [parts[0] | {"row_groups": [14, *[7] * 5, 1]}, *parts[1:]]},
            "part-00000.parquet: its row groups have [7, 7, 7, 7, 7, 7, 7, 1] rows, not [14, 7, 7",
        ),
        ({"latent_shape": [2, 4, 3]}, "part-00002.parquet: its columns are latent: extension<"),
        ({"num_classes": 0, "text_shape": [1, 2]}, "label: int64, key: string, not latent"),
    ],
)
def test_a_footer_that_is_not_the_manifests(own_set: Set, change: Values, problem: str) -> None:
    uri, _ = own_set
    edit(uri, **change)
    with pytest.raises(Refused) as refusal:
        verify(uri)
    assert problem in str(refusal.value)


def test_a_part_that_is_no_parquet_file(own_set: Set) -> None:
    uri, _ = own_set
    file = Path(uri, part_name(2))
    file.write_bytes(bytes(file.stat().st_size))
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    edit(uri, parts=lambda parts: [*parts[:2], parts[2] | {"sha256": sha256}])
    with pytest.raises(Refused, match=r"bad parts, 1 of 3(.|\n)*part-00002.parquet: damaged"):
        verify(uri)


# --- stats --------------------------------------------------------------------------------------


def table_of(text: str) -> np.ndarray:
    """The numbers of the printed table, without the channels."""
    lines = text.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("channel"))
    found = [line.split()[1:] for line in lines[start + 1 :] if line[6:7].isdigit()]
    return np.array(found, np.float64)


def test_stats_are_numpys(latent_set: Set, printed: Printed) -> None:
    uri, _ = latent_set
    result = stats(uri)
    text = printed()
    latents = EVERY_LATENT.astype(np.float64)
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    expected = np.stack([mean, std, mean, std], 1)
    np.testing.assert_allclose(table_of(text)[:, :4], expected, rtol=1e-6)
    assert result.metrics["max_relative_difference"] < 1e-14
    assert result.metrics["non_finite"] == 0
    assert f"values in [{latents.min():.6g}, {latents.max():.6g}]; 0 not finite" in text


def test_stats_of_moments_and_mirrored_twins(tmp_path: Path, printed: Printed) -> None:
    format = RowFormat(
        latent_shape=(2, 2, 3), latent_dtype="float32", moments=True, flip=True, num_classes=1
    )
    rng = np.random.default_rng(0)
    both = rng.normal(0.5, 1.5, (2, 11, 4, 2, 3)).astype(np.float32)
    keys = [str(n) for n in range(11)]
    pieces = [
        {"latent": both[0, cut], "latent_flip": both[1, cut], "key": keys[cut], "label": zeros}
        for cut, zeros in ((slice(0, 4), [0] * 4), (slice(4, 11), [0] * 7))
    ]
    means, log_variances = both[:, :, :2].astype(np.float64), both[:, :, 2:].astype(np.float64)
    # The law of total variance.
    mean = means.mean((0, 1, 3, 4))
    std = np.sqrt(means.var((0, 1, 3, 4)) + np.exp(log_variances).mean((0, 1, 3, 4)))
    write_set(str(tmp_path), format, pieces, mean=tuple(mean.tolist()), std=tuple(std.tolist()))

    assert stats(str(tmp_path)).metrics["max_relative_difference"] < 1e-14
    text = printed()
    np.testing.assert_allclose(table_of(text)[:, :2], np.stack([mean, std], 1), rtol=1e-6)
    assert (
        f"means in [{means.min():.6g}, {means.max():.6g}], "
        f"log-variances in [{log_variances.min():.6g}, {log_variances.max():.6g}]; 0 not finite"
    ) in text


@pytest.mark.parametrize("field", ["mean", "std"])
def test_statistics_that_are_wrong(own_set: Set, printed: Printed, field: str) -> None:
    uri, manifest = own_set
    off = 2e-6 * manifest.std[1]
    edit(uri, **{field: lambda values: [values[0], values[1] + off]})
    with pytest.raises(Refused, match=r"off by 2e-06 of a deviation: .*would be normalised wrong"):
        stats(uri)
    assert table_of(printed())[1, 4] == 2e-6

    edit(uri, created_by="facm-platform import 1, pyarrow 20")
    assert stats(uri).metrics["max_relative_difference"] == pytest.approx(2e-6)
    assert "note: the statistics in the manifest are off by 2e-06" in printed()


def test_values_that_are_not_finite(own_set: Set, printed: Printed) -> None:
    uri, _ = own_set
    file = Path(uri, part_name(1))
    table = pq.read_table(file)
    latents = values_of(table, "latent").copy()
    latents[3, 1, 2, :2] = np.nan, np.inf
    values = {"latent": latents, "label": table["label"], "key": table["key"]}
    pq.write_table(FORMAT.table(values), file, row_group_size=7, compression="none")
    edit(
        uri,
        parts=lambda parts: [
            part | {"bytes": file.stat().st_size} if part["name"] == file.name else part
            for part in parts
        ],
    )
    with pytest.raises(Refused, match=r"2 values of .* are not finite") as refusal:
        stats(uri)
    assert refusal.value.result is not None
    assert refusal.value.result.metrics["non_finite"] == 2
    finite = np.delete(EVERY_LATENT, PART_ROWS[0] + 3, axis=0).astype(np.float64)
    np.testing.assert_allclose(table_of(printed())[:, 0], finite.mean((0, 2, 3)), rtol=1e-6)


def test_stats_of_a_damaged_part_name_it(own_set: Set) -> None:
    uri, _ = own_set
    flip_a_bit(Path(uri, part_name(1)))
    with pytest.raises(InvalidInputError, match=r"part-00001.parquet': damaged"):
        stats(uri)


# --- sample -------------------------------------------------------------------------------------


def tile(sheet: Image.Image, grid: Grid, index: int) -> np.ndarray:
    """Image number `index` of the sheet (H, W, 3), one pixel of each enlarged one, all checked."""
    left, top = grid.corner(index)
    box = (left, top, left + grid.width * grid.scale, top + grid.height * grid.scale)
    pixels = np.asarray(sheet.crop(box))
    small = pixels[:: grid.scale, :: grid.scale]
    enlarged = small.repeat(grid.scale, 0).repeat(grid.scale, 1)
    np.testing.assert_array_equal(pixels, enlarged)
    return small


def test_the_sheet_shows_the_digits(digits_uri: str, tmp_path: Path, printed: Printed) -> None:
    output = tmp_path / "new" / "sheet.png"
    result = sample(digits_uri, rows=10, seed=3, output=str(output))
    assert result.artifact_uri == str(output)
    assert result.metrics == {"rows": 10}

    sheet = Image.open(output)
    grid = Grid(count=10, height=8, width=8, caption=16)
    # Four columns and three rows of tiles of 64 pixels, 4 apart.
    assert sheet.size == grid.size == (4 + 4 * 68, 4 + 3 * 84)
    stream = LatentStream(digits_uri, LatentManifest.load(digits_uri), 3)
    digits = load_digits().images
    (batch,) = local_batches(stream, 0, 10, 10)
    for index, key in enumerate(batch.keys):
        expected = digits[int(key.split("/")[1])] / 16 * 255
        found = tile(sheet, grid, index)
        assert np.abs(found - expected[:, :, None]).max() <= 0.51
        # Something is written below it.
        left, top = grid.corner(index)
        assert np.asarray(sheet.crop((left, top + 65, left + 64, top + 79))).min() < 100


def test_fewer_rows_than_asked_for_and_rgb(tmp_path: Path) -> None:
    format = RowFormat(
        latent_shape=(3, 2, 5), latent_dtype="float32", moments=True, text_shape=(1, 1)
    )
    means = np.linspace(-0.9, 0.9, 60).reshape(2, 3, 2, 5)
    moments = np.concatenate([means, np.full_like(means, -40.0)], 1)
    text = {"text_embedding": np.zeros((2, 1)), "text_mask": np.ones((2, 1))}
    write_set(str(tmp_path), format, [{"latent": moments, "key": ["0", "1"], **text}])

    assert sample(str(tmp_path), output=str(tmp_path / "sheet.png")).metrics == {"rows": 2}
    sheet = Image.open(tmp_path / "sheet.png")
    grid = Grid(count=2, height=2, width=5, caption=0)
    stream = LatentStream(str(tmp_path), LatentManifest.load(str(tmp_path)), 0)
    (batch,) = local_batches(stream, 0, 2, 2)
    for index, key in enumerate(batch.keys):
        expected = (means[int(key)].transpose(1, 2, 0) + 1) * 127.5
        assert np.abs(tile(sheet, grid, index) - expected).max() <= 0.51


def test_long_captions_are_cut_to_their_image() -> None:
    images = [np.zeros((8, 8, 3), np.uint8)] * 2
    sheet = draw(images, ["a name that is far too long for it", ""])
    grid = Grid(count=2, height=8, width=8, caption=16)
    left, top = grid.corner(1)
    assert np.asarray(sheet.crop((left, top + 64, left + 64, top + 80))).min() == 255


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": 0}, "rows = 0: no sheet"),
        ({"rows": 1025}, "Give 1 ... 1024"),
        ({"seed": -1}, "seed = -1: negative"),
        ({"output": "sheet.jpg"}, "output = 'sheet.jpg': not the name of a PNG"),
        ({"output": "gs://a/b.png"}, "output = 'gs://a/b.png': not an address"),
    ],
)
def test_options_that_are_wrong(digits_uri: str, options: Values, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        sample(digits_uri, **options)


def test_two_channels_cannot_be_shown(own_set: Set, tmp_path: Path) -> None:
    uri, _ = own_set
    edit(uri, autoencoder_sha256=IdentityAutoencoder.sha256)
    with pytest.raises(InvalidInputError, match="its images have 2 channels"):
        sample(uri, output=str(tmp_path / "sheet.png"))
    assert not (tmp_path / "sheet.png").exists()


def test_a_set_in_an_object_store(bucket: str, tmp_path: Path) -> None:
    write_digits(tmp_path / "digits", rows=50)
    uri = f"{bucket}/digits"
    storage.upload_folder(tmp_path / "digits", uri)
    assert verify(uri).metrics["bad_parts"] == 0
    assert stats(uri).metrics["max_relative_difference"] < 1e-14
    sample(uri, rows=4, output=f"{bucket}/sheets/4.png")
    sheet = Image.open(io.BytesIO(storage.read_bytes(f"{bucket}/sheets/4.png")))
    assert sheet.size == Grid(count=4, height=8, width=8, caption=16).size
    with pytest.raises(InvalidInputError, match=r"uri = 's3://no-such.*bucket does not exist"):
        verify("s3://no-such-bucket-at-all/set")
