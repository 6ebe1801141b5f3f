"""What makes two numbers comparable, and what happens to an image before it is measured."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch

from facm_core.errors import InvalidInputError
from facm_platform.evaluation import Protocol
from facm_platform.evaluation.protocol import check_published, dtype_of

PROTOCOL = Protocol(
    extractor="digits", extractor_sha256="a" * 64, reference_sha256="b" * 64, samples=50, seed=3
)


def test_the_id_is_readable_and_changes_with_every_field() -> None:
    assert re.fullmatch(r"digits-50-[0-9a-f]{12}", PROTOCOL.id)
    assert dataclasses.replace(PROTOCOL).id == PROTOCOL.id
    ids = {PROTOCOL.id}
    for field in dataclasses.fields(Protocol):
        value = getattr(PROTOCOL, field.name)
        changed = value + 1 if isinstance(value, int) else f"{value}x"
        ids.add(dataclasses.replace(PROTOCOL, **{field.name: changed}).id)
    assert len(ids) == 1 + len(dataclasses.fields(Protocol))


def test_labels_are_balanced_and_seeds_belong_to_the_sample() -> None:
    labels = PROTOCOL.sample_labels(0, 50, 10)
    assert labels.bincount().tolist() == [5] * 10
    assert torch.equal(PROTOCOL.sample_labels(7, 21, 10), labels[7:21])
    seeds = PROTOCOL.sample_seeds(0, 50)
    assert PROTOCOL.sample_seeds(7, 21) == seeds[7:21]
    assert seeds[0] == 3 * 2**32
    other = dataclasses.replace(PROTOCOL, seed=2).sample_seeds(0, 50)
    assert len({*seeds, *other}) == 100


def test_precision_is_a_dtype() -> None:
    assert dtype_of(PROTOCOL.precision) == torch.float64
    with pytest.raises(KeyError):
        dtype_of("float8")


def test_random_labels_belong_to_the_sample_and_are_uniform() -> None:
    protocol = dataclasses.replace(PROTOCOL, label_policy="random")
    labels = protocol.sample_labels(0, 2000, 10)
    assert torch.equal(protocol.sample_labels(7, 21, 10), labels[7:21])
    counts = labels.bincount(minlength=10).double()
    # Chi-squared of nine degrees of freedom: beyond 27.9 once in a thousand seeds.
    assert 0 < float(((counts - 200) ** 2 / 200).sum()) < 27.9
    other = dataclasses.replace(protocol, seed=4).sample_labels(0, 2000, 10)
    assert not torch.equal(other, labels)


def test_a_published_name_is_for_what_it_says() -> None:
    adm = Protocol(
        name="adm-imagenet256-50k",
        extractor="inception-v3-tf",
        extractor_sha256="6726825d" + "0" * 56,
        reference_sha256="b" * 64,
        samples=50_000,
        seed=0,
    )
    check_published("protocol", adm)
    assert re.fullmatch(r"adm-imagenet256-50k-[0-9a-f]{12}", adm.id)
    other = dataclasses.replace(adm, samples=5000, extractor_sha256="a" * 64)
    with pytest.raises(InvalidInputError, match=r"is 'a+', not '6726825d'; samples is 5000, not"):
        check_published("protocol", other)
    check_published("protocol", PROTOCOL)
