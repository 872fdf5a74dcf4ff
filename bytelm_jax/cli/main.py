"""The `bytelm` command. Bad input: exit code 2 and one line on standard error.

Help and mistakes are answered without JAX, whose import takes seconds: this module imports the
standard library alone, and the commands import what they run only after parsing their arguments.
"""

import contextlib
import importlib
import inspect
import io
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from difflib import get_close_matches

_ENDED = 128 + signal.SIGTERM
COMMANDS = {
    "train": "train a recipe, or resume its run",
    "eval": "exact bits per byte over files",
    "lm-eval": "score a model with lm-evaluation-harness",
    "generate": "stream text from a trained model",
    "bench": "measure generation: bytes per second by batch, context and draft",
    "compress": "compress a file without loss, with a model",
    "decompress": "restore a compressed file",
    "inspect": "show patches, entropy and surprise of a text, byte by byte",
    "export": "write a model for PyTorch",
    "import": "make a run folder from other weights",
    "align-data": "cut text into a token model's tokens, for align",
    "align": "teach a byte encoder what a token model's words look like",
    "parity": "compare the JAX and torch twins",
    "calibrate": "find the entropy threshold for a mean patch length",
    "plot": "plot a run: PNG and one HTML file",
    "sweep": "train a recipe at the points of a grid, or at random ones",
    "prepare": "pack files into one byte file",
    "draft-table": "make a table of frequent n-grams for speculation",
    "serve": "show a page in the browser, or serve an API",
    "recipes": "list what `bytelm train` knows, with sizes",
    "doctor": "check devices, disk and data before a run",
}

_MODULES = {
    "train": "train", "recipes": "train", "doctor": "doctor", "sweep": "sweep",
    "inspect": "view", "plot": "view", "serve": "serving",
    "eval": "evaluation", "lm-eval": "evaluation",
    "compress": "compression", "decompress": "compression",
    "export": "exchange", "import": "exchange", "draft-table": "drafts",
    "generate": "generation", "bench": "generation",
    "align-data": "alignment", "align": "alignment",
}  # fmt: skip
"""The modules of the commands that are not in `model`."""

_COMPILING = {
    "train", "eval", "generate", "compress", "decompress", "inspect", "parity", "calibrate",
    "serve", "align",
}  # fmt: skip
"""The commands that keep what they compile."""

_COMPILES_ANEW = ("-h", "--help", "--dry-run", "--distributed", "--coordinator")
"""Options with which they do not: a dry run examines its compiler, and the processes of one run
would each find another part of their programs."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):  # what a locale cannot write must end no command
        sys.stdout.reconfigure(errors="replace")
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return 0 if arguments else 2
    name = arguments[0]
    if name == "--version":
        import bytelm

        print(f"bytelm {bytelm.__version__}")
        return 0
    if name == "--print-completion":
        return _print_completion(arguments[1:])
    if name not in COMMANDS:
        print(f"bytelm: {_unknown(name)}", file=sys.stderr)
        return 2
    try:
        with _ended_by_sigterm(), _swallowed_stops_sent_again():
            if _keeps_programs(name, arguments[1:]):
                from bytelm_jax.cli import compile_cache

                compile_cache.use()
            return _command(name)(arguments[1:])
    except KeyboardInterrupt:  # `train` has handlers of its own, which save first
        print(f"bytelm {name}: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:  # the reader of our output closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError) as error:
        # A failed Orbax write leaves coroutines that complain as the process ends, after the one
        # line that says what to do.
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
        print(f"bytelm {name}: {_one_line(error)}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        # JAX's error of the kind has a class that this module does not import.
        if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        print(f"bytelm {name}: out of memory: {_one_line(error)[:200]}", file=sys.stderr)
        return 1


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Within this context SIGTERM ends the process as an error would: unfinished files go."""

    def end(*_: object) -> None:
        sys.exit(_ENDED)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _swallowed_stops_sent_again() -> Iterator[None]:
    """Within this context a signal that Python drops is sent again, until it ends the command.

    An exception of a signal's handler is printed and dropped where it falls into a callback of the
    garbage collector, of which JAX has one, or into a `__del__`: the command would run to its end.
    """
    before = sys.unraisablehook

    def hook(dropped: "sys.UnraisableHookArgs") -> None:
        stopped = isinstance(dropped.exc_value, SystemExit) and dropped.exc_value.code == _ENDED
        if stopped or dropped.exc_type is KeyboardInterrupt:
            number = signal.SIGTERM if stopped else signal.SIGINT
            again = threading.Timer(0.05, os.kill, (os.getpid(), number))
            again.daemon = True
            again.start()
        else:
            before(dropped)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


def _keeps_programs(name: str, argv: list[str]) -> bool:
    """Whether a call keeps compiled programs for later ones, in the user's cache folder."""
    return name in _COMPILING and not any(each.startswith(_COMPILES_ANEW) for each in argv)


def _command(name: str) -> Callable[[list[str]], int]:
    commands = importlib.import_module(f"bytelm_jax.cli.{_MODULES.get(name, 'model')}")
    function = getattr(commands, f"{name.replace('-', '_')}_command")
    if "argv" in inspect.signature(function).parameters:
        return function
    from bytelm.arguments import parse_call

    return lambda argv: parse_call(function, argv, f"bytelm {name}")


def _print_completion(shells: list[str]) -> int:
    from bytelm_jax.cli import completion

    try:
        print(completion.script(" ".join(shells)), end="")
    except ValueError as error:
        print(f"bytelm: {error}", file=sys.stderr)
        return 2
    return 0


def _unknown(name: str) -> str:
    near = get_close_matches(name, COMMANDS, n=1)
    hint = f"did you mean {near[0]}? The commands are" if near else "choose one of"
    return f"{name}: unknown command; {hint} {', '.join(COMMANDS)}"


def _overview() -> str:
    lines = [
        "usage: bytelm COMMAND …   (bytelm COMMAND --help shows its options)",
        "",
    ]
    lines += [f"  {name:11} {what}" for name, what in COMMANDS.items()]
    lines += ["", "bytelm --version prints the version."]
    lines += ["bytelm --print-completion SHELL prints a script for bash, zsh or fish."]
    return "\n".join(lines)


def _one_line(error: BaseException) -> str:
    from bytelm.files import error_line

    return error_line(error)
