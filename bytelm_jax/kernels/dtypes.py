"""The width of dtypes: which ones take the 16-bit forms, and how much memory arrays take."""

import math
from collections.abc import Sequence
from typing import Any

from jaxtyping import Array


def is_low_precision(x: Array) -> bool:
    """Whether x has a 16-bit dtype, bfloat16 or float16."""
    return x.dtype.itemsize == 2


def array_bytes(shape: Sequence[int], dtype: Any) -> int:
    """Bytes of an array of this shape and dtype; shape () gives the bytes of one element."""
    return math.prod(shape) * dtype.itemsize
