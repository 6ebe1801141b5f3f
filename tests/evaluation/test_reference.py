"""What samples are compared with: made once, shared, or read as ADM's evaluator does."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from facm_core.errors import InvalidInputError
from facm_core.metrics import FrechetStatistics
from facm_platform.config import load_config
from facm_platform.evaluation.engine import View, Viewer
from facm_platform.evaluation.extractor import Extractor
from facm_platform.evaluation.features import load_features
from facm_platform.evaluation.measured import Measured
from facm_platform.evaluation.real import DecodedSet, NpzImages, RealImages, SourceImages
from facm_platform.evaluation.reference import (
    Look,
    find_reference,
    make_reference,
    read_reference,
    reference_name,
)
from facm_platform.evaluation.reference_job import ReferenceConfig, prepare
from facm_platform.latents.images import ImagesConfig, image_source
from facm_platform.tracking import Store
from tests.small import write_digits
from tests.world import World


@pytest.fixture
def extractor(world: World) -> Extractor:
    return load_features(world.features).to(torch.device("cpu"), torch.float64)


@pytest.fixture
def look(extractor: Extractor) -> Look:
    view = View(
        kind="fitted",
        features_uri=extractor.uri,
        keep=50,
        batch_size=64,
        gpu=False,
        shown_classes=2,
        shown_samples=3,
    )
    viewer = Viewer(view)

    def look(images: RealImages) -> Iterator[Measured]:
        return (viewer.real(images, piece) for piece in images.pieces())

    return look


def test_of_a_latent_set_made_kept_and_read(
    world: World, extractor: Extractor, look: Look, tmp_path: Path
) -> None:
    uri = str(tmp_path / reference_name(extractor, world.manifest))
    file = find_reference(uri, extractor, world.manifest)
    assert (file.exists, file.sha256) == (False, world.manifest.sha256)
    images = DecodedSet(world.data, world.manifest)
    made = make_reference(file.uri, images, extractor, look, keep=50, shown=3)
    assert made.images == 1797
    assert made.agreement is not None
    assert made.agreement > 0.9
    assert set(made.shown) == {(label, number) for label in range(2) for number in range(3)}
    assert made.features is not None
    assert made.features.shape == (50, 64)

    kept = find_reference(uri, extractor, world.manifest)
    assert (kept.exists, kept.sha256) == (True, world.manifest.sha256)
    again = read_reference(kept, extractor, look, 50)
    assert torch.equal(again.gaussian.mean, made.gaussian.mean)
    assert torch.equal(again.gaussian.covariance, made.gaussian.covariance)
    assert torch.equal(again.features, made.features)  # type: ignore[arg-type]
    assert again.agreement == made.agreement
    assert all(torch.equal(image, again.shown[key]) for key, image in made.shown.items())


def test_in_pieces_it_is_the_same(
    world: World, extractor: Extractor, look: Look, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = DecodedSet(world.data, world.manifest)
    whole = make_reference(
        str(tmp_path / "a.safetensors"), images, extractor, look, keep=50, shown=3
    )
    monkeypatch.setattr("facm_platform.evaluation.real._PIECE_IMAGES", 40)
    assert len(list(images.pieces())) == 45
    parts = make_reference(
        str(tmp_path / "b.safetensors"), images, extractor, look, keep=50, shown=3
    )
    assert parts.gaussian.distance(whole.gaussian) < 1e-9
    torch.testing.assert_close(parts.features, whole.features, rtol=1e-12, atol=1e-12)
    assert parts.agreement == whole.agreement
    assert all(torch.equal(image, parts.shown[key]) for key, image in whole.shown.items())


def test_adms_format_is_read(
    world: World, extractor: Extractor, look: Look, tmp_path: Path
) -> None:
    images = torch.randint(0, 256, (70, 8, 8, 1), dtype=torch.uint8)
    seen = extractor(images.permute(0, 3, 1, 2)).features
    expected = FrechetStatistics(64).update(seen)
    file = tmp_path / "VIRTUAL_digits.npz"
    np.savez(
        file,
        arr_0=images.numpy(),
        mu=seen.mean(0).numpy(),
        sigma=np.cov(seen.numpy(), rowvar=False),
        mu_s=np.zeros(7),
        sigma_s=np.eye(7),
    )
    found = find_reference(str(file), extractor, world.manifest)
    assert found.exists
    reference = read_reference(found, extractor, look, 50)
    assert expected.distance(reference.gaussian) == pytest.approx(0, abs=1e-9)
    torch.testing.assert_close(reference.features, seen[:50], rtol=1e-12, atol=1e-12)
    assert reference.spatial is None, "this extractor has no spatial features"

    np.savez_compressed(file, mu=np.zeros(64), sigma=np.eye(64))
    reference = read_reference(found, extractor, look, 50)
    assert reference.features is None
    assert torch.equal(reference.gaussian.covariance, torch.eye(64).double())
    assert list(NpzImages(str(file), 5).pieces()) == []


def test_references_of_something_else_are_refused(
    world: World, extractor: Extractor, look: Look, tmp_path: Path
) -> None:
    np.savez(tmp_path / "wide.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    np.savez(tmp_path / "empty.npz", other=np.zeros(3))
    objects = np.array([{}, {}], dtype=object)
    np.savez(tmp_path / "objects.npz", mu=objects, sigma=objects)
    (tmp_path / "damaged.npz").write_bytes(b"PK nothing")
    (tmp_path / "damaged.safetensors").write_bytes(b"nothing")
    other = write_digits(tmp_path / "other", rows=500)
    images = DecodedSet(str(tmp_path / "other"), other)
    make_reference(str(tmp_path / "other.safetensors"), images, extractor, look, keep=5, shown=0)
    shutil.copy(Path(world.student) / "model.safetensors", tmp_path / "model.safetensors")
    for name, message in (
        ("wide.npz", "it has 2048 features, this extractor 64"),
        ("empty.npz", "it lacks mu and sigma"),
        ("objects.npz", "not an .npz.*allow_pickle"),
        ("damaged.npz", "not an .npz"),
        ("damaged.safetensors", "damaged"),
        ("model.safetensors", "no reference of jobs/reference.py"),
        ("other.safetensors", "it is of the latent set"),
        ("nothing.npz", "nothing lies there"),
    ):
        with pytest.raises(InvalidInputError, match=f"(?s)reference_uri.*{message}"):
            find_reference(str(tmp_path / name), extractor, world.manifest)
    stranger = load_features(world.features)
    stranger.sha256 = "0" * 64
    with pytest.raises(InvalidInputError, match="made by the extractor"):
        find_reference(str(tmp_path / "other.safetensors"), stranger, world.manifest)


def test_images_of_a_folder_are_cut_and_broken_ones_left_out(tmp_path: Path) -> None:
    for index, shape in enumerate([(8, 8), (12, 8), (8, 20)]):
        folder = tmp_path / "images" / f"class{index % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(index).integers(0, 256, (*shape, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    (tmp_path / "images" / "class0" / "broken.png").write_bytes(b"no image")
    given = ImagesConfig(kind="folder", uri=str(tmp_path / "images"), size=8)
    images = SourceImages(image_source(given))
    batches = [batch for piece in images.pieces() for batch in images.batches(piece, 2)]
    shapes = [tuple(batch.shape) for batch, _ in batches]
    assert sum(shape[0] for shape in shapes) == 3
    assert {shape[1:] for shape in shapes} == {(3, 8, 8)}
    assert sorted(label for _, labels in batches for label in labels.tolist()) == [0, 0, 1]
    whole = Image.open(tmp_path / "images" / "class0" / "0.png")
    expected = torch.from_numpy(np.array(whole)).permute(2, 0, 1)
    assert any(torch.equal(image, expected) for batch, _ in batches for image in batch)


@pytest.mark.usefixtures("ray_cluster")
def test_the_job(world: World, store: Store, extractor: Extractor, tmp_path: Path) -> None:
    options = [
        "run.name=real",
        f"run.storage_uri={tmp_path / 'runs'}",
        f"run.tracking.uri={store.uri}",
        f"features_uri={world.features}",
        "keep=40",
    ]
    outputs = {kind: tmp_path / f"{kind}.safetensors" for kind in ("latents", "images")}
    latents = load_config(
        ReferenceConfig,
        None,
        [*options, f"data.uri={world.data}", f"output_uri={outputs['latents']}"],
    )
    images = load_config(
        ReferenceConfig, None, [*options, "images.kind=digits", f"output_uri={outputs['images']}"]
    )
    results = {kind: prepare(c).execute() for kind, c in (("latents", latents), ("images", images))}
    assert {result.metrics["images"] for result in results.values()} == {1797.0}
    found = {}
    for kind, file in outputs.items():
        reference = find_reference(str(file), extractor, world.manifest)
        found[kind] = read_reference(reference, extractor, lambda _: [], 40)
    # The latents of digits are their pixels, but for their float16.
    assert found["latents"].gaussian.distance(found["images"].gaussian) < 1e-3
    assert found["latents"].features is not None
    assert len(found["latents"].features) == 40
    run = store.client.get_run(str(results["latents"].run_id))
    assert run.data.tags["facm.extractor_sha256"] == extractor.sha256


def test_the_job_refuses(world: World, tmp_path: Path) -> None:
    given = {"run.name": "real", "features_uri": world.features, "output_uri": "r.safetensors"}
    for changes, message in (
        ({}, "data = None: and images: not just one of them"),
        ({"data.uri": "a", "images.kind": "digits"}, "not just one of them"),
        ({"data.uri": "a", "output_uri": "r.npz"}, r"output_uri = 'r.npz': no .safetensors"),
        ({"data.uri": "a", "keep": "0"}, "keep = 0: below 1"),
        ({"data.uri": "a", "extractor": "vgg"}, "extractor = 'vgg'"),
        ({"data.uri": str(tmp_path / "no")}, "no latent set"),
    ):
        options = [f"{key}={value}" for key, value in (given | changes).items()]
        options += [f"run.storage_uri={tmp_path}", f"run.tracking.uri=sqlite:///{tmp_path}/m.db"]
        with pytest.raises(InvalidInputError, match=message):
            prepare(load_config(ReferenceConfig, None, options))
