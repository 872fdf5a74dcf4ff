"""The house: imports go down only, no folder is in a cycle, files stay short."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from bytelm.config import MODEL_CONFIGS

ROOT = Path(__file__).parents[2]
PACKAGES = ("bytelm", "bytelm_jax", "bytelm_torch")
FLOORS = (
    "cli", "compat", "tools", "parity", "training", "interop", "inference", "optimizers", "models",
    "layers", "kernels",
)  # fmt: skip
"""The folders of the two framework packages, from the top down; below them all is `bytelm`."""

SHARED_FLOORS = (
    "elastic", "serving", "hub", "model_card", "shards", "folders", "modeling", "bundle",
    "bundle_names",
    "train_options", "harness", "arguments", "sweeps", "recipe_files", "recipes", "schedules",
    "starting", "run_data", "breakdown", "perturb", "alignment", "runs", "remote", "data", "lora",
    "trainable", "export", "inspection", "patience", "metrics", "goodput", "tracking", "writing",
    "sampling", "compression", "storage", "progress", "memory", "tokenizer", "leaves", "positions",
    "patch_rules", "q_table", "torch_files", "generation", "files", "extras", "config",
    "callable_module", "tolerances", "chips",
)  # fmt: skip
"""The same of `bytelm`, where a floor is a folder or a file."""

LONGEST_FILE, LONGEST_CLASS, LONGEST_FUNCTION, LONGEST_LOOP = 500, 250, 60, 150


def modules():
    """Dotted name → its file, of everything but tests."""
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    named = {}
    for path in files:
        parts = path.relative_to(ROOT).with_suffix("").parts
        if "tests" not in parts:
            named[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return named


def imports(tree: ast.AST, package: str, known: set[str]):
    """The modules that a file imports, in whatever form, wherever it stands in the file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*(above if node.level else []), *filter(None, [node.module])])
            for alias in node.names:
                name = f"{base}.{alias.name}"
                yield name if name in known else base
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else node.func
            called = called.id if isinstance(called, ast.Name) else called
            if called in ("import_module", "__import__"):
                yield str(node.args[0].value)


def floor(module: str) -> tuple[int, str] | None:
    """(height, name) of the folder that a module is in; None for a package's own front door."""
    package, _, rest = module.partition(".")
    name = rest.partition(".")[0]
    order = SHARED_FLOORS if package == "bytelm" else FLOORS
    if not rest or (package != "bytelm" and not (ROOT / package / name).is_dir()):
        return None
    assert name in order, f"{module}: {name} has no floor; give it one in this test"
    height = len(order) - order.index(name)
    return (height + (100 if package != "bytelm" else 0), f"{package}.{name}")


def arrows():
    """(importing module, imported module) inside the project."""
    known = modules()
    for module, path in known.items():
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        tree = ast.parse(path.read_text("utf-8"))
        for imported in imports(tree, package, set(known)):
            if imported.partition(".")[0] in PACKAGES:
                yield module, imported


def test_imports_go_down():
    up = []
    for module, imported in arrows():
        importer, target = floor(module), floor(imported)
        if importer is None:
            continue
        package = module.partition(".")[0]
        front = target is None and package != "bytelm" and imported.partition(".")[0] == package
        if front or (target and target[0] > importer[0]):
            up.append(f"{module} imports {imported}")
    assert not up, "\n".join(up)


def test_the_frameworks_do_not_know_each_other():
    others = {"bytelm_jax": "bytelm_torch", "bytelm_torch": "bytelm_jax"}
    wrong = []
    for module, imported in arrows():
        package, other = module.partition(".")[0], imported.partition(".")[0]
        compares = module.startswith("bytelm_jax.parity.")  # the one place that compares the two
        if other == others.get(package) and not compares:
            wrong.append(f"{module} imports {imported}")
        if package == "bytelm" and other != "bytelm":
            wrong.append(f"{module} imports {imported}")
    assert not wrong, "\n".join(wrong)


def imported_at_once(tree: ast.Module):
    """The packages that a module imports when it is imported itself."""
    for node in tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield (node.module or "").partition(".")[0]


def test_what_is_imported_at_once():
    """`bytelm` is light, and the PyTorch twin works where JAX was never installed."""
    light = sys.stdlib_module_names | {"bytelm", "numpy", "jaxtyping"}
    jax_side = {"jax", "flax", "optax", "orbax", "grain"}
    wrong = []
    for module, path in modules().items():
        tree, package = ast.parse(path.read_text("utf-8")), module.partition(".")[0]
        if package == "bytelm":
            wrong += [f"{module} imports {name}" for name in {*imported_at_once(tree)} - light]
        elif package == "bytelm_torch":
            imported = {name.partition(".")[0] for name in imports(tree, package, set())}
            wrong += [f"{module} imports {name}" for name in imported & jax_side]
    assert not wrong, "\n".join(wrong)


