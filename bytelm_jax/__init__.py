"""bytelm: byte-level language models, trained in JAX and proven equal in PyTorch.

The public names, the same as in `bytelm_torch`: what `bytelm` offers, and the verbs of this
framework. Each is imported when it is first asked for (PEP 562), so that a command line is answered
before JAX, whose import takes seconds, has started.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bytelm import *  # noqa: F403
    from bytelm_jax.inference.generate import complete as complete
    from bytelm_jax.inference.generate import generate as generate
    from bytelm_jax.models import build_model as build_model
    from bytelm_jax.models import split_model as split_model
    from bytelm_jax.optimizers.build import build_optimizer as build_optimizer
    from bytelm_jax.optimizers.q_learning import q_learning_metrics as q_learning_metrics
    from bytelm_jax.optimizers.q_learning import q_learning_sgd as q_learning_sgd
    from bytelm_jax.q_learning import q_learning as q_learning
    from bytelm_jax.tools.inspection import inspect as inspect
    from bytelm_jax.training.evaluate import evaluate as evaluate
    from bytelm_jax.training.loss import cross_entropy as cross_entropy
    from bytelm_jax.training.pretrained import from_pretrained as from_pretrained
    from bytelm_jax.training.pretrained import save_pretrained as save_pretrained

_MODULES = {
    "build_model": "models",
    "build_optimizer": "optimizers.build",
    "complete": "inference.generate",
    "cross_entropy": "training.loss",
    "evaluate": "training.evaluate",
    "from_pretrained": "training.pretrained",
    "generate": "inference.generate",
    "inspect": "tools.inspection",
    "q_learning": "q_learning",
    "q_learning_metrics": "optimizers.q_learning",
    "q_learning_sgd": "optimizers.q_learning",
    "save_pretrained": "training.pretrained",
    "split_model": "models",
}
"""Where the names are that are not in `bytelm`."""


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        module = importlib.import_module(f"bytelm_jax.{_MODULES[name]}")
        # `q_learning` is a module, which is called as the function in it.
        value = module if name == "q_learning" else getattr(module, name)
    else:
        shared = importlib.import_module("bytelm")
        if name == "__all__":
            value = [*_MODULES, *shared.__all__]
        elif name in shared.__all__:
            value = getattr(shared, name)
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value  # asked for once
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__getattr__("__all__")})
