"""Numbers that positions are made of: rotary frequencies and ALiBi's slopes."""

import numpy as np


def rope_frequencies(head_dim: int, theta: float) -> np.ndarray:
    """theta^(−2i / head_dim) for pair i, float32[head_dim / 2], in radians per position.

    Rotary position embeddings: Su et al. 2021, arXiv 2104.09864.

    Every operation is rounded to float32, whatever the dtype of a model, as in published weights;
    at position 4,000 the rounding shows in the fourth digit. The power is computed in float64
    first. That gives PyTorch's values, on every processor; numpy's own float32 power is one unit in
    the last place away for one frequency in five, and which ones depends on the processor.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    powers = np.power(np.float64(theta), exponents.astype(np.float64))
    return np.float32(1) / powers.astype(np.float32)


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
