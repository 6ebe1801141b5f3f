"""Captions instead of labels: embedded, stored, and with a null prompt beside them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from facm_core.errors import InvalidInputError
from facm_core.text_encoders import EmbeddedText, TextEncoder
from facm_platform import storage
from facm_platform.config.sections import RunConfig
from facm_platform.latents import LatentManifest, captions
from facm_platform.latents.build import BuildersConfig, BuildPlan
from facm_platform.latents.captions import Embedder, TextConfig
from facm_platform.latents.encode import EncodeConfig, prepare
from facm_platform.latents.images import ImagesConfig
from facm_platform.latents.null_text import NULL_TEXT, NullText
from facm_platform.latents.parts import opened_part
from facm_platform.latents.tables import values_of
from facm_platform.latents.text_encoder import open_text_encoder
from facm_platform.tracking import Store
from tests.latents.pictures import Place, coloured, encoded, photo
from tests.tiny_wan import TEXT, write_text_encoder

CAPTION = "a handwritten {class}"


@pytest.fixture(autouse=True)
def tracking(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow in the test's own folder."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.uri)


@pytest.fixture
def encoder(tmp_path: Path) -> TextEncoder:
    write_text_encoder(tmp_path / "pipeline", [f"a handwritten {digit}" for digit in range(10)])
    return open_text_encoder(str(tmp_path / "pipeline"), TEXT[0])


def plan(
    folder: Path, *, caption: str = CAPTION, tokens: int = TEXT[0], **changes: Any
) -> BuildPlan:
    """With the encoder in ``pipeline`` to ``set``."""
    values: dict[str, Any] = {
        "run": RunConfig(name="captions"),
        "output_uri": str(folder / "set"),
        "text": TextConfig(encoder=str(folder / "pipeline"), caption=caption, tokens=tokens),
        "part_rows": 700,
        "batch_size": 100,
        "workers": BuildersConfig(count=2),
    }
    return prepare(EncodeConfig(**values | changes))


def rows(uri: str) -> dict[str, dict[str, Any]]:
    """Columns by key."""
    found = {}
    for part in LatentManifest.load(uri).parts:
        with opened_part(storage.join(uri, part.name)) as file:
            table = file.read()
        columns = {name: values_of(table, name) for name in table.column_names if name != "key"}
        for row, key in enumerate(table.column("key").to_pylist()):
            found[key] = {name: column[row] for name, column in columns.items()}
    return found


@pytest.mark.usefixtures("ray_cluster")
def test_digits_with_captions(tmp_path: Path, encoder: TextEncoder) -> None:
    uri = str(tmp_path / "set")
    plan(tmp_path).execute()
    manifest = LatentManifest.load(uri)
    assert (manifest.num_classes, manifest.class_names) == (0, ())
    assert (manifest.text_shape, manifest.text_dtype) == (TEXT, "float16")

    pixels, labels = load_digits(return_X_y=True)
    expected = encoder.encode([f"a handwritten {digit}" for digit in range(10)])
    found = rows(uri)
    assert len(found) == len(labels)
    for index, label in enumerate(labels):
        row = found[f"digits/{index:05d}"]
        assert np.array_equal(row["latent"].reshape(-1), pixels[index] / 8 - 1)
        assert np.array_equal(row["text_mask"], expected.text_mask[label])
        np.testing.assert_allclose(
            row["text_embedding"], expected.text_embedding[label], atol=1e-3, rtol=1e-3
        )

    null = NullText.load(uri, manifest)
    assert (null.encoder_id, null.encoder_sha256) == (encoder.id, encoder.sha256)
    assert torch.equal(null.text_embedding, NullText.of(encoder).text_embedding)
    assert "nothing to do" in plan(tmp_path).describe()

    # A set with labels in its place has no null prompt.
    plan(tmp_path, text=None, overwrite=True).execute()
    assert NULL_TEXT not in storage.list_files(uri)


@pytest.mark.usefixtures("ray_cluster")
def test_images_with_texts_beside_them(tmp_path: Path, encoder: TextEncoder, bucket: str) -> None:
    for root in (str(tmp_path), bucket):
        place, output_uri = Place(f"{root}/pets"), f"{root}/set"
        for index, animal in enumerate(["cat", "dog"]):
            for number in range(3):
                place.put(f"{animal}/{number}.png", encoded(photo(8, 8, index), "PNG"))
                if number < 2:
                    place.put(f"{animal}/{number}.txt", f"number {number}".encode())
        changes = {"output_uri": output_uri, "max_quarantined": 0.4, "batch_size": 3}
        source = ImagesConfig(kind="folder", uri=place.uri, size=8)
        plan(tmp_path, caption="a {class}: {text}", source=source, **changes).execute()
        manifest = LatentManifest.load(output_uri)
        assert {entry.key: entry.reason for entry in manifest.quarantined} == {
            "cat/2.png": "no text",
            "dog/2.png": "no text",
        }
        for key, row in rows(output_uri).items():
            animal, number = key.split("/")
            ((expected,), _) = encoder.encode([f"a {animal}: number {number[0]}"])
            np.testing.assert_allclose(row["text_embedding"], expected, atol=1e-3, rtol=1e-3)


def test_the_hash_of_the_encoding_is_of_all_that_bears_on_texts(
    tmp_path: Path, encoder: TextEncoder
) -> None:
    hashes = [
        plan(tmp_path).build.sha256,
        plan(tmp_path, caption="one {class}").build.sha256,
        plan(tmp_path, tokens=3).build.sha256,
        plan(tmp_path, text=None).build.sha256,
    ]
    write_text_encoder(tmp_path / "pipeline", ["a handwritten 1"], seed=1)
    hashes.append(plan(tmp_path).build.sha256)
    assert len(set(hashes)) == len(hashes)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"caption": "a digit"}, r"caption = 'a digit': it is the same for all images"),
        ({"caption": "{clas}"}, r"caption = '\{clas\}': nothing is called clas\. Use \{class\}"),
        ({"tokens": 0}, r"tokens = 0: below 1"),
        ({"caption": "{text}"}, r"source\.kind = 'digits': there are no texts beside its images"),
    ],
)
def test_captions_that_mean_nothing(
    tmp_path: Path, encoder: TextEncoder, changes: dict[str, Any], problem: str
) -> None:
    with pytest.raises(InvalidInputError, match=problem):
        plan(tmp_path, **changes)


def test_names_of_classes_must_be_known(tmp_path: Path, encoder: TextEncoder) -> None:
    Place(str(tmp_path / "flat")).put("1.png", coloured(1))
    source = ImagesConfig(kind="folder", uri=str(tmp_path / "flat"), size=8)
    with pytest.raises(InvalidInputError, match=r"text\.caption = .*names of the classes are not"):
        plan(tmp_path, source=source)
    nowhere = TextConfig(encoder=str(tmp_path / "nowhere"), caption=CAPTION)
    with pytest.raises(InvalidInputError, match=r"text\.encoder = .*no pipeline with text_encoder"):
        plan(tmp_path, text=nowhere)


def test_an_embedding_does_not_depend_on_what_was_asked_before(encoder: TextEncoder) -> None:
    prompts = [f"a handwritten {digit}" for digit in range(10)]
    together = Embedder(encoder).columns(prompts)
    embedder = Embedder(encoder)
    for row in (7, 3, 5, *range(10)):
        for name, column in embedder.columns(prompts[row : row + 1]).items():
            assert np.array_equal(column[0], together[name][row])


def test_equal_prompts_are_embedded_once_and_forgotten_in_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[str] = []

    class Counting:
        id, sha256, text_shape = "", "", (3, 2)

        def encode(self, prompts: Sequence[str]) -> EmbeddedText:
            assert len(prompts) == 1, "rounds by what it is batched with"
            asked.extend(prompts)
            mask = torch.tensor([[0.0, 1.0, 1.0]]).repeat(len(prompts), 1)
            values = torch.tensor([float(prompt) for prompt in prompts])
            return EmbeddedText(values[:, None, None].repeat(1, 3, 2) * mask[..., None], mask)

        def to(self, device: Any, dtype: Any) -> Counting:
            return self

    # Two prompts of two tokens of two numbers.
    monkeypatch.setattr(captions, "_KEPT_BYTES", 16)
    embedder = Embedder(Counting())
    columns = embedder.columns(["1", "2", "1"])
    assert asked == ["1", "2"]
    assert columns["text_embedding"][:, :, 0].tolist() == [[0, 1, 1], [0, 2, 2], [0, 1, 1]]
    assert columns["text_mask"].tolist() == [[0, 1, 1]] * 3
    assert [columns[name].dtype for name in columns] == [np.float16, np.uint8]
    embedder.columns(["1"])
    embedder.columns(["3"])
    # The one that nobody has asked for longest is forgotten, and no others.
    embedder.columns(["1", "3"])
    assert asked == ["1", "2", "3"]
    many = embedder.columns([str(number) for number in range(40)])
    assert many["text_embedding"][:, 1, 0].tolist() == list(range(40))
    assert len(embedder._kept) == len(embedder._masks) == 2
