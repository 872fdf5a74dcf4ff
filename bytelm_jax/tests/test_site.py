"""What the site is made from: generated reference pages and drawings. `scripts/docs` builds it."""

import re
from dataclasses import fields
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path

import pytest

from bytelm.config import MODEL_CONFIGS, OPTIMIZER_CONFIGS
from bytelm_jax.cli import main as cli

ROOT = Path(__file__).parents[2]


def load(path: str):
    """The module in a file of the repository that is in no package."""
    loader = SourceFileLoader(path.replace("/", "_").removesuffix(".py"), str(ROOT / path))
    spec = spec_from_loader(loader.name, loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def reference():
    return load("docs/generate_reference.py")


def test_every_command_and_option_is_explained(reference):
    page = reference.commands_page()
    for name in cli.COMMANDS:
        assert f"\n## bytelm {name}\n" in page
    rows = re.findall(r"^\| (`[-A-Z].*?) \| (.*?) \| (.*) \|$", page, re.MULTILINE)
    assert len(rows) > 80
    assert not [option for option, _, meaning in rows if not meaning.strip()]


def test_every_field_of_a_configuration_is_listed(reference):
    page = reference.configuration_page()
    for kind in (*MODEL_CONFIGS, *OPTIMIZER_CONFIGS.values()):
        section = page.split(f"\n## {kind.__name__}\n")[1].split("\n## ")[0]
        for field in fields(kind):
            assert not field.init or f"\n| `{field.name}` |" in section, (kind, field.name)


def test_every_public_name_is_in_the_reference(reference):
    import bytelm_jax
    import bytelm_torch

    page = reference.api_page()
    for package in (bytelm_jax, bytelm_torch):
        for name in package.__all__:
            assert re.search(rf":: \w+\.(\w+\.)?{name}\n", page), name


def test_the_drawings_are_those_of_the_code():
    for draw in load("scripts/figures").DRAWINGS:
        path = ROOT / "docs" / "figures" / f"{draw.__name__}.svg"
        assert path.read_text("utf-8") == draw().svg(), f"{path.name}: run scripts/figures"
