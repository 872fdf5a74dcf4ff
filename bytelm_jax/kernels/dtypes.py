"""How wide numbers are: which of them take the 16-bit forms, and what arrays take in memory."""

import math
from collections.abc import Sequence
from typing import Any

from jaxtyping import Array


def is_low_precision(x: Array) -> bool:
    """Whether x holds 16-bit numbers, bfloat16 or float16."""
    return x.dtype.itemsize == 2


def array_bytes(shape: Sequence[int], dtype: Any) -> int:
    """Bytes of an array of this shape and dtype; shape () gives those of one number."""
    return math.prod(shape) * dtype.itemsize
