"""Command lines: tyro underneath, one-line errors, fields addressable without their section."""

import codecs
import contextlib
import dataclasses
import functools
import inspect
import io
import json
import re
import sys
import typing
from collections.abc import Callable, Collection, Sequence
from difflib import get_close_matches
from typing import Any, TypeVar

from bytelm import recipes
from bytelm.config import (
    Recipe,
    models_with,
    optimizers_with,
    require_number,
)

T = TypeVar("T")

_SECTIONS = ("model", "optimizer", "data", "train")

ALIASES = {
    "seq_len": "data.sequence_length",
    "lr": "optimizer.learning_rate",
}
"""Names that training scripts commonly use for our fields."""

_PASSED_ON = "passed_on"
"""The parameter of a command that gets another program's options."""

_EVERYWHERE = ("reset_on",)
"""Bare names that set the field of that name in every part of a model at once."""


class UsageError(ValueError):
    """A wrong command line; the message names the argument and what would be right."""


def parse_call(function: Callable[..., int], argv: Sequence[str], prog: str) -> int:
    """Calls `function` with arguments parsed according to its signature.

    A parameter `passed_on` is no option: it gets what stands behind a lone `--`.
    """
    if _PASSED_ON in inspect.signature(function).parameters:
        end = [*argv, "--"].index("--")
        function, argv = _with_passed_on(function, argv[end + 1 :]), argv[:end]
    hints = typing.get_type_hints(function)
    hints = {name: hints[name] for name in inspect.signature(function).parameters}
    lists = [_option(name) for name, kind in hints.items() if typing.get_origin(kind) is tuple]
    args = join_lists(argv, lists)
    _refuse_unknown(inspect.signature(function), args)
    _refuse_empty(hints, args)
    import tyro

    call = _parse(lambda: tyro.cli(_deferred(function), args=args, prog=prog))
    return call()


def _with_passed_on(function: Callable[..., int], words: Sequence[str]) -> Callable[..., int]:
    """`function` without its parameter `passed_on`, which is `words`."""

    @functools.wraps(function)
    def bound(*args: Any, **kwargs: Any) -> int:
        return function(*args, **kwargs, **{_PASSED_ON: tuple(words)})

    signature = inspect.signature(function)
    kept = {name: each for name, each in signature.parameters.items() if name != _PASSED_ON}
    hints = typing.get_type_hints(function)
    bound.__annotations__ = {name: kind for name, kind in hints.items() if name != _PASSED_ON}
    vars(bound)["__signature__"] = signature.replace(parameters=list(kept.values()))
    return bound


def parse_recipe(recipe: Recipe, argv: Sequence[str], prog: str, description: str) -> Recipe:
    """The recipe with the overrides in `argv`; a field's section may be omitted if unambiguous."""
    recipe, argv = choose_optimizer(recipe, argv)
    kinds = {name: type(getattr(recipe, name)) for name in _SECTIONS}
    shape = dataclasses.make_dataclass("Overrides", kinds.items(), frozen=True)
    default = shape(**{name: getattr(recipe, name) for name in _SECTIONS})
    lists = [
        _option(f"{section}.{name}")
        for section in _SECTIONS
        for name, value in _leaves(getattr(recipe, section)).items()
        if isinstance(value, tuple)
    ]
    args = join_lists(expand_names(recipe, argv), lists)
    import tyro

    def parse() -> Any:
        return tyro.cli(shape, args=args, default=default, prog=prog, description=_DESCRIPTION)

    overrides = _parse(parse, functools.partial(_edit_help, recipe, description))
    return dataclasses.replace(recipe, **{n: getattr(overrides, n) for n in _SECTIONS})


_DESCRIPTION = "DESCRIPTION"
"""Stands for the description while tyro lays out its help, which would join its lines."""


