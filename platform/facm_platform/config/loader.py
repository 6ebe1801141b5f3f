"""Recipe + dot overrides -> a validated tree of frozen dataclasses.

A schema is a frozen, keyword-only dataclass whose fields are scalars, tuples of scalars or further
schemas. OmegaConf merges and converts; each dataclass validates itself in ``__post_init__``.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from facm_core.errors import InvalidInputError

T = TypeVar("T")

RECIPES = Path(__file__).resolve().parents[3] / "jobs" / "recipes"


def load_config(
    schema: type[T],
    recipe: str | None = None,
    overrides: Sequence[str] = (),
    recipes: Path = RECIPES,
) -> T:
    """Build `schema` from its defaults, then a recipe, then ``key.path=value`` overrides.

    Args:
        schema: Frozen dataclass type.
        recipe: Name of a file in `recipes` (without ``.yaml``), or a path to a YAML file.
        overrides: OmegaConf dot list, e.g. ``["train.global_batch_size=64"]``.

    Raises:
        InvalidInputError: unknown key (the nearest known one is suggested), unusable value,
            missing value, or a recipe that does not exist.
    """
    config = _node(schema)
    layers = [OmegaConf.load(find_recipe(recipe, recipes))] if recipe is not None else []
    layers += [_parse_override(text) for text in overrides]
    for layer in layers:
        config = _merge(schema, config, layer)
    for missing in sorted(OmegaConf.missing_keys(config)):
        raise InvalidInputError(missing, "", "no value was given", f"Add {missing}=VALUE")
    return _build(schema, OmegaConf.to_container(config, resolve=True), path="")


def revised(config: T, values: Mapping[str, Any]) -> T:
    """`config` with other values, by dotted key.

    Raises:
        InvalidInputError: as `load_config`.
    """
    schema = type(config)
    node = _merge(schema, _node(schema), as_dict(config))
    for key, value in values.items():
        node = _merge(schema, node, _parse_override(f"{key}={json.dumps(value)}"))
    return _build(schema, OmegaConf.to_container(node, resolve=True), path="")


def find_recipe(recipe: str, recipes: Path = RECIPES) -> Path:
    """The file a ``--recipe`` argument names."""
    is_path = recipe.endswith((".yaml", ".yml"))
    path = Path(recipe) if is_path else recipes / f"{recipe}.yaml"
    if path.is_file():
        return path
    known = sorted(file.stem for file in recipes.glob("*.yaml"))
    remedy = f"Use a YAML file or one of {', '.join(known)}"
    raise InvalidInputError(
        "--recipe", recipe, f"there is no such recipe{_near(recipe, known)}", remedy
    )


def as_dict(config: Any) -> dict[str, Any]:
    """Plain nested dictionary of a configuration (tuples become lists)."""
    return typing.cast(dict[str, Any], json.loads(json.dumps(dataclasses.asdict(config))))


def as_yaml(config: Any) -> str:
    """YAML that `load_config` reads back to an equal configuration."""
    return OmegaConf.to_yaml(as_dict(config))


def config_hash(config: Any) -> str:
    """First 16 hexadecimal digits of the SHA-256 of the configuration's canonical JSON."""
    canonical = json.dumps(as_dict(config), sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def _node(schema: type) -> DictConfig:
    """OmegaConf's typed node of a schema; what has no default is missing in it, at any depth."""
    node = OmegaConf.structured(schema)
    OmegaConf.set_readonly(node, False)  # frozen dataclasses make it so
    for name, hint in typing.get_type_hints(schema).items():
        nested = _schema_of(hint)
        if nested is not None and OmegaConf.is_missing(node, name):
            node[name] = _node(nested)
    return typing.cast(DictConfig, node)


def _parse_override(text: str) -> DictConfig:
    key, equals, _ = text.partition("=")
    if not equals or not key:
        raise InvalidInputError(
            "override", text, "not of the form key=value", "Write key.path=value"
        )
    return OmegaConf.from_dotlist([text])


def _merge(schema: type, config: DictConfig, layer: Any) -> DictConfig:
    try:
        return typing.cast(DictConfig, OmegaConf.merge(config, layer))
    except ConfigKeyError as error:
        key = str(error.full_key)
        known = sorted(_leaves(schema))
        raise InvalidInputError(
            key,
            OmegaConf.select(layer, key),
            f"unknown key{_near(key, known)}",
            "Run with --print-config to see every key",
        ) from None
    except OmegaConfBaseException as error:
        key = str(error.full_key)
        problem = str(error.msg or error).splitlines()[0]
        raise InvalidInputError(
            key, OmegaConf.select(layer, key), problem, "Give a value of the expected type"
        ) from None


def _near(key: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if not close:
        leaf = key.rsplit(".", 1)[-1]
        close = [name for name in known if name.rsplit(".", 1)[-1] == leaf][:1]
    return f", did you mean {close[0]!r}?" if close else ""


def _schema_of(hint: Any) -> type | None:
    """The dataclass named by an annotation ``X`` or ``X | None``, if it names one."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return next((o for o in options if isinstance(o, type) and dataclasses.is_dataclass(o)), None)


def _leaves(schema: type, path: str = "") -> Iterator[str]:
    for name, hint in typing.get_type_hints(schema).items():
        nested = _schema_of(hint)
        if nested is None:
            yield path + name
        else:
            yield from _leaves(nested, f"{path}{name}.")


def _build(schema: type[T], values: Any, path: str) -> T:
    hints = typing.get_type_hints(schema)
    arguments: dict[str, Any] = {}
    for name, value in values.items():
        nested = _schema_of(hints[name])
        if nested is not None and value is not None:
            arguments[name] = _build(nested, value, f"{path}.{name}" if path else name)
        else:
            arguments[name] = tuple(value) if isinstance(value, list) else value
    try:
        return schema(**arguments)
    except InvalidInputError as error:
        raise error.inside(path) from None
