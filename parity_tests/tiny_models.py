"""The tiny models of every architecture, which its parity test declares, for all other tests.

A parity test is a file of this folder with a table `TINY_MODELS`: name → configuration.
"""

import importlib
import re
from pathlib import Path
from types import ModuleType

from bytelm.config import ModelConfig


def parity_tests() -> list[ModuleType]:
    """The parity tests of architectures, in the order of their names."""
    files = sorted(Path(__file__).parent.glob("test_*.py"))
    declares = re.compile(r"^TINY_MODELS\b", re.MULTILINE)
    found = [file.stem for file in files if declares.search(file.read_text("utf-8"))]
    return [importlib.import_module(f"parity_tests.{name}") for name in found]


CONFIGS: dict[str, ModelConfig] = {
    name: config for test in parity_tests() for name, config in test.TINY_MODELS.items()
}
