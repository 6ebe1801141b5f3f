"""What a search varies: values of a recipe, some of them only beside one choice of others.

A space is shaped like the recipe. Where the recipe has a value, it holds that value, for all
trials, or a mapping of one key, which says where values come from:

    objective:
      lambda_fm: {log_uniform: [1.0e-3, 10]}
      p: {uniform: [0.25, 1]}
      times:
        one_of:
          - {kind: arctan_lognormal, mean: {uniform: [-0.5, 2]}, std: {uniform: [0.8, 2.4]}}
          - {kind: uniform}
    train:
      global_batch_size: {choice: [128, 256]}
      warmup_images: {integer: [0, 10000]}

The sections of ``one_of`` are alternatives: what stands in one of them never reaches a trial that
has drawn another.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from facm_core.errors import InvalidInputError, require

Values = dict[str, Any]
"""Of a recipe, by dotted key."""

Given = Mapping[str, Any]


class Chooser(Protocol):
    """Who draws the values; Optuna's trials do."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        """A number in [low, high]; with `log`, their logarithms are equally likely."""

    def suggest_int(self, name: str, low: int, high: int) -> int:
        """A whole number in [low, high]."""

    def suggest_categorical(self, name: str, choices: Sequence[str]) -> Any:
        """One of `choices`."""


@dataclass(frozen=True)
class Dimension:
    """One value of the recipe that is drawn.

    Attributes:
        name: The search's for it: its key, behind the alternatives that it is in.
        key: The recipe's.
        describe: Where its values come from, in words.
        draw: Asks for one.
        ends: Its first and its last value; all of them where these are single ones.
        drawn: All that a chooser may answer; None for numbers of a range.
        log: Whether the logarithms of those are equally likely.
    """

    name: str
    key: str
    describe: str
    draw: Callable[[Chooser], Any]
    ends: tuple[Any, ...]
    drawn: Sequence[Any] | None
    log: bool = False


@dataclass(frozen=True)
class Alternatives:
    """Sections of which a trial gets one.

    Attributes:
        name: The search's for the choice: the key of the sections.
        spaces: By their labels.
    """

    name: str
    spaces: Mapping[str, Space]


@dataclass(frozen=True)
class Space:
    """All that a search varies, or one of some alternatives.

    Attributes:
        fixed: The same for all trials.
        dimensions: What is drawn.
        alternatives: Choices of sections.
    """

    fixed: Values
    dimensions: tuple[Dimension, ...]
    alternatives: tuple[Alternatives, ...]

    def suggest(self, chooser: Chooser) -> Values:
        """One trial's values."""
        values = dict(self.fixed)
        for dimension in self.dimensions:
            values[dimension.key] = dimension.draw(chooser)
        for choice in self.alternatives:
            label = chooser.suggest_categorical(choice.name, list(choice.spaces))
            values |= choice.spaces[label].suggest(chooser)
        return values

    @property
    def size(self) -> float:
        """How many different trials there are; infinite where a dimension is a range."""
        counts = [math.inf if d.drawn is None else len(d.drawn) for d in self.dimensions]
        choices = [sum(s.size for s in choice.spaces.values()) for choice in self.alternatives]
        return math.prod([*counts, *choices])

    def grid(self) -> Iterator[dict[str, Any]]:
        """What a chooser is to answer, by name, for each trial that there is; `size` is finite."""
        own = [[{d.name: answer} for answer in d.drawn or ()] for d in self.dimensions]
        chosen = [
            [{c.name: label} | below for label, s in c.spaces.items() for below in s.grid()]
            for c in self.alternatives
        ]
        for answers in itertools.product(*own, *chosen):
            yield {name: value for one in answers for name, value in one.items()}

    def all_dimensions(self) -> Iterator[tuple[Dimension, str]]:
        """Every dimension, with the alternative that it belongs to, in words."""
        yield from ((dimension, "") for dimension in self.dimensions)
        for choice in self.alternatives:
            for label, space in choice.spaces.items():
                for dimension, inner in space.all_dimensions():
                    yield dimension, inner or f"{choice.name}: {label}"

    def edges(self) -> Iterator[Values]:
        """Trials of the first values, but for one dimension, or alternative, at another.

        If a recipe takes all of these, it takes every end of every range.
        """
        firsts = [next(next(iter(c.spaces.values())).edges()) for c in self.alternatives]
        corner = self.fixed | {d.key: d.ends[0] for d in self.dimensions}
        for first in firsts:
            corner |= first
        yield corner
        for dimension in self.dimensions:
            for end in dimension.ends[1:]:
                yield corner | {dimension.key: end}
        for choice, first in zip(self.alternatives, firsts, strict=True):
            others = {key: value for key, value in corner.items() if key not in first}
            for space in choice.spaces.values():
                yield from (others | values for values in space.edges())