def _edit_help(recipe: Recipe, description: str, text: str) -> str:
    """tyro's help with the description as it is, and a line for each group without an effect."""
    # A terminal without UTF-8 has no boxes.
    headings = [*re.finditer(r"(?m)^(?:╭─)? (?:(\S+) )?options [ ─]*╮?$", text)]
    ends = [*(heading.start() for heading in headings[1:]), len(text)]
    kept = [description.rstrip() + "\n\n"]
    for heading, end in zip(headings, ends, strict=True):
        part, _, nested = (heading[1] or "").removeprefix("model.").partition(".")
        setting = recipe.model.ineffective.get(part)
        if setting is None:
            kept.append(text[heading.start() : end])
        elif not nested:
            kept.append(f"model.{part} options: no effect with --model.{setting}\n")
    return "".join(kept)


def as_options(argv: Sequence[str]) -> list[str]:
    """Command lines with `section.field=value` written as options: train.steps=3, --train.steps=3.

    Values are JSON, as in a recipe's file, or plain text. Whatever else `argv` holds stays.
    """
    written = []
    for argument in argv:
        name, equals, text = argument.partition("=")
        if not equals or name.partition(".")[0] not in _SECTIONS or "." not in name:
            written.append(argument)
            continue
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = text
        if isinstance(value, bool) or value == []:
            written.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, list):
            written += [f"--{name}", *(str(each) for each in value)]
        else:
            # Numbers as they were typed; JSON's null is Python's None on a command line.
            plain = "None" if value is None else value if isinstance(value, str) else text
            written.append(f"--{name}={plain}")
    return written


def choose_optimizer(recipe: Recipe, argv: Sequence[str]) -> tuple[Recipe, list[str]]:
    """The recipe with the optimizer that `--optimizer NAME` names, and the remaining arguments.

    The optimizer decides which fields exist, so it is read first.
    """
    name, rest = take_option(argv, "optimizer", "optimizer.name", "name")
    if name is None:
        return recipe, rest
    return recipes.with_optimizer(recipe, name), rest


def take_option(argv: Sequence[str], *names: str) -> tuple[str | None, list[str]]:
    """The value of an option that is not a field, under any of its names, and the other arguments.

    The last value counts, as it does for fields; two different names at once raise `UsageError`.
    """
    rest: list[str] = []
    seen, value, waits = "", None, False
    for argument in argv:
        name, equals, attached = argument.partition("=")
        if waits:
            value, waits = "" if argument.startswith("--") else argument, False
        elif name.startswith("--") and name[2:].replace("-", "_") in names:
            if seen and seen.replace("-", "_") != name.replace("-", "_"):
                raise UsageError(f"{seen} and {name}: mean the same; give one of them")
            seen, value, waits = name, attached, not equals
        else:
            rest.append(argument)
    if seen and not value:
        raise UsageError(f"{seen}: needs a value")
    return value, rest


def take_flag(argv: Sequence[str], name: str) -> tuple[bool, list[str]]:
    """Whether `--name`, which takes no value, is given, and the other arguments."""
    matches = [a for a in argv if a.split("=")[0].replace("_", "-") == f"--{name}"]
    for argument in matches:
        if "=" in argument:
            raise UsageError(f"{argument}: takes no value; write --{name}")
    return bool(matches), [a for a in argv if a not in matches]


def join_lists(argv: Sequence[str], lists: Collection[str]) -> list[str]:
    """Moves the values of all mentions of a list option to its first mention.

    `lists` names the options that take several values. `--section.no-NAME` is the empty list. An
    option without a value, or with an empty one, raises `UsageError`.
    """
    joined: list[list[str]] = []
    groups: dict[str, list[str]] = {}
    reading, waits = list[str](), ""
    for argument in [*argv, "--"]:
        # A lone dash is standard input.
        is_value = not argument.startswith("-") or re.fullmatch(r"-([.\d].*)?", argument)
        if is_value and reading:
            reading.append(_not_empty(argument, reading[0]))
            waits = ""
            continue
        if waits:
            raise UsageError(f"{waits}: needs a value")
        reading = []
        name, equals, attached = argument.partition("=")
        option = _option(name)
        filled = option.replace(".no-", ".", 1)
        if filled not in lists or not name.startswith("--"):
            joined.append([argument])
            continue
        if filled not in groups:
            groups[filled] = [f"--{filled}"]
            joined.append(groups[filled])
        if equals:
            groups[filled].append(_not_empty(attached, name))
        elif filled == option:
            reading, waits = groups[filled], name
    return [argument for group in joined[:-1] for argument in group]


