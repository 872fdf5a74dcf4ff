"""bytelm: byte-level language models. What both frameworks share; imports neither of them."""

from bytelm import recipes
from bytelm.config import ByteVocab, Recipe
from bytelm.config import models as _models
from bytelm.config import optimizer as _optimizer
from bytelm.config.models import *  # noqa: F403
from bytelm.config.optimizer import *  # noqa: F403
from bytelm.sampling import SamplerConfig
from bytelm.tokenizer import ByteTokenizer

__all__ = [
    "ByteTokenizer",
    "ByteVocab",
    "Recipe",
    "SamplerConfig",
    "recipes",
]
__all__ += _models.__all__
__all__ += _optimizer.__all__

__version__: str


def __getattr__(name: str) -> str:
    if name == "__version__":  # read from disk, and rarely needed
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("bytelm")
        except PackageNotFoundError:  # a checkout that was not installed
            import tomllib
            from pathlib import Path

            project = Path(__file__).parents[1] / "pyproject.toml"
            return tomllib.loads(project.read_text("utf-8"))["project"]["version"]
    raise AttributeError(f"module 'bytelm' has no attribute {name!r}")