def parse(given: Given) -> Space:
    """The space that a search file describes.

    Raises:
        InvalidInputError: an empty range, no choice, or a mapping that is neither a section nor
            says where values come from; ``space.KEY`` is named.
    """
    return _parsed(given, "", "")


def _parsed(given: Given, key: str, within: str) -> Space:
    """What stands below `key`; `within` is what the names of its dimensions have before them."""
    fixed: Values = {}
    dimensions: list[Dimension] = []
    alternatives: list[Alternatives] = []
    for name, value in given.items():
        here = f"{key}.{name}" if key else name
        if not isinstance(value, Mapping):
            fixed[here] = value
            continue
        sources = value.keys() & {*_SOURCES, _ONE_OF}
        require(
            len(value) == 1 or not sources,
            f"space.{here}",
            dict(value),
            f"{' and '.join(sorted(sources))} must stand alone",
            "Give it no other key",
        )
        if _ONE_OF in sources:
            alternatives.append(_alternatives(value[_ONE_OF], here, within))
        elif sources:
            ((source, values),) = value.items()
            dimensions.append(_SOURCES[source](values, here, within + here))
        else:
            below = _parsed(value, here, within)
            fixed |= below.fixed
            dimensions += below.dimensions
            alternatives += below.alternatives
    return Space(fixed, tuple(dimensions), tuple(alternatives))


def _alternatives(given: Any, key: str, within: str) -> Alternatives:
    sections = isinstance(given, Sequence) and all(isinstance(one, Mapping) for one in given)
    if not (sections and len(given) > 1):
        problem, remedy = "not two or more sections", "Use e.g. one_of: [{kind: a}, {kind: b}]"
        raise InvalidInputError(f"space.{key}", given, problem, remedy)
    # By the value that tells them apart, as `kind` does.
    labels = [str(next((v for v in one.values() if isinstance(v, str)), "")) for one in given]
    if len(set(labels)) < len(labels) or "" in labels:
        labels = [str(number) for number, _ in enumerate(given)]
    spaces = {
        label: _parsed(one, key, f"{within}{label}: ")
        for label, one in zip(labels, given, strict=True)
    }
    return Alternatives(within + key, spaces)


def _range(log: bool, given: Any, key: str, name: str) -> Dimension:
    low, high = _bounds(given, key)
    require(low > 0 or not log, f"space.{key}", given, "has no logarithm", "Begin above 0")
    low, high = float(low), float(high)

    def draw(chooser: Chooser) -> float:
        return chooser.suggest_float(name, low, high, log=log)

    words = f"{low:g} to {high:g}{', by logarithm' if log else ''}"
    return Dimension(name, key, words, draw, (low, high), None, log)


def _integer(given: Any, key: str, name: str) -> Dimension:
    low, high = _bounds(given, key)
    whole = isinstance(low, int) and isinstance(high, int)
    require(whole, f"space.{key}", given, "no whole numbers", "Use them, or uniform")

    def draw(chooser: Chooser) -> int:
        return chooser.suggest_int(name, low, high)

    return Dimension(name, key, f"{low} to {high}, whole", draw, (low, high), range(low, high + 1))


def _choice(given: Any, key: str, name: str) -> Dimension:
    listed = isinstance(given, Sequence) and not isinstance(given, str)
    labels = [str(value) for value in given] if listed else []
    require(
        bool(labels) and len(set(labels)) == len(labels),
        f"space.{key}",
        given,
        "not a list of different values",
        "Use e.g. choice: [1, 2]",
    )
    values = tuple(given)

    def draw(chooser: Chooser) -> Any:
        # By what they look like: a list, for one, is no category.
        return values[labels.index(chooser.suggest_categorical(name, labels))]

    return Dimension(name, key, ", ".join(labels), draw, values, labels)


def _bounds(given: Any, key: str) -> tuple[Any, Any]:
    pair = isinstance(given, Sequence) and len(given) == 2
    numbers = pair and all(type(value) in (int, float) for value in given)
    require(
        numbers and -math.inf < given[0] < given[1] < math.inf,
        f"space.{key}",
        given,
        "an empty range",
        "Give two numbers, the smaller one first",
    )
    return given[0], given[1]


_ONE_OF = "one_of"
_SOURCES: Mapping[str, Callable[[Any, str, str], Dimension]] = {
    "uniform": partial(_range, False),
    "log_uniform": partial(_range, True),
    "integer": _integer,
    "choice": _choice,
}
