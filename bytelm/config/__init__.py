"""Every configuration: frozen, keyword-only, convertible to JSON and back.

Defaults live here and nowhere else. A value that cannot work raises `ValueError` with one line that
names the field, the value and what to do.
"""

from bytelm.config import models
from bytelm.config.base import (
    ByteVocab,
    require,
    require_fraction,
    require_number,
    require_numbers,
    require_positive,
)
from bytelm.config.blt import PatchingContract
from bytelm.config.models import *  # noqa: F403
from bytelm.config.models import MODEL_CONFIGS, ModelConfig, training_flops_per_byte
from bytelm.config.optimizer import (
    OPTIMIZER_CONFIGS,
    AdamWConfig,
    LionConfig,
    MuonConfig,
    OptimizerConfig,
    QLearningAdamWConfig,
    QLearningSGDConfig,
    SGDConfig,
    change_optimizer,
    optimizers_with,
)
from bytelm.config.q_learning import QLearningConfig
from bytelm.config.run import (
    DataConfig,
    Recipe,
    TrainConfig,
    require_document_ends,
    require_length,
)
from bytelm.config.serialize import from_dict, model_from_dict, to_dict

__all__ = [
    "MODEL_CONFIGS",
    "OPTIMIZER_CONFIGS",
    "AdamWConfig",
    "ByteVocab",
    "DataConfig",
    "LionConfig",
    "ModelConfig",
    "MuonConfig",
    "OptimizerConfig",
    "PatchingContract",
    "QLearningAdamWConfig",
    "QLearningConfig",
    "QLearningSGDConfig",
    "Recipe",
    "SGDConfig",
    "TrainConfig",
    "change_optimizer",
    "from_dict",
    "model_from_dict",
    "optimizers_with",
    "require",
    "require_document_ends",
    "require_fraction",
    "require_length",
    "require_number",
    "require_numbers",
    "require_positive",
    "to_dict",
    "training_flops_per_byte",
]
__all__ += models.__all__
