"""bytelm: byte-level language models, trained in JAX and proven equal in PyTorch.

The public names, the same as in `bytelm_torch`: what `bytelm` offers, and the verbs of this
framework. Each is imported when it is first asked for (PEP 562), so that a command line is answered
before JAX, whose import takes seconds, has started.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bytelm import (
        AdamWConfig,
        BLTConfig,
        ByteTokenizer,
        ByteVocab,
        EntropyConfig,
        LFByteConfig,
        LionConfig,
        MegabyteConfig,
        MuonConfig,
        OptimizerConfig,
        QLearningAdamWConfig,
        QLearningSGDConfig,
        Recipe,
        SamplerConfig,
        SGDConfig,
        recipes,
    )
    from bytelm_jax.inference.generate import generate
    from bytelm_jax.models import build_model, split_model
    from bytelm_jax.optimizers.build import build_optimizer
    from bytelm_jax.optimizers.q_learning import q_learning_metrics, q_learning_sgd
    from bytelm_jax.q_learning import q_learning
    from bytelm_jax.tools.inspection import inspect
    from bytelm_jax.training.evaluate import evaluate
    from bytelm_jax.training.loss import cross_entropy
    from bytelm_jax.training.pretrained import from_pretrained, save_pretrained

__all__ = [
    "AdamWConfig",
    "BLTConfig",
    "ByteTokenizer",
    "ByteVocab",
    "EntropyConfig",
    "LFByteConfig",
    "LionConfig",
    "MegabyteConfig",
    "MuonConfig",
    "OptimizerConfig",
    "QLearningAdamWConfig",
    "QLearningSGDConfig",
    "Recipe",
    "SGDConfig",
    "SamplerConfig",
    "build_model",
    "build_optimizer",
    "cross_entropy",
    "evaluate",
    "from_pretrained",
    "generate",
    "inspect",
    "q_learning",
    "q_learning_metrics",
    "q_learning_sgd",
    "recipes",
    "save_pretrained",
    "split_model",
]

_MODULES = {
    "build_model": "models",
    "build_optimizer": "optimizers.build",
    "cross_entropy": "training.loss",
    "evaluate": "training.evaluate",
    "from_pretrained": "training.pretrained",
    "generate": "inference.generate",
    "inspect": "tools.inspection",
    "q_learning_metrics": "optimizers.q_learning",
    "q_learning_sgd": "optimizers.q_learning",
    "save_pretrained": "training.pretrained",
    "split_model": "models",
}
"""Where the names are that are not in `bytelm`."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "q_learning":  # a module, and called as the function in it
        return importlib.import_module("bytelm_jax.q_learning")
    home = f"bytelm_jax.{_MODULES[name]}" if name in _MODULES else "bytelm"
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value  # asked for once
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
