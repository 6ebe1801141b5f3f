"""Prompts, as a user keeps them: a UTF-8 text file, one on each line."""

from __future__ import annotations

from facm_core.errors import InvalidInputError, require
from facm_platform import storage

_LISTED = 5


def read_prompts(uri: str, field: str = "prompts_uri") -> tuple[str, ...]:
    """The lines of a UTF-8 file, local or ``s3://``, without spaces at their ends.

    Raises:
        InvalidInputError: no such file, no UTF-8, or lines that are blank or, but for spaces, say
            what an earlier one says; `field` is the one at fault.
    """
    uri = storage.absolute(uri, field)
    storage.check_reachable(uri, field)
    remedy = "Give a UTF-8 text file with a prompt on each line"
    try:
        text = storage.read_bytes(uri).decode("utf-8-sig")
    except (FileNotFoundError, IsADirectoryError):
        raise InvalidInputError(field, uri, "no such file", remedy) from None
    except UnicodeDecodeError as error:
        raise InvalidInputError(field, uri, f"not UTF-8 ({error})", remedy) from None
    lines = text.removesuffix("\n").split("\n")
    findings, first = [], dict[str, int]()
    for number, line in enumerate(lines, start=1):
        prompt = " ".join(line.split())
        if not prompt:
            findings.append(f"line {number} is blank")
        elif prompt in first:
            findings.append(f"line {number} repeats line {first[prompt]}")
        else:
            first[prompt] = number
    problem = "; ".join(findings[:_LISTED]) + "; ..." * (len(findings) > _LISTED)
    require(not findings, field, uri, problem, "Take these lines away")
    return tuple(map(str.strip, lines))
