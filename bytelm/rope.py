"""Frequencies of rotary position embeddings (Su et al. 2021, arXiv 2104.09864)."""

import numpy as np


def rope_frequencies(head_dim: int, theta: float) -> np.ndarray:
    """theta^(−2i / head_dim) for pair i, float32[head_dim / 2], in radians per position.

    Every operation is rounded to float32, whatever the dtype of a model, as in published weights;
    at position 4,000 the rounding shows in the fourth digit. The power is computed in float64
    first. That gives PyTorch's values, on every processor; numpy's own float32 power is one unit in
    the last place away for one frequency in five, and which ones depends on the processor.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    powers = np.power(np.float64(theta), exponents.astype(np.float64))
    return np.float32(1) / powers.astype(np.float32)
