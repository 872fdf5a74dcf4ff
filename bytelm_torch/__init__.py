"""bytelm in PyTorch: the twin of `bytelm_jax`, needing no JAX. The public names, nothing else.

They are those of `bytelm_jax`: what `bytelm` offers, and the verbs of this framework.
"""

from typing import TYPE_CHECKING

import bytelm
from bytelm import *  # noqa: F403
from bytelm_torch.inference.generate import complete
from bytelm_torch.interop.export import from_pretrained, save_pretrained
from bytelm_torch.models import build_model
from bytelm_torch.optimizers.build import build_optimizer
from bytelm_torch.optimizers.q_agent import q_learning_metrics
from bytelm_torch.optimizers.q_learning import EnhancedSGD
from bytelm_torch.tools.inspection import inspect
from bytelm_torch.training.evaluate import evaluate
from bytelm_torch.training.loss import cross_entropy

if TYPE_CHECKING:
    from bytelm_torch.generate import generate
    from bytelm_torch.q_learning import q_learning
else:  # modules, each of which is called as the function in it
    from bytelm_torch import generate, q_learning

q_learning_sgd = EnhancedSGD
"""`EnhancedSGD` by the name that it has in a recipe and in `bytelm_jax`."""

__all__ = [
    "EnhancedSGD",
    "build_model",
    "build_optimizer",
    "complete",
    "cross_entropy",
    "evaluate",
    "from_pretrained",
    "generate",
    "inspect",
    "q_learning",
    "q_learning_metrics",
    "q_learning_sgd",
    "save_pretrained",
]
__all__ += bytelm.__all__