def _option(name: str) -> str:
    """The name of an option without leading hyphens, its words joined by hyphens."""
    return name.removeprefix("--").replace("_", "-")


def _not_empty(value: str, option: str) -> str:
    if not value:
        raise UsageError(f"{option}: needs a value, not an empty one")
    return value


def _refuse_unknown(signature: inspect.Signature, argv: Sequence[str]) -> None:
    """Raises `UsageError` for an option that no parameter has, with the nearest name."""
    options = [p for p in signature.parameters.values() if p.kind is not p.POSITIONAL_ONLY]
    known = {_option(p.name) for p in options} | {"help"}
    known |= {f"no-{_option(p.name)}" for p in options if isinstance(p.default, bool)}
    for argument in argv:
        name = argument.partition("=")[0]
        if name.startswith("--") and _option(name) not in known:
            near = get_close_matches(_option(name), known, n=1)
            hint = f"did you mean --{near[0]}?" if near else "see --help"
            if name == "--":
                hint = "a file whose name begins with a hyphen is given as ./-NAME"
            raise UsageError(f"{name}: no such option; {hint}")


def _refuse_empty(hints: dict[str, Any], argv: Sequence[str]) -> None:
    """Raises `UsageError` for an empty value except of a text: as a path it would be this folder.

    `hints` are the types of the parameters, positional ones first.
    """
    texts = {_option(name) for name, kind in hints.items() if kind is str}
    first = _option(next(iter(hints)))
    option = ""
    for argument in argv:
        name, equals, attached = argument.partition("=")
        if name.startswith("--"):
            option = _option(name)
            if equals and not attached and option not in texts:
                raise UsageError(f"{name}: needs a value, not an empty one")
            option = "" if equals else option
            continue
        if not argument and (option or first) not in texts:
            raise UsageError(f"{f'--{option}' if option else first.upper()}: is empty")
        option = ""


def expand_names(recipe: Recipe, argv: Sequence[str]) -> list[str]:
    """Expands `--steps` to `--train.steps` and so on, and aliases to the fields they stand for.

    `--reset-on` stands for the field of that name in the model and in its entropy model. Unknown
    names, and a field given both by its own name and by an alias, raise `UsageError`.
    """
    recipe, argv = choose_optimizer(recipe, argv)
    parts = {section: getattr(recipe, section) for section in _SECTIONS}
    full = {f"{section}.{name}" for section, part in parts.items() for name in _leaves(part)}
    short: dict[str, list[str]] = {"data": ["data.paths"]}
    for name in sorted(full):
        short.setdefault(name.split(".", 1)[1], []).append(name)
        short.setdefault(name.rsplit(".", 1)[1], []).append(name)
    expanded, spelling = [], dict[str, str]()
    for shared in _EVERYWHERE:
        value, rest = take_option(argv, shared)
        if value:
            fields = (name for name in sorted(full) if name.endswith(f".{shared}"))
            argv = [*rest, *(f"--{name}={value}" for name in fields)]
    for argument in argv:
        matched = re.fullmatch(r"--(no[-_])?([A-Za-z][\w.-]*)(=.*)?", argument, re.DOTALL)
        if not matched or argument == "--help":
            expanded.append(argument)
            continue
        negation, name, value = matched[1], matched[2].replace("-", "_"), matched[3] or ""
        if negation and f"no_{name}" in full | set(short):
            negation, name = None, f"no_{name}"
        alias = name if name in ALIASES and name not in full | set(short) else ""
        if alias:
            name = ALIASES[alias]
            if negation:
                meant = name.replace("_", "-")
                raise UsageError(f"--{alias}: means --{meant}; write --{alias} as it stands")
        if name not in full:
            choices = sorted(set(short.get(name, [])))
            if len(choices) != 1:
                known = sorted(full | set(short) | set(ALIASES) | {"optimizer"})
                others = [] if choices else optimizers_with(name.removeprefix("optimizer."))
                if others:
                    raise UsageError(
                        f"--{matched[2]}: has no effect on {recipe.optimizer.name}; choose "
                        f"--optimizer {' or '.join(others)}"
                    )
                owners = [] if choices else models_with(name.removeprefix("model."))
                if owners:
                    raise UsageError(
                        f"--{matched[2]}: has no effect on {recipe.model.architecture}; it is a "
                        f"field of {' and '.join(owners)}"
                    )
                raise UsageError(_unknown(matched[2], choices, known))
            name = choices[0]
        if spelling.setdefault(name, alias) != alias:
            meant = name.replace("_", "-")
            raise UsageError(f"--{spelling[name] or alias}: means --{meant}; give only one of them")
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


