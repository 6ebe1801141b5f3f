"""Prompts, as a user keeps them: a UTF-8 text file, one on each line."""

from __future__ import annotations

from facm_core.errors import InvalidInputError, require
from facm_platform import storage


def read_prompts(uri: str, field: str = "prompts_uri") -> tuple[str, ...]:
    """The lines of the file at `uri` that are not empty, without spaces at their ends.

    Raises:
        InvalidInputError: no such file, not UTF-8, or nothing in it.
    """
    address = storage.absolute(uri, field)
    storage.check_reachable(address, field)
    remedy = "Give a UTF-8 text file with a prompt on each line"
    try:
        lines = storage.read_bytes(address).decode().splitlines()
    except (FileNotFoundError, IsADirectoryError) as error:
        raise InvalidInputError(field, uri, "no file lies there", remedy) from error
    except UnicodeDecodeError as error:
        raise InvalidInputError(field, uri, f"not UTF-8 ({error.reason})", remedy) from error
    prompts = tuple(filter(None, (line.strip() for line in lines)))
    require(bool(prompts), field, uri, "there is no prompt in it", remedy)
    return prompts