def test_the_shared_package_needs_no_framework(tmp_path):
    """Nor grain: reading, splitting and evaluating data work on machines without any of them."""
    (tmp_path / "text").write_bytes(b"five.")
    program = (
        "import sys; sys.modules.update(dict.fromkeys(('jax', 'flax', 'torch', 'grain')))\n"
        "import bytelm; from bytelm.data import Windows, evaluation_batches, open_corpus\n"
        "windows = Windows(open_corpus([sys.argv[1]]), bytelm.ByteVocab(), 4, True)\n"
        "print(sum(batch.ids.size for batch in evaluation_batches(windows, 2)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "text"],
        cwd=ROOT,
        capture_output=True,
        timeout=60,
    )
    assert done.stdout == b"8\n", done.stderr


@pytest.mark.parametrize("package", (*PACKAGES, "parity_tests"))
def test_files_classes_and_functions_stay_short(package):
    long = []
    for path in (ROOT / package).rglob("*.py"):
        text = path.read_text("utf-8")
        name = str(path.relative_to(ROOT))
        if len(text.splitlines()) > LONGEST_FILE:
            long.append(name)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                is_loop = path.name == "loop.py" and node.name == "_train"
                most = LONGEST_LOOP if is_loop else LONGEST_FUNCTION
                most = LONGEST_CLASS if isinstance(node, ast.ClassDef) else most
                first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
                lines = (node.end_lineno or 0) - first + 1
                if lines > most:
                    long.append(f"{name}: {node.name}, {lines} lines")
    assert not long, "\n".join(long)


MACHINE_QUESTIONS = {
    "default_backend",
    "backend",
    "is_pretended",
    "has_fused_attention",
    "itemsize",
}
PLATFORMS = {"cpu", "gpu", "tpu", "cuda", "rocm"}


def machine_questions(tree: ast.AST):
    """(line, name) of each question about the platform or about a dtype's width."""
    for node in ast.walk(tree):
        names, line = [], 0
        if isinstance(node, ast.Name | ast.Attribute):
            names, line = [node.id if isinstance(node, ast.Name) else node.attr], node.lineno
        elif isinstance(node, ast.ImportFrom):
            names, line = [alias.name for alias in node.names], node.lineno
        elif isinstance(node, ast.Compare | ast.match_case):
            asked = node if isinstance(node, ast.Compare) else node.pattern
            constants = [x.value for x in ast.walk(asked) if isinstance(x, ast.Constant)]
            yield from ((asked.lineno, repr(x)) for x in constants if x in PLATFORMS)
        yield from ((line, name) for name in names if name in MACHINE_QUESTIONS)


@pytest.mark.parametrize(
    "question",
    ["jax.default_backend()", "backend() == x", "from a.backend import is_pretended", "x.itemsize",
     "device.platform != 'tpu'", "x in ('cpu', 'gpu')", "match x:\n case 'gpu': pass"],
)  # fmt: skip
def test_a_question_about_the_machine_is_seen(question):
    assert list(machine_questions(ast.parse(question)))


def test_kernels_and_training_alone_ask_about_the_machine():
    asked = []
    for module, path in modules().items():
        if module.partition(".")[0] != "bytelm_jax":
            continue
        if not module.startswith(("bytelm_jax.kernels", "bytelm_jax.training")):
            questions = machine_questions(ast.parse(path.read_text("utf-8")))
            asked += [f"{module}, line {line}: {name}" for line, name in questions]
    assert not asked, "\n".join(asked)


def architecture_questions(tree: ast.AST, kinds: set[str]):
    """(line, text) of each type test on an architecture, and of each guess at a field."""
    for node in ast.walk(tree):
        if isinstance(node, ast.match_case):
            classes = {ast.unparse(x.cls) for x in ast.walk(node) if isinstance(x, ast.MatchClass)}
            if {name.rpartition(".")[2] for name in classes} & kinds:
                yield node.pattern.lineno, ast.unparse(node.pattern)
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
            continue
        named = {x.id for x in ast.walk(node) if isinstance(x, ast.Name)}
        named |= {x.attr for x in ast.walk(node) if isinstance(x, ast.Attribute)}
        guesses = node.func.id == "getattr" and len(node.args) == 3
        about_config = (
            ast.unparse(node.args[0]).endswith(("config", "recipe")) if guesses else False
        )
        if about_config or (node.func.id in ("isinstance", "issubclass") and named & kinds):
            yield node.lineno, ast.unparse(node)


@pytest.mark.parametrize(
    "question",
    ["isinstance(c, BLTConfig)", "isinstance(recipe.model, (Megabyte, config.LFByteConfig))",
     "match c:\n case BLTConfig(patcher='x'): pass", "getattr(self.config, 'dim', 0)"],
)  # fmt: skip
def test_a_question_about_the_architecture_is_seen(question):
    kinds = {"BLTConfig", "Megabyte", "LFByteConfig"}
    assert list(architecture_questions(ast.parse(question), kinds))


def test_configurations_and_registries_alone_know_architectures():
    configs = {kind.__name__ for kind in MODEL_CONFIGS}
    kinds = configs | {name.removesuffix("Config") for name in configs} | {"EntropyModel"}
    asked = []
    for module, path in modules().items():
        if module.startswith("bytelm.config") or module.endswith(".models"):
            continue
        questions = architecture_questions(ast.parse(path.read_text("utf-8")), kinds)
        asked += [f"{module}, line {line}: {text}" for line, text in questions]
    assert not asked, "\n".join(asked)
