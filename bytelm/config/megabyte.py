"""The configuration of MEGABYTE and, with patches of one byte, of a plain transformer."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from bytelm.config.base import (
    ArchitectureConfig,
    ByteVocab,
    require,
    require_fraction,
    require_numbers,
    require_positive,
)


@dataclass(frozen=True, kw_only=True)
class MegabyteConfig(ArchitectureConfig):
    """MEGABYTE (Yu et al. 2023, arXiv 2305.07185). The global width is patch_size * global_dim.

    A segment (`reset_on`) has its own patches, the last one padded. A reset that would exceed the
    capacity that `reset_room` gives a row in training is skipped, so that the rest of the row is
    one segment. Evaluation and generation apply every reset.
    """

    architecture: ClassVar[str] = "megabyte"
    variant: Literal["paper", "in_action"] = "paper"
    """"paper" has learned positions; "in_action" has ALiBi and local input across patches."""
    vocab: ByteVocab = field(default_factory=ByteVocab)
    patch_size: int = 8
    """Bytes per patch; 1 with local_layers=0 is a plain byte transformer."""
    global_dim: int = 128
    """Embedding width of a byte; the global width is patch_size times this."""
    local_dim: int = 256
    """Width of the local transformer."""
    max_length: int = 2048
    """Longest input in bytes; "in_action" has no limit and ignores it."""
    global_layers: int = 12
    """Layers of the global transformer, which runs once per patch."""
    global_heads: int = 16
    """Attention heads of the global transformer."""
    local_layers: int = 6
    """Layers of the local transformer, which runs on every byte; 0 leaves it out."""
    local_heads: int = 4
    """Attention heads of the local transformer."""
    init_std: float = 0.02
    """Standard deviation of the initial weights."""
    dropout: float = 0.0
    """Fraction of activations that training drops."""
    reset_on: Literal["none", "newline", "document"] = "none"
    """What starts a segment that sees nothing before it."""
    reset_room: float = 1.5
    """Patches that training has capacity for, in units of a row without resets."""

    def __post_init__(self) -> None:
        require_numbers(self)
        require_positive(self, "patch_size", "global_dim", "local_dim", "max_length")
        require_positive(self, "global_layers", "global_heads", "local_heads")
        require(self.local_layers >= 0, f"local_layers={self.local_layers}: must be at least 0")
        require_fraction(self, "dropout")
        require(self.init_std > 0, f"init_std={self.init_std}: must be above 0")
        for name, width in (("global_heads", self.global_width), ("local_heads", self.local_dim)):
            heads = getattr(self, name)
            require(heads <= width, f"{name}={heads}: must be at most the width {width}")
        require(
            self.variant != "paper" or self.max_length % self.patch_size == 0,
            f"max_length={self.max_length}: must be a multiple of patch_size={self.patch_size}",
        )
        require(self.reset_room >= 1, f"reset_room={self.reset_room}: must be at least 1")

    @property
    def ineffective(self) -> dict[str, str]:
        found = {}
        if self.variant == "in_action":
            found["max_length"] = "variant=in_action"
        if self.reset_on == "none":
            found["reset_room"] = "reset_on=none"
        if not self.local_layers:
            found["local_heads"] = "local_layers=0"
        return found

    def patches(self, length: int) -> int:
        """Patches of `length` bytes of one text, at least 1."""
        return max(1, -(-length // self.patch_size))

    def reset_patches(self, length: int) -> int:
        """Patches that training has capacity for in a row of `length` bytes with resets."""
        return math.ceil(self.reset_room * self.patches(length))

    @property
    def global_width(self) -> int:
        """Width of the global transformer: the concatenated byte embeddings of one patch."""
        return self.patch_size * self.global_dim

    @property
    def longest_input(self) -> int | None:
        """The longest row in bytes; None if there is no limit."""
        return self.max_length if self.variant == "paper" else None

    @property
    def parity_length(self) -> int:
        """Bytes per row when the twins are compared: an odd number, just over four patches."""
        return 4 * self.patch_size + 3

    @property
    def tensor_sizes(self) -> dict[str, int] | None:
        """Heads, which share one key and value head, and hidden features of each stack."""
        sizes = {"global_heads": self.global_heads, "4 * global width": 4 * self.global_width}
        local = {"local_heads": self.local_heads, "4 * local_dim": 4 * self.local_dim}
        return sizes | local if self.local_layers else sizes

    def patch_rule(self, threshold: float | None = None) -> str:
        """The patching rule, in a few words."""
        return "of fixed length"

    def parameter_count(self) -> int:
        """Number of parameters, in closed form."""
        vocab, narrow, local = self.vocab.size, self.global_dim, self.local_dim
        count = self.global_layers * _block_parameters(self.global_width, self.global_heads)
        count += self.local_layers * _block_parameters(local, self.local_heads)
        count += vocab * narrow + (narrow * local + local) + (local * vocab + vocab)
        if self.variant == "paper":
            return count + self.max_length * narrow + vocab * local
        return count + narrow * local + local

    def flops_per_byte(self, length: int) -> float:
        """Forward floating-point operations per byte at `length` bytes; causal attention is halved.

        For an undivided text: the extra capacity for resets is not counted.
        """
        patches = -(-length // self.patch_size)
        wide, heads = self.global_width, self.global_heads
        work = self.global_layers * _block_flops(wide, heads, patches) / self.patch_size
        work += self.local_layers * _block_flops(self.local_dim, self.local_heads, self.patch_size)
        work += 2 * self.local_dim * (self.global_dim + self.vocab.size)
        return work + (2 * self.global_dim * self.local_dim if self.variant == "in_action" else 0)

    def uses_per_byte(self, name: str, length: int) -> float:
        """As the base class says: the global transformer runs once per patch."""
        return 1 / self.patch_size if name.startswith("global_transformer.") else 1.0


def _block_parameters(width: int, heads: int) -> int:
    """Parameters of a multi-query attention block and its feed-forward layer of fourfold width."""
    head = width // heads
    attention = 2 * width + width * heads * head + width * 2 * head + heads * head * width
    return attention + 2 * width + (width * 4 * width + 4 * width) + (4 * width * width + width)


def _block_flops(width: int, heads: int, keys: int) -> int:
    """Forward floating-point operations of that block per position with `keys` keys."""
    head = width // heads
    products = 2 * width * heads * head + width * 2 * head + 8 * width * width
    return 2 * products + 2 * heads * head * keys  # scores and values, each half of 2 * keys