def _leaves(part: Any) -> dict[str, Any]:
    """Name → value of every field; fields of parts are prefixed with the part's name."""
    leaves = {}
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        if dataclasses.is_dataclass(value):
            leaves |= {f"{field.name}.{leaf}": inner for leaf, inner in _leaves(value).items()}
        else:
            leaves[field.name] = value
    return leaves


def _deferred(function: Callable[..., int]) -> Callable[..., Callable[[], int]]:
    """`function` with the same signature and docstring, but only storing its arguments.

    This way an error inside the command is never taken for an error on the command line. Calling
    it raises `ValueError` first for a number that no array holds.
    """

    @functools.wraps(function)
    def remember(*args: Any, **kwargs: Any) -> Callable[[], int]:
        def call() -> int:
            for name, value in inspect.signature(function).bind(*args, **kwargs).arguments.items():
                require_number(name, value)
            return function(*args, **kwargs)

        return call

    return remember


_WORDINGS = {
    r"Unrecognized options: (\S+)": "{}: not expected here; see --help",
    r"Missing from [^:]+: (\S+)": "{}: is required; see --help",
    r"invalid choice '(.*)' for argument '(--[\w.-]+).*'\. Expected one of \((.*)\)": (
        "{1} {0}: choose one of {2}"
    ),
}
"""tyro's reports that are common, and what is said in their place."""


def _parse(parse: Callable[[], T], edit_help: Callable[[str], str] = str) -> T:
    """Runs a tyro parse and turns its boxed error report into a one-line `UsageError`.

    Help is printed as `edit_help` returns it.
    """
    report = io.StringIO()
    # By the codec's own name, which tyro looks for before it draws boxes.
    encoding = codecs.lookup(getattr(sys.stdout, "encoding", None) or "utf-8").name
    said = io.TextIOWrapper(io.BytesIO(), encoding, "replace")
    try:
        with contextlib.redirect_stderr(report), contextlib.redirect_stdout(said):
            return parse()
    except SystemExit as stop:
        if stop.code in (0, None):
            said.seek(0)
            print(edit_help(said.read()), end="")
            raise
        text = re.split(r"Argument helptext|For full helptext", report.getvalue())[0]
        rows = [re.sub(r"[─│╭╮╰╯]|-{4,}", " ", line).strip() for line in text.splitlines()]
        lines = [line for line in rows if line]
        # The first line is the box's title ("Value error"); the rest says what is wrong.
        message = " ".join(" ".join(lines[1:] if len(lines) > 1 else lines).split())
        for wording, ours in _WORDINGS.items():
            if found := re.match(wording, message):
                raise UsageError(ours.format(*found.groups()).replace("'", "")) from None
        message, wrong = re.subn(r"^Error parsing ([\w.]+): (?=\w+[=:])", r"\1.", message)
        if wrong:  # a value that its field refuses, by name
            raise UsageError(message) from None
        raise UsageError(f"{message}; see --help") from None
