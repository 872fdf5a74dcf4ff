"""Every configuration: frozen, keyword-only, convertible to JSON and back.

Defaults live here and nowhere else. A value that cannot work raises `ValueError` with one line that
names the field, the value and what to do.
"""

from bytelm.config import models, optimizer
from bytelm.config.base import (
    ByteVocab,
    require,
    require_fraction,
    require_number,
    require_numbers,
    require_positive,
)
from bytelm.config.block import DONORS, BlockConfig
from bytelm.config.blt import PatchingContract
from bytelm.config.models import *  # noqa: F403
from bytelm.config.models import (
    MODEL_CONFIGS,
    ModelConfig,
    models_with,
    training_flops_per_byte,
)
from bytelm.config.optimizer import *  # noqa: F403
from bytelm.config.optimizer import OPTIMIZER_CONFIGS, change_optimizer, optimizers_with
from bytelm.config.q_learning import QLearningConfig
from bytelm.config.run import (
    DataConfig,
    Recipe,
    TrainConfig,
    default_length,
    parse_scales,
    parse_steps,
    require_document_ends,
    require_length,
)
from bytelm.config.serialize import from_dict, model_from_dict, to_dict

__all__ = [
    "DONORS",
    "MODEL_CONFIGS",
    "OPTIMIZER_CONFIGS",
    "BlockConfig",
    "ByteVocab",
    "DataConfig",
    "ModelConfig",
    "PatchingContract",
    "QLearningConfig",
    "Recipe",
    "TrainConfig",
    "change_optimizer",
    "default_length",
    "from_dict",
    "model_from_dict",
    "models_with",
    "optimizers_with",
    "parse_scales",
    "parse_steps",
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
__all__ += optimizer.__all__
