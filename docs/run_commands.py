"""Runs the commands and the Python of README and guides, as a reader would, with tiny models.

    python docs/run_commands.py            all pages; where an earlier call was stopped or a page
                                           failed, only those that have not run through yet
    python docs/run_commands.py PAGE …     these, as README or docs/serving.md

Each page is followed from top to bottom in a folder of its own, which holds the files, runs and
exports that pages name. Recipes are their own, but with the sizes of the tiny one of their
architecture, one layer a stack, and two steps; everything else is what a reader gets. What cannot
be run on one computer without a network is in `NOT_RUN` with its reason; a test parses all of it.
notebooks.py executes the tutorials that are notebooks; test_docs.py follows two guides.
"""

import contextlib
import importlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import traceback
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
PLACE = DOCS / "_build" / "commands"

NOT_RUN = {
    r"^(pip|python3 -m venv|git clone) ": "installs; scripts/environment and test_wheel.py do it",
    r"^(\S+=\S+ )*(python )?(\./)?(scripts/|\.ci/)": "a script of minutes or hours, run by itself",
    r"--distributed|--coordinator|--tensor ": "needs several machines or devices",
    r"gs://|--push ": "needs a bucket, or an account of the Hub",
    r"--device cuda": "needs a GPU",
    r"lm[-_]eval": "downloads tasks from the Hub; scripts/check/lm_eval.py runs it on local ones",
    r"--compile-for": "needs a TPU's compiler; test_tpu_compile.py runs it where there is one",
    r"^tensorboard ": "runs until it is stopped",
    r"--host 0\.0\.0\.0": "opens a port to the network",
    r"gru": "is about a model that the guide adds",
}
"""Pattern → why the commands that match are parsed and not run."""

SKIPPED_PAGES = ("data.md", "donors.md", "fine-tuning.md", "index.md")
"""Pages that test_docs.py and test_donors.py follow, and the index, which shows README's commands.
"""

SUBSTITUTES = {
    "runs/tiny@400 --lr": "runs/tiny@2 --steps 4 --lr",
    "@400": "@2", "USER/": "user/", "train.steps=200": "train.steps=2", "--epochs 10": "--steps 2",
    "mine.json --data": "mine.json train.steps=2 --data",
    "mine.json train.init": "mine.json train.steps=2 train.init",
}  # fmt: skip
"""What a page names that a run of two steps does not have."""

PACKAGES = {"--format onnx": "onnx", "int8": "torchao"}
"""What a command or a piece of Python asks for → the package that it takes."""

SERVER = re.compile(r"^(bytelm|python -m bytelm_torch\.)\s*serve ")
PORT = 7860
SECONDS = 300
"""The longest that a command may take."""


# ---- tiny recipes -------------------------------------------------------


def shrink_recipes() -> None:
    """Makes every recipe of this process tiny."""
    from bytelm import recipes

    made = {name: recipes.get(name) for name in recipes.names()}
    other = ("transformer_tiny", "bytropix_tiny")  # a MEGABYTE and a BLT of another kind
    tinies = [made[name] for name in made if name.endswith("_tiny") and name not in other]
    tiny = {recipe.model.architecture: recipe for recipe in tinies}
    for name, recipe in made.items():
        base = recipe if name.endswith("_tiny") else tiny[recipe.model.architecture]
        setattr(recipes, name, _returning(_small(recipe, base)))


def _returning(recipe: Any) -> Callable[[], Any]:
    def get():
        return recipe

    get.__annotations__, get.__doc__ = {"return": type(recipe)}, "A tiny recipe."
    return get


def _small(recipe: Any, base: Any) -> Any:
    model = base.model
    layers = [field.name for field in fields(model) if re.search(r"(^|_)layers$", field.name)]
    one = {name: min(getattr(model, name), 1) for name in layers}
    if hasattr(model, "entropy") and "_tiny" in base.name:
        one["entropy"] = replace(model.entropy, dim=32, layers=1, heads=2, hidden_dim=32)
    elif "layers" in one:
        one |= {"dim": 32, "heads": 2, "hidden_dim": 32}
    data = replace(recipe.data, sequence_length=128)
    train = replace(recipe.train, steps=2, batch_size=2, eval_windows=4,
                    accumulation_steps=1)  # fmt: skip
    return replace(recipe, model=replace(model, **one), data=data, train=train)


