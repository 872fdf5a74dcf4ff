"""Tiny models of every architecture, for the tests of the interface to transformers."""

from typing import Any

from bytelm.config import BLTConfig, EntropyConfig, LFByteConfig, MegabyteConfig

_MEGABYTE: dict[str, Any] = {
    "patch_size": 4,
    "global_dim": 4,
    "local_dim": 8,
    "max_length": 32,
    "global_layers": 1,
    "global_heads": 2,
    "local_layers": 1,
    "local_heads": 2,
    "init_std": 0.5,
}
_STACKS: dict[str, Any] = {
    "local_dim": 8,
    "encoder_heads": 2,
    "encoder_hidden_dim": 8,
    "decoder_layers": 1,
    "decoder_heads": 2,
    "decoder_hidden_dim": 8,
    "global_dim": 16,
    "global_layers": 1,
    "global_heads": 2,
    "global_hidden_dim": 8,
    "ngram_rows": 50,
}
_ENTROPY = EntropyConfig(dim=8, layers=1, heads=2, hidden_dim=8)
CONFIGS = {
    "megabyte": MegabyteConfig(**_MEGABYTE),
    "in_action": MegabyteConfig(variant="in_action", **_MEGABYTE),
    "lfbyte": LFByteConfig(
        embed_dim=8, num_layers=1, adapt_dim=4, rank=2, kernel_length=8, init_std=0.5
    ),
    "blt": BLTConfig(patcher="entropy", threshold=5.4, entropy=_ENTROPY, **_STACKS),
    "entropy": _ENTROPY,
}
