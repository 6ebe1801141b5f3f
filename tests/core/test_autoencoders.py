"""Autoencoders by name."""

import pytest
import torch

from facm_core.autoencoders import load_autoencoder
from facm_core.errors import InvalidInputError


def test_identity_gives_the_pixels_back() -> None:
    images = torch.rand(3, 1, 8, 8) * 2 - 1
    identity = load_autoencoder("identity")

    assert identity.latent_shape((1, 8, 8)) == (1, 8, 8)
    assert torch.equal(identity.encode(images), images)
    assert torch.equal(identity.decode(identity.encode(images)), images)
    assert identity.decode(torch.tensor([-3.0, 0.5, 3.0])).tolist() == [-1.0, 0.5, 1.0]


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InvalidInputError, match=r"data.autoencoder = 'vae'.*Use one of identity"):
        load_autoencoder("vae", field="data.autoencoder")
