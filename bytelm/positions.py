"""Numbers that positions are made of: rotary frequencies and ALiBi's slopes."""

import math

import numpy as np

from bytelm.config.block import PAPER, BlockConfig


def rope_frequencies(head_dim: int, theta: float, block: BlockConfig = PAPER) -> np.ndarray:
    """theta^(−2i / head_dim) for pair i, float32[head_dim / 2], in radians per position.

    Rotary position embeddings: Su et al. 2021, arXiv 2104.09864. `block` may slow them down.

    Every operation is rounded to float32, whatever the dtype of a model, as in published weights;
    at position 4,000 the rounding shows in the fourth digit. The power is computed in float64
    first. That gives PyTorch's values, on every processor; numpy's own float32 power is one unit in
    the last place away for one frequency in five, and which ones depends on the processor.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    powers = np.power(np.float64(theta), exponents.astype(np.float64))
    return _scaled(np.float32(1) / powers.astype(np.float32), block)


def _scaled(frequencies: np.ndarray, block: BlockConfig) -> np.ndarray:
    """Frequencies divided by `rope_factor`, under llama3 only those of few turns; all in float32.

    Llama 3.1 (arXiv 2407.21783) in the form of transformers: a pair that turns between `rope_low`
    and `rope_high` times within `rope_length` positions gets a mean of the two frequencies.
    """
    if block.rope_scaling == "none":
        return frequencies
    slow = frequencies / np.float32(block.rope_factor)
    if block.rope_scaling == "linear":
        return slow
    length, low, high = block.rope_length, block.rope_low, block.rope_high
    # PyTorch divides a number by an array as the number times the reciprocals.
    wavelengths = np.float32(2 * math.pi) * (np.float32(1) / frequencies)
    turns = np.float32(length) * (np.float32(1) / wavelengths)
    share = (turns - np.float32(low)) / np.float32(high - low)
    between = (np.float32(1) - share) * frequencies / np.float32(block.rope_factor)
    between = between + share * frequencies
    chosen = np.where(wavelengths > np.float32(length / low), slow, frequencies)
    medium = (wavelengths >= np.float32(length / high)) & (wavelengths <= np.float32(length / low))
    return np.where(medium, between, chosen)


def alibi_slopes(heads: int) -> np.ndarray:
    """ALiBi's slopes (Press et al. 2022), float32[H]: 2^(−8 i / n) for head i of n, counted from 1.

    They are rounded to float32 whatever the model's dtype, as in published MEGABYTE checkpoints.
    """
    return np.array([2.0 ** (-8.0 * (i + 1) / heads) for i in range(heads)], dtype=np.float32)


def alibi_bias(heads: int, length: int) -> np.ndarray:
    """ALiBi: slope_h · j for key position j, float32[H, S]; products are rounded to float32, too.

    Adding slope · j equals the usual slope · (j − i), since softmax ignores what is constant over
    the keys.
    """
    return alibi_slopes(heads)[:, None] * np.arange(length, dtype=np.float32)[None, :]
