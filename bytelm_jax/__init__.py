"""bytelm: byte-level language models, trained in JAX and proven equal in PyTorch.

The public names. Each is imported when it is first asked for (PEP 562), so that a command line is
answered before JAX, whose import takes seconds, has started.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bytelm import recipes
    from bytelm.config import BLTConfig, ByteVocab, LFByteConfig, MegabyteConfig, Recipe
    from bytelm_jax.models import build_model

__all__ = [
    "BLTConfig",
    "ByteVocab",
    "LFByteConfig",
    "MegabyteConfig",
    "Recipe",
    "build_model",
    "recipes",
]

_MODULES = {"build_model": "bytelm_jax.models"}
"""Where the names are that are not in `bytelm`."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(_MODULES.get(name, "bytelm")), name)
    globals()[name] = found  # asked for once
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
