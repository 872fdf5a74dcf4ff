"""Models and texts for reading from a cache by blocks: rows apart, guesses that turn out wrong.

B rows, T bytes a block, L bytes a text.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from bytelm.config import BLTConfig, ModelConfig
from parity_tests.tiny_models import CONFIGS

BLOCK, LENGTH, PROMPT = 5, 32, 16
STARTS = (0, 9, 16)
"""Where the rows begin to be read: behind it the prefill has read another text."""
BYTROPIX = {
    "patcher": "histogram",
    "threshold": 7.0,
    "ngram_combine": "mean",
    "feedforward": "spline",
    "entropy_attention": True,
    "positions": "sinusoidal",
}
TEXT = "Aé b: 🙂x, 日本 — the end.\nNo. And (on)\n and on … ".encode() * 3
BLT = CONFIGS["blt"]


def resetting(config: ModelConfig, reset_on: str = "newline") -> ModelConfig:
    """`config` with resets, also in its entropy model."""
    if isinstance(config, BLTConfig):
        config = replace(
            config, entropy=replace(config.entropy, reset_on=reset_on), reset_on=reset_on
        )
    return replace(config, reset_on=reset_on)


MODELS: dict[str, ModelConfig] = {
    **CONFIGS,
    **{f"{name}, newline": resetting(c) for name, c in CONFIGS.items()},
    "blt, small budget": replace(BLT, patch_budget=0.05),
    "blt, space": replace(BLT, patcher="space", ngram_sizes=()),
    "blt, fixed, document": resetting(
        replace(BLT, patcher="fixed", patch_size=5, local_window=0), "document"
    ),
    "bytropix": replace(BLT, **BYTROPIX),
    "bytropix, newline": resetting(replace(BLT, **BYTROPIX)),
    "bytropix, newline, small budget": resetting(replace(BLT, **BYTROPIX, patch_budget=0.1)),
    "blt, byte": replace(BLT, patcher="byte"),
    "blt, word, newline": resetting(replace(BLT, patcher="word")),
}


def texts(config: ModelConfig) -> np.ndarray:
    """int32[3, L] ids; the last row ends with a newline, so that a segment starts past its end."""
    last = TEXT.index(b"\n", 2 * LENGTH) + 1 - LENGTH
    rows = [list(TEXT[start : start + LENGTH]) for start in (0, 7, last)]
    return np.array(rows, np.int32) + config.vocab.offset


def blocks(ids: np.ndarray, vocab_offset: int) -> Iterator[tuple[np.ndarray, ...]]:
    """The blocks in which each row of `ids` is read to its end, and further while others go on.

    Each is `before` int32[B, T], the byte before each of T, all from number `index` int32[B] on; of
    which only the first `right` int[B] are the text's, the others guesses.
    """
    source, index = np.random.default_rng(1), np.array(STARTS, np.int32)
    while (index < LENGTH).any():
        before, right = np.zeros((len(ids), BLOCK), np.int32), np.zeros(len(ids), np.int32)
        for row, at in enumerate(index):
            there = np.clip(np.arange(at - 1, at - 1 + BLOCK), 0, LENGTH - 1)
            before[row] = ids[row, there]
            right[row] = min(source.integers(1, BLOCK + 1), max(LENGTH - at, 0))
            wrong = source.integers(0, 256, BLOCK) + vocab_offset
            wrong[source.random(BLOCK) < 0.4] = (
                ord("\n") + vocab_offset
            )  # may seem to end a segment
            if index[row] + right[row] < LENGTH:
                before[row, right[row] :] = wrong[right[row] :]
        yield before, index, right
        index = index + right


def check_blocks(
    ids: np.ndarray,
    expected: np.ndarray,
    vocab_offset: int,
    extend: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> None:
    """`extend(before, index)` must give the logits that a whole pass has for the true bytes."""
    for before, index, right in blocks(ids, vocab_offset):
        logits = extend(before, index)
        for row, (at, count) in enumerate(zip(index, right, strict=True)):
            seen, whole = logits[row, :count], expected[row, at : at + count]
            np.testing.assert_allclose(seen, whole, rtol=0, atol=1e-9)
