"""A model's view of a text: surprise and entropy of every byte, and where patches start.

Surprise is the code length of the actual byte, in bits, as an evaluation sums it; entropy is the
surprise that the model expected there. Both are of its own distribution over the whole vocabulary.
`bytelm_jax.inspect` and `bytelm_torch.inspect` compute them. Axis: T bytes.
"""

import math
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int32

from bytelm.config import ModelConfig, require
from bytelm.config.lfbyte import require_prediction
from bytelm.tokenizer import ByteTokenizer

_LEAST = 64  # ids: shorter texts share one program


class Inspection(NamedTuple):
    """The model's view of each byte of `data`, in bits."""

    data: bytes
    surprise: Float[np.ndarray, " T"]
    entropy: Float[np.ndarray, " T"]
    starts: Bool[np.ndarray, " T"] | None
    """Whether a patch starts at each byte; None for a model without patches."""
    rule: str
    """The patching rule, in a few words."""

    @property
    def patches(self) -> int:
        """The number of patches, 0 for a model without patches."""
        return 0 if self.starts is None else int(self.starts.sum())

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form; None stands for a number that is not finite, which JSON cannot hold."""

        def finite(bits: np.ndarray) -> list[float | None]:
            return [value if math.isfinite(value) else None for value in bits.tolist()]

        return {
            "bytes": list(self.data),
            "surprise": finite(self.surprise),
            "entropy": finite(self.entropy),
            "starts": None if self.starts is None else self.starts.tolist(),
        }

    def describe(self) -> str:
        """One line: mean surprise, mean entropy and patches."""
        summary = (
            f"{len(self.data):,} bytes: {self.surprise.mean():.3f} bits of surprise a byte, "
            f"{self.entropy.mean():.3f} bits of entropy"
        )
        if self.starts is None:
            return f"{summary}; {self.rule}"
        mean = len(self.data) / self.patches
        return f"{summary}; {self.patches:,} patches of {mean:.2f} bytes ({self.rule})"


def padded_ids(config: ModelConfig, data: bytes) -> Int32[np.ndarray, "1 S"]:
    """The ids of a text, padded to a power of two, so that few shapes serve all texts.

    Raises `ValueError` for an empty text, for one that is longer than the model's `longest_input`,
    and for a model whose logits depend on the bytes they should predict.
    """
    require_prediction(config)
    require(isinstance(data, bytes), f"text: {type(data).__name__}; give bytes (text.encode())")
    require(bool(data), "text: is empty; give at least one byte")
    longest = config.longest_input
    fits = longest is None or len(data) <= longest
    require(fits, f"text: {len(data)} bytes; this model sees {longest} at most")
    capacity = max(_LEAST, 1 << (len(data) - 1).bit_length())
    capacity = capacity if longest is None else min(capacity, longest)
    ids = np.full((1, capacity), config.vocab.pad_id, np.int32)
    ids[0, : len(data)] = ByteTokenizer(config.vocab).encode(data)
    return ids


def inspection(
    model: Any,
    data: bytes,
    surprise: Float[np.ndarray, "1 S"],
    entropy: Float[np.ndarray, "1 S"],
    starts: Bool[np.ndarray, "1 S"] | None,
) -> Inspection:
    """The result for `data`, whose `padded_ids` `model` has processed; nats become bits."""
    size, contract = len(data), model.patching
    return Inspection(
        data,
        surprise[0, :size] / np.log(2).astype(surprise.dtype),
        entropy[0, :size] / np.log(2).astype(entropy.dtype),
        None if starts is None else starts[0, :size],
        model.config.patch_rule(None if contract is None else contract.threshold),
    )
