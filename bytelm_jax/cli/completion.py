"""`bytelm --print-completion SHELL`: a script that completes commands, recipes and options.

It is text made from the parsers, so that a press of the tab key starts no Python. Where nothing of
ours fits, the shell completes file names.
"""

import dataclasses
import functools
import importlib
import inspect
import typing
from collections.abc import Callable, Iterator
from typing import Any

from bytelm import recipes
from bytelm.arguments import ALIASES, UsageError
from bytelm.config import OPTIMIZER_CONFIGS
from bytelm_jax.cli import main as cli

SHELLS = ("bash", "zsh", "fish")

Options = dict[str, tuple[str, ...]]
"""Option → the values to choose from; empty where they are numbers, names or paths."""

_TRAIN = (
    "help", "run-dir", "epochs", "init-from", "branch-from", "data", "valid", "no-lock",
    "distributed", "coordinator", "num-processes", "process-id", "dry-run", "json", "chip", "mfu",
    "link-gbytes", "compile-for", "fit", "reset-on", *(name.replace("_", "-") for name in ALIASES),
)  # fmt: skip
"""Options of `bytelm train` beside the fields of a recipe; a test compares them with its help."""

_SWEEP = ("help", "vary", "random", "seed", "out")


def script(shell: str) -> str:
    """The completion script of a shell; raises `UsageError` for one that has none."""
    if shell not in SHELLS:
        raise UsageError(f"--print-completion {shell}: choose one of {', '.join(SHELLS)}")
    commands = {name: options_of(name) for name in cli.COMMANDS}
    if shell == "fish":
        return "\n".join(_fish(commands)) + "\n"
    lines = [*_bash(commands)]
    if shell == "zsh":
        lines.insert(0, "autoload -U +X compinit bashcompinit && compinit && bashcompinit")
    return "\n".join(lines) + "\n"


def options_of(name: str) -> Options:
    """Every option of a command."""
    if name in ("train", "sweep"):
        fields = dict(_fields())
        own = _TRAIN if name == "train" else _SWEEP
        return {f"--{each}": () for each in own} | fields
    options: Options = {"--help": ()}
    function = _function(name)
    hints = typing.get_type_hints(function)
    for each in inspect.signature(function).parameters.values():
        if each.kind is each.POSITIONAL_ONLY or each.name == "passed_on":
            continue
        no = "no-" if each.default is True else ""
        options[f"--{no}{each.name.replace('_', '-')}"] = _choices(hints[each.name])
    return options


def _function(name: str) -> Callable[..., int]:
    module = importlib.import_module(f"bytelm_jax.cli.{cli._MODULES.get(name, 'model')}")
    return getattr(module, f"{name.replace('-', '_')}_command")


def _choices(kind: Any) -> tuple[str, ...]:
    is_choice = typing.get_origin(kind) is typing.Literal
    return tuple(str(each) for each in typing.get_args(kind)) if is_choice else ()


def _fields() -> Iterator[tuple[str, tuple[str, ...]]]:
    """The fields of all recipes under all optimizers, by the shortest names that are understood."""
    yield "--optimizer", tuple(OPTIMIZER_CONFIGS)
    optimizers = [
        leaf for kind in OPTIMIZER_CONFIGS.values() for leaf in _leaves("optimizer", kind())
    ]
    for name in recipes.names():
        recipe = recipes.get(name)
        leaves = dict(optimizers)
        for section in ("model", "data", "train"):
            leaves |= _leaves(section, getattr(recipe, section))
        ends = [path.rpartition(".")[2] for path in leaves]
        for (path, choices), end in zip(leaves.items(), ends, strict=True):
            yield f"--{end if ends.count(end) == 1 else path}", choices


def _leaves(path: str, part: Any) -> Iterator[tuple[str, tuple[str, ...]]]:
    hints = _hints(type(part))
    for field in dataclasses.fields(part):
        value, name = getattr(part, field.name), field.name.replace("_", "-")
        if not field.init or field.name == "name":
            continue
        if dataclasses.is_dataclass(value):
            yield from _leaves(f"{path}.{name}", value)
        else:
            no = "no-" if value is True else ""
            yield f"{path}.{no}{name}", _choices(hints[field.name])


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _bash(commands: dict[str, Options]) -> Iterator[str]:
    """For bash, and for zsh by its bashcompinit."""
    yield "_bytelm() {"
    yield "    local word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD-1]} words="
    yield "    if [ $COMP_CWORD -eq 1 ]; then"
    yield f'        words="{" ".join(commands)} --help --version --print-completion"'
    yield "    else"
    yield '        case "${COMP_WORDS[1]} $before" in'
    yield f'        "--print-completion "*) words="{" ".join(SHELLS)}" ;;'
    for name in ("train", "sweep"):
        yield f'        "{name} {name}") words="{" ".join(recipes.names())}" ;;'
    for name, options in commands.items():
        for option, choices in options.items():
            if choices:
                yield f'        "{name} {option}") words="{" ".join(choices)}" ;;'
    yield "        *)"
    yield '            case "${COMP_WORDS[1]} $word" in'
    for name, options in commands.items():
        yield f'            "{name} -"*) words="{" ".join(options)}" ;;'
    yield "            esac ;;"
    yield "        esac"
    yield "    fi"
    yield '    COMPREPLY=($(compgen -W "$words" -- "$word"))'
    yield "}"
    yield "complete -o default -F _bytelm bytelm"


def _fish(commands: dict[str, Options]) -> Iterator[str]:
    first = "complete -c bytelm -n __fish_use_subcommand"
    for name, what in cli.COMMANDS.items():
        yield f"{first} -f -a {name} -d '{what}'"
    yield f"{first} -l print-completion -xa '{' '.join(SHELLS)}'"
    yield f"{first} -l version"
    for name, options in commands.items():
        seen = f"complete -c bytelm -n '__fish_seen_subcommand_from {name}'"
        if name in ("train", "sweep"):
            yield f"{seen} -a '{' '.join(recipes.names())}'"
        for option, choices in options.items():
            values = f" -xa '{' '.join(choices)}'" if choices else ""
            yield f"{seen} -l {option.removeprefix('--')}{values}"
