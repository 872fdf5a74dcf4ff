"""The wheel, installed and used in two environments that hold nothing but what it asks for.

Neither needs the network: the distributions that an environment may see are links to those of the
suite's own.
"""

import json
import os
import re
import subprocess
import sys
import venv
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8")
PACKAGES = ("bytelm", "bytelm_jax", "bytelm_torch")

IMPORT_ALL = """
import importlib, importlib.util, json, pkgutil, sys

def import_all(*packages, without=()):
    for package in packages:
        path = importlib.import_module(package).__path__
        for found in pkgutil.walk_packages(path, f"{package}."):
            if not found.name.endswith("__main__") and not found.name.startswith(tuple(without)):
                importlib.import_module(found.name)

export, text = sys.argv[1], b"def main():"
"""

WITH_JAX = (
    IMPORT_ALL
    + """
assert importlib.util.find_spec("torch") is None
import bytelm_jax
config = bytelm_jax.MegabyteConfig(patch_size=4, global_dim=4, local_dim=8, max_length=64,
                                   global_layers=1, global_heads=2, local_layers=1, local_heads=2,
                                   init_std=0.3)
model = bytelm_jax.build_model(config)
bytelm_jax.save_pretrained(model, export)
model = bytelm_jax.from_pretrained(export)
print(json.dumps([bytelm_jax.evaluate(model, text).nats,
                  bytelm_jax.inspect(model, text).describe()]))
import_all("bytelm", "bytelm_jax")
"""
)

WITHOUT_JAX = (
    IMPORT_ALL
    + """
for name in ("jax", "flax", "optax", "tyro", "rich", "transformers"):
    assert importlib.util.find_spec(name) is None, name
import bytelm_torch
model = bytelm_torch.from_pretrained(export)
bytelm_torch.save_pretrained(model, export)
assert "torch._dynamo" not in sys.modules  # seconds of import that nothing here uses
print(json.dumps([bytelm_torch.evaluate(model, text).nats,
                  bytelm_torch.inspect(model, text).describe()]))
bytelm_torch.generate(model, [b"a"], 2)
import_all("bytelm", "bytelm_torch",
           without=["bytelm_torch.hf", "bytelm_torch.interop.transformers",
                    "bytelm_torch.compat.megabyte"])
"""
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", out]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    (built,) = out.glob("*.whl")
    return built


def metadata_of(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("METADATA"))
        return archive.read(name).decode()


def with_what_they_need(names):
    """The names of these distributions and of all that they depend on, as far as installed."""
    waiting, known = [Requirement(name) for name in names], set()
    while waiting:
        asked = waiting.pop()
        for extra in {"", *asked.extras} - {extra for name, extra in known if name == asked.name}:
            try:
                needs = map(Requirement, distribution(asked.name).requires or [])
            except PackageNotFoundError:  # for another platform
                continue
            known.add((asked.name, extra))
            waiting += [r for r in needs if not r.marker or r.marker.evaluate({"extra": extra})]
    return {name for name, _ in known}


def make_environment(folder, names):
    """An environment in which distributions of the suite's can be imported, and no others."""
    venv.create(folder, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    for name in with_what_they_need(names):
        found = distribution(name)  # its `files` takes seconds for the many files of torch
        record = (found.read_text("RECORD") or "").splitlines()
        for top in {line.partition(",")[0].partition("/")[0] for line in record}:
            if top not in ("..", "__pycache__") and not top.endswith(".pth"):
                link = site / top
                if not link.exists():
                    link.symlink_to(found.locate_file(top))
    return folder / "bin"


def run(*command):
    """What a command prints; nothing of this checkout is in its path."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, env=environment, cwd="/", capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def install(wheel, binaries, *options):
    pip = [binaries / "python", distribution("pip").locate_file("pip"), "install", "--no-index"]
    run(*pip, "--quiet", "--no-compile", "--disable-pip-version-check", *options, wheel)


def test_the_wheel_holds_the_packages_and_their_types_but_no_tests(wheel):
    text = metadata_of(wheel)
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert not [name for name in names if "/tests/" in name or "test_" in name]
    assert {f"{package}/py.typed" for package in PACKAGES} <= set(names)
    assert {name.partition("/")[0] for name in names if "dist-info" not in name} == set(PACKAGES)
    there = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        if "tests" not in path.parts
    }
    assert there <= set(names)
    for line in ("License-Expression: MIT", "Project-URL: ", "Classifier: Typing :: Typed"):
        assert f"\n{line}" in text


def test_the_wheel_in_two_empty_environments(wheel, tmp_path):
    """What a plain install brings, without PyTorch; and what the README names, without JAX."""
    export = tmp_path / "export"
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith("METADATA"))
        needs = re.findall(
            r"^Requires-Dist: ([\w-]+)[^;\n]*$", archive.read(metadata).decode(), re.M
        )
    plain = make_environment(tmp_path / "plain", needs)
    install(wheel, plain)  # pip itself finds everything there that it would have fetched
    assert run(plain / "bytelm", "--version").startswith("bytelm ")
    trained = json.loads(run(plain / "python", "-I", "-c", WITH_JAX, export))

    two_lines = r"^pip install ([\w ]+)\n(pip install --no-deps dist/bytelm-\*\.whl)$"
    found = re.search(two_lines, README, re.M)
    assert found
    handful, alone = found.groups()
    bare = make_environment(tmp_path / "bare", handful.split())
    install(wheel, bare, *alone.split()[2:-1])
    read = json.loads(run(bare / "python", "-I", "-c", WITHOUT_JAX, export))
    assert read[0] == pytest.approx(trained[0], rel=1e-5) and read[1] == trained[1]
