"""Command lines: tyro underneath, its errors in one line, fields reachable by bare name."""

import contextlib
import dataclasses
import io
import re
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import Any, TypeVar

import tyro

from bytelm_jax.config import Recipe

T = TypeVar("T")

_SECTIONS = ("model", "optimizer", "data", "train")


class UsageError(ValueError):
    """The command line is wrong; the message says where, and what would be right."""


def parse_call(function: Callable[..., int], argv: Sequence[str], prog: str) -> int:
    """Calls `function` with arguments parsed by its signature."""
    call = _parse(lambda: tyro.cli(_deferred(function), args=list(argv), prog=prog))
    return call()


def parse_recipe(recipe: Recipe, argv: Sequence[str], prog: str, description: str) -> Recipe:
    """The recipe with the overrides in `argv`; a field's section may be left out when clear."""
    kinds = {name: type(getattr(recipe, name)) for name in _SECTIONS}
    shape = dataclasses.make_dataclass("Overrides", kinds.items(), frozen=True)
    default = shape(**{name: getattr(recipe, name) for name in _SECTIONS})
    args = expand_names(recipe, argv)
    found = _parse(
        lambda: tyro.cli(shape, args=args, default=default, prog=prog, description=description)
    )
    return dataclasses.replace(recipe, **{n: getattr(found, n) for n in _SECTIONS})


def expand_names(recipe: Recipe, argv: Sequence[str]) -> list[str]:
    """Writes out `--steps` as `--train.steps` and so on; unknown names raise `UsageError`."""
    full = {f"{section}.{name}" for section in _SECTIONS for name in _leaves(recipe, section)}
    short: dict[str, list[str]] = {"data": ["data.paths"], "optimizer": ["optimizer.name"]}
    for name in sorted(full):
        short.setdefault(name.split(".", 1)[1], []).append(name)
        short.setdefault(name.rsplit(".", 1)[1], []).append(name)
    expanded = []
    for argument in argv:
        matched = re.fullmatch(r"--(no[-_])?([A-Za-z][\w.-]*)(=.*)?", argument, re.DOTALL)
        if not matched or argument == "--help":
            expanded.append(argument)
            continue
        negation, name, value = matched[1], matched[2].replace("-", "_"), matched[3] or ""
        if negation and f"no_{name}" in full | set(short):
            negation, name = None, f"no_{name}"
        if name not in full:
            choices = sorted(set(short.get(name, [])))
            if len(choices) != 1:
                raise UsageError(_unknown(matched[2], choices, sorted(full | set(short))))
            name = choices[0]
        section, field = name.split(".", 1)
        no = "no-" if negation else ""
        expanded.append(f"--{section}.{no}{field.replace('_', '-')}{value}")
    return expanded


def _unknown(name: str, choices: list[str], known: list[str]) -> str:
    if choices:
        options = ", ".join("--" + choice.replace("_", "-") for choice in choices)
        return f"--{name}: stands for several fields; write one of {options}"
    near = get_close_matches(name.replace("-", "_"), known, n=1)
    hint = f"did you mean --{near[0].replace('_', '-')}?" if near else "see --help"
    return f"--{name}: no such field; {hint}"


def _leaves(config: Any, section: str) -> list[str]:
    names = []
    part = getattr(config, section)
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        if dataclasses.is_dataclass(value):
            names += [f"{field.name}.{leaf}" for leaf in _leaves(part, field.name)]
        else:
            names.append(field.name)
    return names


def _deferred(function: Callable[..., int]) -> Callable[..., Callable[[], int]]:
    """`function` with the same signature and docstring, but only remembering its arguments.

    So that an error inside the command is never taken for an error on the command line.
    """
    import functools

    @functools.wraps(function)
    def remember(*args: Any, **kwargs: Any) -> Callable[[], int]:
        return lambda: function(*args, **kwargs)

    return remember


def _parse(parse: Callable[[], T]) -> T:
    """Runs a tyro parse; its boxed report of an error becomes one line in a `UsageError`."""
    report = io.StringIO()
    try:
        with contextlib.redirect_stderr(report):
            return parse()
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        text = re.split(r"Argument helptext|For full helptext", report.getvalue())[0]
        lines = [re.sub(r"[─│╭╮╰╯]|-{4,}", " ", line).strip() for line in text.splitlines()]
        kept = [line for line in lines if line]
        # The first line is the box's title ("Value error"), the rest says what is wrong.
        message = " ".join(" ".join(kept[1:] if len(kept) > 1 else kept).split())
        raise UsageError(f"{message}; see --help") from None
