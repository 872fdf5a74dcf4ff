"""Configurations to JSON and back."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from difflib import get_close_matches
from typing import Any, Literal

from bytelm.config.base import (
    LARGEST_FLOAT,
    require,
)
from bytelm.config.models import MODEL_CONFIGS
from bytelm.config.optimizer import (
    DEFAULT_OPTIMIZER,
    OPTIMIZER_CONFIGS,
    OptimizerConfig,
    optimizer_class,
    without_foreign_fields,
)
from bytelm.config.run import DataConfig

_TAGS: dict[type, str] = {kind: "architecture" for kind in MODEL_CONFIGS} | {
    kind: "name" for kind in OPTIMIZER_CONFIGS.values()
}
"""Class of a tagged union → the attribute that holds its tag in a file."""


_BEFORE: dict[type, dict[str, Any]] = {
    DataConfig: {"order": "grain", "split_rule": "rank", "raw": True}
}
"""What files mean that were written before a field existed, if it is not the field's default."""

_ALWAYS_WRITTEN = {DataConfig: {"paths", "sequence_length", "split_seed", "shuffle_seed"}}
"""Fields without which a file was written by a person, who leaves out what has its default."""


_ONLY_IF_CHANGED = {"global_block"}
"""Fields that are left out while they have their default, so that older versions read the file."""


_VERSIONED, _PATCHER_VERSION = "blt", 2
"""Written with every BLT. Files without it have version 1, whose `space` is the patcher `word`."""


def recipe_text(recipe: Any) -> bytes:
    """What the `config.json` of a run folder holds."""
    return (json.dumps(to_dict(recipe), indent=2) + "\n").encode("utf-8")


def to_dict(config: Any) -> Any:
    """JSON-ready form of a config; one of a tagged union begins with its tag."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        fields = {f.name: to_dict(getattr(config, f.name)) for f in _written(config)}
        tag = _TAGS.get(type(config))
        if tag and getattr(config, tag) == _VERSIONED:
            fields["patcher_version"] = _PATCHER_VERSION
        return {tag: getattr(config, tag), **fields} if tag else fields
    if isinstance(config, (tuple, list)):
        return [to_dict(item) for item in config]
    return config


def _written(config: Any) -> list[Any]:
    """The fields of `config` that a file holds."""
    return [
        f
        for f in dataclasses.fields(config)
        if f.name not in _ONLY_IF_CHANGED or getattr(config, f.name) != f.default_factory()  # pyright: ignore[reportCallIssue]
    ]


def from_dict(kind: Any, value: Any, where: str = "config") -> Any:
    """Builds `kind` from what `to_dict` gave; unknown, missing or ill-typed fields raise."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if type(None) in arguments:
        return None if value is None else from_dict(arguments[0], value, where)
    if origin in (types.UnionType, typing.Union) or kind in MODEL_CONFIGS:
        return model_from_dict(value, where)
    if isinstance(kind, type) and issubclass(kind, OptimizerConfig):
        return _optimizer_from_dict(value, where)
    if dataclasses.is_dataclass(kind):
        return _dataclass_from_dict(kind, value, where)
    if origin is Literal:
        require(value in arguments, f"{where}={value!r}: choose one of {', '.join(arguments)}")
        return value
    if origin is tuple:
        require(isinstance(value, (list, tuple)), f"{where}={value!r}: must be a list")
        return tuple(from_dict(arguments[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        fits = abs(value) <= LARGEST_FLOAT
        require(fits, f"{where}: must be a finite value, at most {LARGEST_FLOAT:.7g}")
        return float(value)
    require(type(value) is kind, f"{where}={value!r}: must be of type {kind.__name__}")
    return value


def model_from_dict(value: Any, where: str = "model") -> Any:
    """The model configuration of the architecture that `value` names."""
    require(isinstance(value, dict), f"{where}={value!r}: must be an object")
    fields = dict(value)
    tag = fields.pop("architecture", None)
    known = {kind.architecture: kind for kind in MODEL_CONFIGS}
    require(
        isinstance(tag, str) and tag in known,
        f"{where}.architecture={tag!r}: choose one of {', '.join(known)}",
    )
    if tag == _VERSIONED:
        version = fields.pop("patcher_version", 1)
        newest = f"choose 1 or {_PATCHER_VERSION}, or install a newer bytelm"
        require(version in (1, 2), f"{where}.patcher_version={version!r}: {newest}")
        if version == 1 and fields.get("patcher") == "space":
            fields["patcher"] = "word"
    return _dataclass_from_dict(known[tag], fields, where)


def _optimizer_from_dict(value: Any, where: str) -> OptimizerConfig:
    """The optimizer configuration that `value` names, in the current form or the older flat one."""
    require(isinstance(value, dict), f"{where}={value!r}: must be an object")
    fields = dict(value)
    kind = optimizer_class(fields.pop("name", DEFAULT_OPTIMIZER), where)
    return _dataclass_from_dict(kind, without_foreign_fields(kind, fields, where), where)


def _dataclass_from_dict(kind: Any, value: Any, where: str) -> Any:
    require(isinstance(value, dict), f"{where}={value!r}: must be an object")
    hints = typing.get_type_hints(kind)
    names = {f.name for f in dataclasses.fields(kind)}
    unknown = sorted(set(value) - names)
    if unknown:
        near = get_close_matches(unknown[0], names, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        require(False, f"{where}.{unknown[0]}: unknown field of {kind.__name__}{hint}")
    written_by_a_run = _ALWAYS_WRITTEN.get(kind, set()) <= set(value)
    known = _BEFORE.get(kind, {}) | value if written_by_a_run else value
    values = {k: from_dict(hints[k], v, f"{where}.{k}") for k, v in known.items()}
    needed = {
        f.name
        for f in dataclasses.fields(kind)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    missing = sorted(needed - set(values))
    require(not missing, f"{where}: has no {' and no '.join(missing)}; write it")
    return kind(**values)
