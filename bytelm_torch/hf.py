"""transformers' Auto classes for the models here; importing this registers them."""

from bytelm_torch.interop.transformers import (
    BLTForCausalLM,
    BLTLMConfig,
    ByteCache,
    ByteLMConfig,
    ByteLMForCausalLM,
    ByteLMTokenizer,
    EntropyForCausalLM,
    EntropyLMConfig,
    LFByteForCausalLM,
    LFByteLMConfig,
    MegabyteForCausalLM,
    MegabyteLMConfig,
    from_native,
    tokenizer_for,
)

__all__ = [
    "BLTForCausalLM",
    "BLTLMConfig",
    "ByteCache",
    "ByteLMConfig",
    "ByteLMForCausalLM",
    "ByteLMTokenizer",
    "EntropyForCausalLM",
    "EntropyLMConfig",
    "LFByteForCausalLM",
    "LFByteLMConfig",
    "MegabyteForCausalLM",
    "MegabyteLMConfig",
    "from_native",
    "tokenizer_for",
]
