"""Inception and DINOv2, of random weights: published ones cannot be had in a test."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import Dataset
from torch_fidelity import calculate_metrics
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.helpers import text_to_dtype
from transformers import Dinov2Config, Dinov2Model

from facm_core.errors import InvalidInputError
from facm_platform.evaluation.extractors import load_extractor
from facm_platform.evaluation.measured import Measured, Reference, score


@pytest.fixture(scope="module")
def inception(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file of weights, as torch-fidelity publishes them."""

    def random(_uri: str, **_: object) -> dict[str, Tensor]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
            patch.setattr(module, "load_state_dict_from_url", lambda *_, **__: {})
            torch.manual_seed(0)
            made = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
        for name, buffer in made.named_buffers():
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
        return dict(made.state_dict())

    import torch_fidelity.feature_extractor_inceptionv3 as module

    file = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(random(""), file)
    return str(file)


@pytest.fixture
def images() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (3, 3, 40, 40), generator=generator, dtype=torch.uint8)


def test_inception_is_torch_fidelitys(inception: str, images: Tensor) -> None:
    theirs = FeatureExtractorInceptionV3(
        "inception-v3-compat",
        ["2048", "logits_unbiased"],
        feature_extractor_weights_path=inception,
        feature_extractor_internal_dtype="float64",
    )
    spatial = []
    theirs.Mixed_6d.branch1x1.register_forward_hook(lambda *given: spatial.append(given[2]))
    features, logits = theirs(images)
    extractor = load_extractor("inception", inception)
    seen = extractor.to(torch.device("cpu"), text_to_dtype("float64", "float32"))(images)
    assert torch.equal(seen.features, features)
    assert seen.logits is not None
    assert seen.spatial is not None
    assert torch.equal(seen.logits, logits)
    assert seen.labels is None
    assert seen.features.shape == (3, extractor.dimension)
    assert seen.logits.shape == (3, extractor.classes)
    assert seen.spatial.shape == (3, extractor.spatial_dimension)
    # As ADM's evaluator: preds[..., :7].reshape([preds.shape[0], -1]), channels last.
    adm = spatial[0].permute(0, 2, 3, 1)[..., :7].reshape(3, -1)
    assert torch.equal(seen.spatial, adm)
    assert float(seen.spatial.std()) > 0


class Pictures(Dataset[Tensor]):
    """As torch-fidelity takes them."""

    def __init__(self, images: Tensor) -> None:
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Tensor:
        return self._images[index]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_scores_are_torch_fidelitys(inception: str) -> None:
    """From images to numbers; of smooth pictures, since noise is all alike to a network."""
    generator = torch.Generator().manual_seed(2)
    small = torch.randint(0, 256, (80, 3, 5, 5), generator=generator).float()
    smooth = interpolate(small, size=32, mode="bilinear").byte()
    generated, real = smooth[:40], 255 - smooth[40:] // 2
    theirs = calculate_metrics(
        input1=Pictures(generated),
        input2=Pictures(real),
        feature_extractor="inception-v3-compat",
        save_cpu_ram=True,
        feature_extractor_weights_path=inception,
        feature_extractor_internal_dtype="float64",
        cuda=False,
        verbose=False,
        batch_size=40,
        samples_shuffle=False,
        isc=True,
        fid=True,
        kid=True,
        kid_subset_size=40,
        prc=True,
    )
    extractor = load_extractor("inception", inception).to(torch.device("cpu"), torch.float64)

    def measured(images: Tensor) -> Measured:
        part = Measured(extractor, keep=40)
        part.update(extractor(images), torch.zeros(len(images)), {})
        return part

    parts = [measured(some) for some in generated.split(4)]
    found = score(parts, Reference.of(measured(real)))
    names = {
        "fid": "frechet_inception_distance",
        "kid": "kernel_inception_distance_mean",
        "inception_score": "inception_score_mean",
        "precision": "precision",
        "recall": "recall",
    }
    for ours, name in names.items():
        assert getattr(found, ours) == pytest.approx(theirs[name], rel=1e-6), ours
    assert found.sfid is not None
    assert found.sfid > 0


def test_other_files_are_not_inception(inception: str, tmp_path: Path) -> None:
    for content, message in ((b"", "not a checkpoint"), (b"PK", "not a checkpoint")):
        file = tmp_path / "other.pth"
        file.write_bytes(content)
        with pytest.raises(InvalidInputError, match=message) as caught:
            load_extractor("inception", str(file))
        assert "weights-inception-2015-12-05-6726825d.pth" in caught.value.remedy
    torch.save({"conv.weight": torch.zeros(3)}, file)
    with pytest.raises(InvalidInputError, match=r"features_uri.*its tensors are not"):
        load_extractor("inception", str(file))
    with pytest.raises(InvalidInputError, match="there is no such file"):
        load_extractor("inception", str(tmp_path / "nothing.pth"))
    # A file that holds code is not executed.
    torch.save({"weights": Path(tmp_path)}, file)
    with pytest.raises(InvalidInputError, match="not a checkpoint of tensors"):
        load_extractor("inception", str(file))
    assert load_extractor("inception", inception).sha256 != ""


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small one, in a folder as Hugging Face's."""
    folder = tmp_path_factory.mktemp("dinov2")
    config = Dinov2Config(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=224, patch_size=14
    )
    torch.manual_seed(0)
    Dinov2Model(config).save_pretrained(folder)
    return str(folder)


def test_dinov2_gives_the_class_token(dinov2: str, images: Tensor) -> None:
    extractor = load_extractor("dinov2", dinov2)
    assert extractor.name == "dinov2-48"
    seen = extractor(images)
    assert (seen.logits, seen.spatial, seen.labels) == (None, None, None)
    model = Dinov2Model.from_pretrained(dinov2).eval()
    pixels = []
    for image in images:
        channels = [
            # Pillow resizes floats only one channel at a time.
            np.asarray(Image.fromarray(one.numpy().astype(np.float32)).resize((224, 224), 3))
            for one in image
        ]
        scaled = np.stack(channels) / 255
        mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
        pixels.append((scaled - mean[:, None, None]) / std[:, None, None])
    with torch.no_grad():
        expected = model(torch.tensor(np.stack(pixels)).float()).pooler_output
    torch.testing.assert_close(seen.features, expected, rtol=1e-3, atol=1e-3)
    assert float(seen.features.std(dim=0).mean()) > 1e-3


def test_other_folders_are_not_dinov2(dinov2: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="not a DINOv2"):
        load_extractor("dinov2", str(tmp_path / "nothing"))
    copy = tmp_path / "copy"
    shutil.copytree(dinov2, copy)
    config = (copy / "config.json").read_text()
    (copy / "config.json").write_text(config.replace('"dinov2"', '"bert"'))
    with pytest.raises(InvalidInputError, match="it is a bert"):
        load_extractor("dinov2", str(copy))


def test_photographs_have_three_channels(inception: str, dinov2: str) -> None:
    for kind, uri in (("inception", inception), ("dinov2", dinov2)):
        extractor = load_extractor(kind, uri)
        extractor.check("features_uri", (3, 8, 8))
        with pytest.raises(InvalidInputError, match="have 1 channels"):
            extractor.check("features_uri", (1, 8, 8))
