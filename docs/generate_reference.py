"""The generated pages of the reference: every command and option, every configuration field."""

import ast
import importlib
import inspect
import io
import itertools
import re
import textwrap
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import MISSING, fields
from pathlib import Path
from types import ModuleType

import bytelm
from bytelm import config
from bytelm_jax.cli import main as cli


def write(folder: Path) -> None:
    """Writes `commands.md` and `configuration.md`, if they changed, and `api.md`."""
    for name, text in {
        "commands.md": commands_page(),
        "configuration.md": configuration_page(),
        "api.md": api_page(),
    }.items():
        page = folder / name
        if not page.is_file() or page.read_text("utf-8") != text:
            page.parent.mkdir(exist_ok=True)
            page.write_text(text, "utf-8")


# ---- commands -----------------------------------------------------------


def commands_page() -> str:
    """Every command with its options, from the parser of each."""
    parts = [
        "# Commands",
        "Every command and option, generated from the parsers. Fields of `bytelm train` are on the "
        "page about [configuration](configuration.md).",
        "| command | what it does |\n| --- | --- |",
    ]
    parts[-1] += "".join(
        f"\n| [`bytelm {name}`](#bytelm-{name}) | {what} |" for name, what in cli.COMMANDS.items()
    )
    for name in cli.COMMANDS:
        parts += [f"## bytelm {name}", *command(name)]
    parts += ["## python -m bytelm_torch.train", *torch_trainer()]
    return "\n\n".join(parts) + "\n"


def command(name: str) -> Iterator[str]:
    """The section of one command."""
    module = importlib.import_module(f"bytelm_jax.cli.{cli._MODULES.get(name, 'model')}")
    function = getattr(module, f"{name.replace('-', '_')}_command")
    if "argv" in inspect.signature(function).parameters:
        yield from printed(lambda: cli.main([name, "--help"]))
        return
    text, _, arguments = inspect.getdoc(function).partition("\nArgs:\n")
    prose, _, example = text.partition("Example: ")
    yield escaped(prose.strip())
    meanings = sentences(arguments)
    rows = ["| option | default | meaning |", "| --- | --- | --- |"]
    rows += [option(each, meanings) for each in inspect.signature(function).parameters.values()]
    yield "\n".join(rows)
    if example:
        yield f"```bash\n{example.strip()}\n```"


def sentences(arguments: str) -> dict[str, str]:
    """Name → meaning of a docstring's `Args:`."""
    entry = re.compile(r"^ {4}(\w+): (.*(?:\n {5,}.*)*)", re.MULTILINE)
    return {name: " ".join(meaning.split()) for name, meaning in entry.findall(arguments)}


def option(parameter: inspect.Parameter, meanings: dict[str, str]) -> str:
    """The row of one option of a command."""
    flag = f"--{parameter.name.replace('_', '-')}"
    kind, default = parameter.annotation, parameter.default
    kind = kind if isinstance(kind, str) else inspect.formatannotation(kind)
    choices = re.search(r"Literal\[(.*?)\]", kind)
    if parameter.kind is parameter.POSITIONAL_ONLY:
        names = f"`{parameter.name.upper()}`"
    elif parameter.name == "passed_on":
        names = "`-- …`"
    elif kind == "bool":
        names = f"`{flag}`, `--no-{flag[2:]}`"
    elif choices:
        names = f"`{flag}` " + " · ".join(
            f"`{c}`" for c in re.findall(r"['\"](.*?)['\"]", choices[1])
        )
    else:
        value = (
            "NUMBER" if re.match(r"(int|float)\b", kind) else "PATH" if "Path" in kind else "TEXT"
        )
        names = f"`{flag} {value}{' …' if kind.startswith('tuple') else ''}`"
    if default is parameter.empty:
        shown = "required"
    else:
        shown = "" if default in ("", (), None) else f"`{default}`"
    return f"| {names} | {shown} | {cell(escaped(meanings.get(parameter.name, '')))} |"


def printed(show) -> Iterator[str]:
    """What a function prints, as a block."""
    with redirect_stdout(io.StringIO()) as output:
        show()
    yield f"```text\n{strip_colours(output.getvalue()).strip()}\n```"


def torch_trainer() -> Iterator[str]:
    """The section of the PyTorch trainer."""
    from bytelm_torch import train as trainer

    yield from printed(lambda: trainer.main(["--help"]))


# ---- configuration ------------------------------------------------------


def configuration_page() -> str:
    """Every configuration class and field."""
    parts = [
        "# Configuration",
        "Every field of every configuration, with its type and default, generated from the "
        "classes. On the command line a field is `--section.name`, or `--name` where no other "
        "section has it; in a recipe's file it is `section: {name: value}`.",
        "The section `model` is one of "
        + ", ".join(link(kind) for kind in config.MODEL_CONFIGS)
        + "; `optimizer` is one of "
        + ", ".join(link(kind) for kind in config.OPTIMIZER_CONFIGS.values())
        + f"; `data` is {link(config.DataConfig)}, `train` is {link(config.TrainConfig)}.",
    ]
    kinds = [config.DataConfig, config.TrainConfig, *config.MODEL_CONFIGS]
    kinds += [*config.OPTIMIZER_CONFIGS.values(), config.ByteVocab, config.BlockConfig]
    kinds += [config.PatchingContract, config.Recipe, bytelm.SamplerConfig]
    for kind in dict.fromkeys(kinds):
        parts += [f"## {kind.__name__}", *configuration(kind)]
    return "\n\n".join(parts) + "\n"


def link(kind: type) -> str:
    return f"[{kind.__name__}](#{kind.__name__.lower()})"