# ---- pages --------------------------------------------------------------


def pages() -> list[Path]:
    """The pages that are followed."""
    guides = [path for path in sorted(DOCS.glob("*.md")) if path.name not in SKIPPED_PAGES]
    notebooks = [page for page in guides if "file_format: mystnb" in page.read_text("utf-8")]
    return [ROOT / "README.md", *(page for page in guides if page not in notebooks)]


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    """(language, code) of each block of a page: a command each, or a piece of Python."""
    fence = re.compile(r"^```(bash|python)\n(.*?)^```", re.DOTALL | re.MULTILINE)
    for language, code in fence.findall(page.read_text("utf-8")):
        if language == "python":
            yield language, code
            continue
        for line in code.replace("\\\n", " ").splitlines():
            if line.strip():
                yield language, line.strip()


def reason(line: str) -> str:
    """Why a command is not run; empty for one that is."""
    return next((why for pattern, why in NOT_RUN.items() if re.search(pattern, line)), "")


def made_by(page: Path) -> set[str]:
    """The runs, exports and files that a page's own commands make."""
    text = page.read_text("utf-8")
    return {name.rstrip("/") for name in re.findall(r"--(?:run-dir|out)[ =](\S+)", text)}


# ---- the folder of a page -----------------------------------------------


def prepare(place: Path) -> None:
    """What pages name and do not make: texts, runs, exports."""
    ready = place / ".ready"
    if ready.exists():  # by an earlier call
        return
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    os.chdir(place)
    for name in ("README.md", "LICENSE", "bytelm", "bytelm_jax", "examples", "scripts"):
        (place / name).symlink_to(ROOT / name)
    (place / "docs").mkdir()
    for page in DOCS.glob("*.md"):
        (place / "docs" / page.name).symlink_to(page)
    words = (DOCS / "concepts.md").read_text("utf-8") * 3
    for folder in ("notes", "books", "poems", "a"):
        (place / folder).mkdir()
        (place / folder / "text.txt").write_text(words, "utf-8")
    for name, text in {"english": words, "greek": "λόγοι ενός κειμένου " * 400}.items():
        (place / f"{name}.txt").write_text(text, "utf-8")
    (place / "names.txt").write_text("\n".join(words.split()[:2000]) + "\n", "utf-8")
    lines = "".join(json.dumps({"text": part}) + "\n" for part in words.split("\n\n"))
    import zstandard

    for name in ("books.jsonl.zst", "b.jsonl.zst"):
        (place / name).write_bytes(zstandard.compress(lines.encode()))
    for line in (
        "bytelm train megabyte_tiny --data notes --run-dir runs/tiny",
        "bytelm export runs/tiny --out exports/tiny",
        "bytelm import exports/tiny --out runs/again",
        "bytelm train entropy_tiny --data books --run-dir runs/entropy",
        "bytelm calibrate runs/entropy --data books --bytes-per-patch 4.5",
        "bytelm train blt_tiny --entropy-from runs/entropy --data books --no-whole-characters "
        "--run-dir runs/latent",
        "bytelm export runs/latent --out blt-1b --format hf-blt",
    ):
        if code := run_line(line, {}):
            raise SystemExit(f"status {code}: {line}")
    ready.touch()


def run_line(line: str, environment: dict[str, str]) -> int:
    """Runs a command; its exit status. Ours run in this process, where JAX is loaded already."""
    words = shlex.split(line, comments=True)
    if words[0] == "bytelm" and "--dry-run" not in words and not set(words) & {"|", ">"}:
        from bytelm_jax.cli import main as cli

        try:
            return cli.main(words[1:])
        except SystemExit as stop:
            return int(stop.code or 0)
    done = subprocess.run(["bash", "-c", line], env=environment, timeout=SECONDS,
                          capture_output=True, text=True)  # fmt: skip
    print(done.stdout[-2000:], done.stderr[-2000:])
    return done.returncode


