"""The one exception for input that its author can mend."""

from __future__ import annotations


class InvalidInputError(ValueError):
    """A value that cannot be used: names the field, shows the value, says what to do.

    Args:
        field: Dotted name of the field, e.g. ``objective.p``.
        value: What was given.
        problem: Why it cannot be used, without a final stop.
        remedy: What to write or do instead, without a final stop.
    """

    def __init__(self, field: str, value: object, problem: str, remedy: str) -> None:
        super().__init__(field, value, problem, remedy)
        self.field, self.value, self.problem, self.remedy = field, value, problem, remedy

    def __str__(self) -> str:
        return f"{self.field} = {self.value!r}: {self.problem}. {self.remedy}."

    def inside(self, path: str) -> InvalidInputError:
        """The same error with its field named from the root of a nested configuration."""
        field = f"{path}.{self.field}" if path else self.field
        return InvalidInputError(field, self.value, self.problem, self.remedy)


def require(condition: bool, field: str, value: object, problem: str, remedy: str) -> None:
    """Raise `InvalidInputError` unless `condition` holds."""
    if not condition:
        raise InvalidInputError(field, value, problem, remedy)


def require_one_of(field: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise `InvalidInputError` unless `value` is one of `choices`."""
    require(value in choices, field, value, "unknown choice", f"Use one of {', '.join(choices)}")
