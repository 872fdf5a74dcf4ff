"""transformers' Auto classes for the models here; importing this registers them.

Beside the names below, each architecture has a configuration and a model: `MegabyteLMConfig` and
`MegabyteForCausalLM` for `MegabyteConfig`, and so on.
"""

from typing import TYPE_CHECKING, Any

from bytelm_torch.interop import transformers as _transformers
from bytelm_torch.interop.transformers import (
    ByteCache,
    ByteLMConfig,
    ByteLMForCausalLM,
    ByteLMTokenizer,
    from_native,
    tokenizer_for,
)

__all__ = [
    "ByteCache",
    "ByteLMConfig",
    "ByteLMForCausalLM",
    "ByteLMTokenizer",
    "from_native",
    "tokenizer_for",
]

globals().update(_transformers.CLASSES)
__all__ += list(_transformers.CLASSES)  # pyright: ignore[reportUnsupportedDunderAll]

if TYPE_CHECKING:

    def __getattr__(name: str) -> Any: ...