class Server:
    """The server that a page has started last."""

    def __init__(self) -> None:
        self.process: subprocess.Popen | None = None

    def start(self, line: str, environment: dict[str, str]) -> int:
        """Starts it in place of the one before; 0 when it answers."""
        self.stop()
        self.process = subprocess.Popen(["bash", "-c", f"exec {line}"], env=environment)
        end = time.monotonic() + SECONDS
        while time.monotonic() < end and self.process.poll() is None:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{PORT}/", timeout=5)
                return 0
            except urllib.error.HTTPError:
                return 0
            except OSError:
                time.sleep(0.5)
        return self.process.poll() or 1

    def stop(self) -> None:
        """Ends it as a user does, by Ctrl-C."""
        if self.process and self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.process = None


def missing_package(code: str) -> str:
    """The first package that a command or a piece of Python takes and this machine lacks."""
    names = re.findall(r"^\s*(?:import|from) (\w+)", code, re.MULTILINE)
    for name in (*names, *(name for asked, name in PACKAGES.items() if asked in code)):
        try:
            importlib.import_module(name)
        except ImportError:
            return name
    return ""


def follow(page: Path, base: Path, environment: dict[str, str]) -> list[str]:
    """Runs a page; a line for each failure."""
    place = PLACE / page.stem
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(base, place, symlinks=True)
    for name in made_by(page):
        path = place / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    os.chdir(place)
    server, names, failures = Server(), {}, list[str]()
    for language, code in blocks(page):
        why = reason(code) if language == "bash" else ""
        if not why and (package := missing_package(code)):
            why = f"needs the package {package}"
        shown = code if language == "bash" else f"python: {code.splitlines()[0]} …"
        if why:
            print(f"     -  {shown[:90]}   ({why})", flush=True)
            continue
        begin, output = time.perf_counter(), io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            status = _run_block(language, code, names, server, environment)
        took, state = time.perf_counter() - begin, "FAILED " if status else ""
        print(f"{took:5.1f}s  {state}{shown[:100]}", flush=True)
        if status:
            print(output.getvalue()[-1500:])
            failures.append(f"{page.name}: {shown}")
    server.stop()
    return failures


def _run_block(language: str, code: str, names: dict[str, Any], server: Server,
               environment: dict[str, str]) -> int:  # fmt: skip
    for name, other in SUBSTITUTES.items():
        code = code.replace(name, other)

    def late(*_):
        raise TimeoutError(f"not done after {SECONDS} s")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        if language == "python":
            exec(compile(code, "page", "exec"), names)
            return 0
        if SERVER.search(code):
            return server.start(code, environment)
        return run_line(code, environment)
    except Exception:
        traceback.print_exc(file=sys.stdout)
        return 1
    finally:
        signal.alarm(0)


def main(wanted: list[str]) -> int:
    """Follows the pages; 1 if something failed."""
    here = str(ROOT)
    (PLACE / "site").mkdir(parents=True, exist_ok=True)
    (PLACE / "site" / "sitecustomize.py").write_text(
        f"import sys\nsys.path.append({str(DOCS)!r})\n"
        "import run_commands\nrun_commands.shrink_recipes()\n"
    )
    os.environ |= {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}
    # Each program runs for two steps: compiling it well would take longer than it saves.
    quick = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {quick}".strip()
    # What a reader writes into his own folder, does not come into this one's.
    home, cache = PLACE / "home", os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))
    home.mkdir(exist_ok=True)
    os.environ |= {"HOME": str(home), "XDG_CACHE_HOME": cache}
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(PLACE / "site"), here))}
    sys.path.insert(0, here)
    shrink_recipes()
    base, note = PLACE / "base", PLACE / "passed.json"
    passed = json.loads(note.read_text("utf-8")) if note.is_file() else {}
    if not passed and not wanted:
        shutil.rmtree(base, ignore_errors=True)
    with contextlib.redirect_stdout(io.StringIO()):
        prepare(base)
    failures = []
    for page in pages():
        name, digest = str(page.relative_to(ROOT)), sha256(page.read_bytes()).hexdigest()
        asked = {page.stem, name} & {*wanted} if wanted else passed.get(name) != digest
        if not asked:
            continue
        print(f"== {name}", flush=True)
        failed = follow(page, base, environment)
        failures += failed
        passed |= {name: "" if failed else digest}
        note.write_text(json.dumps(passed), "utf-8")
    if not failures and not wanted:
        note.unlink(missing_ok=True)  # the next call starts with all of them
    print("\n".join(["failed:", *failures]) if failures else "every command ran")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
