"""The cache that `bytelm_torch.hf` decodes with: rows of unequal length, one id at a time.

B rows, T ids, V vocabulary, P bytes a round of the model's decoder.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bytelm.config import require


class _Found(Exception):
    """Ends a round at the byte whose logits are asked for."""


class ByteCache:
    """A decoder's cache for rows whose texts differ in length, one id at a time.

    Rows stand left-justified, so that a row's positions do not depend on its neighbours' padding;
    rows that have come to the same round are decoded together.
    """

    is_compileable = False

    def __init__(self, model: Any, rows: int, capacity: int, limit: int | None):
        patch = model.round_length
        self._model, self._limit = model, limit
        device = next(model.parameters()).device
        self._seen = 0
        self._lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        self._ids = torch.full((rows, 0), model.config.vocab.pad_id, device=device)
        self._capacity = 0
        self._reserve(-(-capacity // patch) * patch)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns that `forward` was given so far, padding included."""
        return self._seen

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row `beam_idx[i]` was."""
        self._ids, self._lengths = self._ids[beam_idx], self._lengths[beam_idx]
        self._state = _each_tensor(self._state, lambda x: x[beam_idx])

    def prefill(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Takes the prompts [B, T], left-justified; logits [B, 1, V] of each row's next id."""
        self._seen += ids.shape[1]
        self._ids[:, : ids.shape[1]] = ids
        self._lengths = lengths.clone()
        self._fill()
        return self._logits()[:, None]

    def append(self, ids: Tensor) -> Tensor:
        """Takes one more id a row [B]; logits [B, 1, V] of each row's next."""
        self._seen += 1
        if grows := int(self._lengths.max()) + 1 >= self._capacity:
            self._reserve(2 * self._capacity)
        self._ids.scatter_(1, self._lengths[:, None], ids[:, None])
        self._lengths += 1
        if grows:  # only now: the round before the next must be whole
            self._fill()
        return self._logits()[:, None]

    def _reserve(self, capacity: int) -> None:
        patch = self._model.round_length
        if self._limit is not None:
            capacity = min(capacity, self._limit)
            require(
                capacity > self._capacity,
                f"max_length={self._limit}: the text has reached it; generate fewer bytes",
            )
        more, pad = max(capacity, patch) - self._capacity, self._model.config.vocab.pad_id
        self._ids = F.pad(self._ids, (0, more), value=pad)
        self._capacity = self._ids.shape[1]
        self._state = self._model.init_cache(len(self._ids), self._capacity)

    def _fill(self) -> None:
        """Writes the rounds that the longest row has finished, in one pass."""
        patch = self._model.round_length
        whole = int(self._lengths.max()) // patch * patch
        if whole:
            self._state = self._model.prefill(self._ids[:, :whole], self._state)

    def _logits(self) -> Tensor:
        rounds = self._lengths // self._model.round_length
        if bool((rounds == rounds[0]).all()):
            logits, self._state = self._run(self._state, self._ids, self._lengths, int(rounds[0]))
            return logits
        found: list[tuple[Tensor, Tensor]] = []
        for index in rounds.unique().tolist():
            rows = (rounds == index).nonzero()[:, 0]
            part = _each_tensor(self._state, lambda x, rows=rows: x[rows])
            logits, part = self._run(part, self._ids[rows], self._lengths[rows], index)
            _write_rows(self._state, part, rows)
            found.append((rows, logits))
        order = torch.cat([rows for rows, _ in found]).argsort()
        return torch.cat([logits for _, logits in found])[order]

    def _run(self, state: Any, ids: Tensor, lengths: Tensor, index: int) -> tuple[Tensor, Any]:
        """Logits [B, V] of the next id of rows that are all in round `index`, and the cache."""
        patch = self._model.round_length
        start = index * patch
        here = ids[:, start : start + patch]
        pads = torch.full_like(here, self._model.config.vocab.pad_id)
        previous = ids[:, start - patch : start] if index else pads
        places = lengths - start
        last, kept = int(places.max()), []

        def choose(logits: Tensor, i: int) -> Tensor:
            kept.append(logits)
            if i == last and i + 1 < patch:
                raise _Found  # the caches are written in place, so nothing is lost
            return here[:, i]

        with contextlib.suppress(_Found):
            state, _ = self._model.decode_round(state, previous, index, choose)
        rows = torch.arange(len(ids), device=ids.device)
        return torch.stack(kept, dim=1)[rows, places], state


def _each_tensor(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same tree of tuples with `change` applied to every tensor that has rows."""
    if isinstance(tree, Tensor):
        return change(tree) if tree.ndim else tree
    if isinstance(tree, tuple):
        parts = [_each_tensor(part, change) for part in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)
    return tree


def _write_rows(tree: Any, part: Any, rows: Tensor) -> None:
    if isinstance(tree, Tensor):
        if tree.ndim:
            tree[rows] = part
    elif isinstance(tree, tuple):
        for old, new in zip(tree, part, strict=True):
            _write_rows(old, new, rows)
