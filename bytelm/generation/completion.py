"""What generation returns for one row."""

from typing import Literal, NamedTuple

import numpy as np


class Completion(NamedTuple):
    """The text that was written after one prompt, why it ended, and what speculation did."""

    text: bytes
    """The new bytes, without the prompt and without a stop text."""
    log_probs: np.ndarray | None
    """float32, one per byte of `text`, natural logarithm; None where they were not asked for."""
    end: Literal["eos", "stop", "length"]
    """The model ended the text, a stop text appeared, or `max_new_bytes` were written."""
    rounds: int
    """Rounds of drafting and verification; without speculation one a byte."""
    drafted: int
    """Bytes that were drafted in all rounds."""
    accepted: int
    """Those of them that the sampler also chose."""
