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
from bytelm_torch.interop.transformers_inputs import check_positions, largest, left_justify


class _Found(Exception):
    """Ends a round at the byte whose logits are asked for."""


class ByteCache:
    """A decoder's cache for rows whose texts differ in length, one id at a time.

    Rows stand left-justified, so that a row's positions do not depend on its neighbours' padding;
    rows that have come to the same round are decoded together.
    """

    is_compileable = False
    headroom = 64
    """Least ids for which a prompt's cache has room beyond the longest row."""

    def __init__(self, model: Any, rows: int, limit: int | None):
        self._model, self._limit = model, limit
        device = next(model.parameters()).device
        self._columns = torch.full((rows, 0), model.config.vocab.pad_id, device=device)
        self._real = torch.ones(rows, 0, dtype=torch.bool, device=device)
        self._lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        self._ids, self._capacity = self._columns, 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns that `forward` was given so far, padding included."""
        return self._columns.shape[1]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row `beam_idx[i]` was."""
        self._columns, self._real = self._columns[beam_idx], self._real[beam_idx]
        self._ids, self._lengths = self._ids[beam_idx], self._lengths[beam_idx]
        self._state = _each_tensor(self._state, lambda x: x[beam_idx])

    def extend(
        self, ids: Tensor, real: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        """Takes the ids [B, T] that follow; logits of the next id: [B, T, V], at first [B, 1, V].

        `real` spans the columns before, too; where it differs from what it was for those, all is
        computed once more. Without it, the new ids are all real. Raises `ValueError` where a row
        would leave no room for an id that follows, and for positions that are not the ids'.
        """
        seen = self.get_seq_length()
        require(
            len(ids) == len(self._lengths),
            f"input_ids: {len(ids)} rows; the cache has {len(self._lengths)}",
        )
        require(ids.shape[1] > 0 or seen == 0, f"input_ids: no id behind the {seen} in the cache")
        if real is None:
            real = torch.cat([self._real, torch.ones_like(ids, dtype=torch.bool)], dim=1)
        if position_ids is not None:
            check_positions(position_ids, real[:, seen:], real.cumsum(dim=1)[:, seen:] - 1)
        self._check_room(real)
        changed = not torch.equal(real[:, :seen], self._real)
        self._columns, self._real = torch.cat([self._columns, ids], dim=1), real
        if seen == 0 or changed:
            logits = self._compute(seen or ids.shape[1])
            if seen == 0:
                return logits[:, None]
        steps = [self._append(ids[:, i], real[:, seen + i]) for i in range(ids.shape[1])]
        return torch.stack(steps, dim=1)

    def _check_room(self, real: Tensor) -> None:
        """Raises `ValueError` where no id can follow a row."""
        if self._limit is not None:
            require(
                largest(real.sum(dim=1)) < self._limit,
                f"max_length={self._limit}: the text has reached it; generate fewer bytes",
            )

    def _compute(self, seen: int) -> Tensor:
        """Starts over with the first `seen` columns; logits [B, V] of each row's next id."""
        pad = self._model.config.vocab.pad_id
        rows = left_justify(self._columns[:, :seen], self._real[:, :seen], pad)
        longest = largest(rows.lengths)
        self._ids, self._capacity, self._lengths = self._ids[:, :0], 0, rows.lengths
        self._reserve(longest + max(self.headroom, longest // 2))
        self._ids[:, :longest] = rows.ids[:, :longest]
        self._fill()
        return self._logits()  # which writes the round that is under way

    def _append(self, ids: Tensor, real: Tensor) -> Tensor:
        """Takes one more id of each row [B] where it is real; logits [B, V] of each row's next."""
        if grows := largest(self._lengths + real) >= self._capacity:
            self._reserve(2 * self._capacity)
        slots = self._lengths[:, None]
        ids = torch.where(real[:, None], ids[:, None], self._ids.gather(1, slots))
        self._ids.scatter_(1, slots, ids)
        self._lengths = self._lengths + real
        if grows:  # only now: the round before the next must be whole
            self._fill()
        return self._logits()

    def _reserve(self, capacity: int) -> None:
        """Room for `capacity` ids, as far as the model allows."""
        patch = self._model.round_length
        capacity = capacity if self._limit is None else min(capacity, self._limit)
        capacity = -(-capacity // patch) * patch
        pad = self._model.config.vocab.pad_id
        self._ids = F.pad(self._ids, (0, capacity - self._capacity), value=pad)
        self._capacity = capacity
        self._state = self._model.init_cache(len(self._ids), capacity)

    def _fill(self) -> None:
        """Writes the rounds that the longest row has finished, in one pass."""
        patch = self._model.round_length
        whole = largest(self._lengths) // patch * patch
        if whole:
            self._state = self._model.prefill(self._ids[:, :whole], self._state)

    def _logits(self) -> Tensor:
        rounds = self._lengths // self._model.round_length
        if len(rounds) == 0:
            return torch.zeros(0, self._model.config.vocab.size, device=rounds.device)
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


def given_cache(past_key_values: Any, cache: Any) -> ByteCache | None:
    """The cache that a call gives by one of its two names; raises `ValueError` for another kind."""
    require(past_key_values is None or cache is None, "cache, past_key_values: give one of them")
    name = "past_key_values" if cache is None else "cache"
    past = past_key_values if cache is None else cache
    if past is not None and not isinstance(past, ByteCache):
        raise ValueError(f"{name}={type(past).__name__}: give the cache of an earlier call")
    return past


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
