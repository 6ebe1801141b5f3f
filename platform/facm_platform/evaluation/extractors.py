"""The extractors that there are, by kind."""

from __future__ import annotations

from collections.abc import Callable

from facm_core.errors import require_one_of
from facm_platform.evaluation.extractor import Extractor
from facm_platform.evaluation.features import load_features

FITTED, INCEPTION, DINOV2 = "fitted", "inception", "dinov2"
KINDS = (FITTED, INCEPTION, DINOV2)


def load_extractor(kind: str, uri: str, field: str = "features_uri") -> Extractor:
    """Read an extractor.

    Args:
        kind: One of `KINDS`.
        uri: Of its weights.
        field: Configuration field that named it, for messages.

    Raises:
        InvalidInputError: nothing there, damaged, or something else.
    """
    require_one_of("extractor", kind, KINDS)
    return _loader(kind)(uri, field)


def _loader(kind: str) -> Callable[[str, str], Extractor]:
    # Their libraries are loaded where they are used.
    if kind == INCEPTION:
        from facm_platform.evaluation.inception import load_inception

        return load_inception
    if kind == DINOV2:
        from facm_platform.evaluation.dinov2 import load_dinov2

        return load_dinov2
    return load_features