def configuration(kind: type) -> Iterator[str]:
    """The section of one class."""
    yield escaped(inspect.getdoc(kind) or "")
    documented: dict[str, str] = {}
    annotated: dict[str, str] = {}
    for base in reversed(kind.__mro__[:-1]):
        documented |= field_sentences(base)
        annotated |= field_types(base)
    any_sentence = any(each.name in documented for each in fields(kind))
    rows = ["| field | type | default |", "| --- | --- | --- |"]
    if any_sentence:
        rows = ["| field | type | default | meaning |", "| --- | --- | --- | --- |"]
    for each in fields(kind):
        if not each.init:
            continue
        kind_of_value = re.sub(r"Literal\[(.*?)\]", r"\1", annotated[each.name])
        row = f"| `{each.name}` | {cell(f'`{kind_of_value}`')} | {default_of(each)} |"
        if any_sentence:
            row += f" {cell(escaped(documented.get(each.name, '')))} |"
        rows.append(row)
    yield "\n".join(rows)


def default_of(each) -> str:
    if each.default is not MISSING:
        return cell(f"`{each.default!r}`")
    if each.default_factory is not MISSING:
        made = each.default_factory()
        return cell(f"`{type(made).__name__}(…)`" if hasattr(made, "__dataclass_fields__")
                    else f"`{made!r}`")  # fmt: skip
    return "required"


def body_of(kind: type) -> list[ast.stmt]:
    """The statements of a class's definition."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    except (OSError, TypeError):
        return []
    return tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []


def field_sentences(kind: type) -> dict[str, str]:
    """Field → the string that follows its annotation."""
    found, body = {}, body_of(kind)
    for before, after in itertools.pairwise(body):
        annotated = isinstance(before, ast.AnnAssign) and isinstance(before.target, ast.Name)
        string = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
        if annotated and string and isinstance(after.value.value, str):
            found[before.target.id] = inspect.cleandoc(after.value.value)
    return found


def field_types(kind: type) -> dict[str, str]:
    """Field → its annotation as it is written."""
    return {
        each.target.id: ast.unparse(each.annotation)
        for each in body_of(kind)
        if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name)
    }


# ---- API ----------------------------------------------------------------


def api_page() -> str:
    """The public names of the three packages, for autodoc."""
    import bytelm_jax
    import bytelm_torch

    shared = set(bytelm.__all__)
    parts = [
        "# Python API",
        "The public names. `bytelm_jax` and `bytelm_torch` also offer everything that `bytelm` "
        "does. Fields of configurations have [a page of their own](configuration.md).",
    ]
    import bytelm_torch.hf

    packages = {
        bytelm_jax: "The models, training and generation in JAX.",
        bytelm_torch: "The same in PyTorch.",
        bytelm_torch.hf: "The models in transformers' classes.",
        bytelm: "What both frameworks share; imports neither of them.",
    }
    for package, what in packages.items():
        names = set(getattr(package, "__all__", ()))
        if package is bytelm_torch.hf:
            names = {"from_native", "tokenizer_for"}
        elif package is not bytelm:
            names -= shared
        parts += [f"## {package.__name__}", what]
        parts += [documented(package, name) for name in sorted(names)]
    return "\n\n".join(parts) + "\n"


def documented(package: ModuleType, name: str) -> str:
    """The directive that documents one public name."""
    value = getattr(package, name)
    path = f"{package.__name__}.{name}"
    if isinstance(value, ModuleType):
        if hasattr(value, name):  # a module that is called as the function in it
            path, value = f"{path}.{name}", getattr(value, name)
        else:
            members = [n for n, f in vars(value).items() if inspect.isfunction(f)
                       and f.__module__ == value.__name__ and not n.startswith("_")]  # fmt: skip
            return directive("module", path, [f":members: {', '.join(members)}"])
    if inspect.isclass(value):
        options = [] if hasattr(value, "__dataclass_fields__") else [":members:"]
        return directive("class", path, options)
    return directive("function", path, [])


def directive(kind: str, path: str, options: list[str]) -> str:
    inner = "\n".join([f".. auto{kind}:: {path}", *(f"   {each}" for each in options)])
    return f"```{{eval-rst}}\n{inner}\n```"


def as_restructured_text(app, what, name, obj, options, lines: list[str]) -> None:
    """Docstrings use indented code and lists as Markdown does; makes them reStructuredText."""
    text = "\n".join(lines)
    text = re.sub(r"([^\n])\n( *)([-*] )", r"\1\n\n\2\3", text)
    text = text.replace("*", "\\*").replace("|", "\\|") if "`" not in text else escape_outside(text)
    lines[:] = text.split("\n")


def escape_outside(text: str) -> str:
    """Escapes what reStructuredText would read as markup, outside of backticks."""
    parts = re.split(r"(`[^`]*`)", text)
    for index in range(0, len(parts), 2):
        parts[index] = re.sub(r"(?<!\\)([*|])", r"\\\1", parts[index])
        parts[index] = re.sub(r"(\w)_(?=\W|$)", r"\1\\_", parts[index])
    return "".join(parts)


# ---- text ---------------------------------------------------------------


def strip_colours(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def escaped(text: str) -> str:
    """Prose of a docstring as Markdown: what is no code must not become markup."""
    parts = re.split(r"(`[^`]*`)", text)
    for index in range(0, len(parts), 2):
        parts[index] = re.sub(r"([*_<\[\]])", r"\\\1", parts[index])
    return "".join(parts)


def cell(text: str) -> str:
    """Text that stays inside its cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")
