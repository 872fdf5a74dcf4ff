"""Continuous batching: texts that join and leave a batch of one shape between short advances.

The mirror of `bytelm_jax/inference/slots.py`, without compiled programs. Axes: B slots, C bytes of
the longest text, P bytes per round, K likely bytes that are reported.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from bytelm.config import ByteVocab, require
from bytelm.memory import host_memory
from bytelm.sampling import SamplerConfig
from bytelm.serving.engine import (
    TOP,
    Scores,
    Settings,
    Written,
    both_constraints,
    nothing,
    state_after,
    written_by,
)
from bytelm.serving.prompts import GROUP, PART_BYTES, Pass, Prompts, many
from bytelm_torch.inference.rounds import (
    Rows,
    State,
    allowed_candidates,
    append,
    device_of,
    pick_ids,
    prompt_ids,
)
from bytelm_torch.inference.sampling import candidate_columns, random_row
from bytelm_torch.models.interface import inference

_MOST_BYTES = 256  # of an advance and a row, or one round if that is longer
_FREE = Settings(max_new_bytes=0, sampler=SamplerConfig(sampler="greedy"), seed=0)


def in_own_thread(call: Callable[[], Any]) -> Any:
    """What a call returns or raises, made in a thread that ends with it.

    OpenMP keeps workers for every living thread that has computed. Once these are more than the
    cores, they sleep between any two products: a byte then takes twice the time. So that they are
    those of the thread that writes texts alone, whatever else a server computes is done in here.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(call).result()


class TorchSlots:
    """`bytelm.serving.engine.Engine` of a model.

    Raises `ValueError` if caches of so many texts of `capacity` bytes do not fit into memory.
    """

    def __init__(self, model: Any, slots: int, capacity: int) -> None:
        require(model.config.causal, "causal=False: generation needs a causal model")
        self._model, self.config, self.slots = model, model.config, slots
        limit = self.config.longest_input
        self.capacity = capacity if limit is None else min(capacity, limit)
        self._patch, self._at = model.round_length, device_of(model)
        self._length = -(-self.capacity // self._patch) * self._patch
        self.most_rounds = max(1, _MOST_BYTES // self._patch)
        size, memory = self._bytes(GROUP), _memory(self._at)
        require(
            size <= memory,
            f"slots={slots}: caches of {slots} texts of {self._length} bytes take "
            f"{size / 2**30:.1f} GiB, more than there is; give fewer slots or shorter texts",
        )
        self._many = many(slots) if self._bytes(many(slots)) <= memory else GROUP
        vocab, constraints = self.config.vocab, both_constraints()
        self._allowed = {
            allow_eos: torch.from_numpy(allowed_candidates(constraints, vocab, allow_eos)).to(
                self._at
            )
            for allow_eos in (True, False)
        }
        self._settings = [_FREE] * slots
        self._read = [0] * slots
        part = PART_BYTES // self._patch * self._patch
        self._prompts = Prompts(self._patch, part if part and model.prefills_in_parts else None)
        with inference(model):
            zeros = torch.zeros(slots, dtype=torch.long, device=self._at)
            self._rows = Rows(
                torch.zeros(slots, self._length, device=self._at, dtype=torch.float32),
                zeros.clone(),
                zeros.clone(),
                SamplerConfig(),
                self._allowed[True],
                torch.from_numpy(constraints.step.astype(np.int64)).to(self._at),
            )
            self._state = State(
                model.init_cache(slots, self._length),
                prompt_ids([b""] * slots, vocab, (slots, self._patch + self._length), 0).to(
                    self._at
                ),
                zeros.clone(),
                zeros == 0,
                zeros.clone(),
                torch.zeros(slots, 0, device=self._at, dtype=torch.float32),
                zeros.clone(),
                zeros.clone(),
                (),
            )

    @property
    def device_bytes(self) -> int:
        """Memory in use on a GPU; elsewhere what the parameters and caches take."""
        if self._at.type == "cuda":
            return torch.cuda.memory_allocated(self._at)
        tensors = [*self._model.parameters(), *tree_leaves((self._state, self._rows))]
        return sum(each.nbytes for each in tensors if isinstance(each, Tensor))

    def warm_up(self) -> None:
        """Runs everything once but `score`, as a GPU loads its kernels when they are first used."""
        in_own_thread(self._warm_up)

    def _warm_up(self) -> None:
        self.join([(0, b"\0" * (self._patch + 1), replace(_FREE, max_new_bytes=1))])
        self.read(writing=False)
        self.advance(1)
        self.leave(0)
        self._prompts.forget(0)

    def join(self, texts: Sequence[tuple[int, bytes, Settings]]) -> None:
        """Writes the rows of slots, but for their caches."""
        state, rows, vocab = self._state, self._rows, self.config.vocab
        slots, prompts, settings = zip(*texts, strict=True)
        at = torch.tensor(slots, device=self._at)
        sizes = torch.tensor([len(prompt) for prompt in prompts])
        ends = sizes + torch.tensor([each.max_new_bytes for each in settings])
        uniforms = [random_row(each.seed, each.sample, self._length) for each in settings]
        after = map(state_after, prompts, [each.valid_utf8 for each in settings])
        with inference(self._model):
            shape = (len(texts), self._patch + self._length)
            state.ids[at] = prompt_ids(prompts, vocab, shape, self._patch).to(self._at)
            rows.uniforms[at] = torch.stack(uniforms).to(self._at)
            rows.lengths[at], rows.ends[at] = sizes.to(self._at), ends.to(self._at)
            state.index[at] = (sizes // self._patch * self._patch).to(self._at)
            state.done[at] = True
            state.constraint[at] = torch.tensor(list(after), device=self._at)
        for slot, prompt, each in texts:
            self._settings[slot], self._read[slot] = each, len(prompt)
            self._prompts.join(slot, prompt)

    def read(self, writing: bool) -> bool:
        """One pass over prompts."""
        work = self._prompts.next(GROUP if writing else self._many)
        if work is None:
            return False
        with inference(self._model):
            if work.sources:
                slots, sources = list(work.slots), list(work.sources)
                _put(self._state.cache, tree_map(_rows_at(sources), self._state.cache), slots)
            else:
                self._prefill(work)
            ready = self._prompts.done(work)
            if ready:
                self._state.done[torch.tensor(ready, device=self._at)] = False
            if self._at.type == "cuda":
                torch.cuda.synchronize(self._at)
        return self._prompts.waiting

    def _prefill(self, work: Pass) -> None:
        """Reads a part of the prompts of these slots."""
        model, ids, slots, end = self._model, self._state.ids, list(work.slots), work.size
        if work.start:
            (slot,) = slots
            row = tree_map(_rows_at(slice(slot, slot + 1)), self._state.cache)
            # The ids start with a round of pads, so that this is the round before.
            previous = ids[slot : slot + 1, work.start : work.start + work.size]
            _keep(row, model.prefill_further(previous, row, work.start // self._patch))
            return
        rows = model.init_cache(len(slots), self._length)
        if end:
            rows = model.prefill(ids[slots, self._patch : self._patch + end], rows)
        _put(self._state.cache, rows, slots)

    def leave(self, slot: int) -> None:
        """Frees a slot."""
        with torch.inference_mode():
            self._state.done[slot] = True
        self._settings[slot] = _FREE
        self._prompts.leave(slot)

    def advance(
        self, rounds: int, meanwhile: Callable[[], None] = nothing
    ) -> tuple[list[Written], int]:
        """Writes rounds of every text until all have ended, and waits for them."""
        vocab, busy = self.config.vocab, (~self._state.done).nonzero()[:, 0].tolist()
        meanwhile()
        if not busy:
            return [], 0
        scored = any(self._settings[slot].scores for slot in busy)
        heard: list[Scores] = []

        def observe(logits: Tensor, chosen: Tensor) -> None:
            heard.append(_scores(logits, chosen, vocab))

        first, past = busy[0], busy[-1] + 1
        take, rows = _rows_at(slice(first, past)), self._rows
        pick = partial(self._pick, self._by_sampler(self._settings[first:past]))
        begun, parts = tree_map(take, self._state), (rows.uniforms, rows.lengths, rows.ends)
        uniforms, lengths, row_ends = map(take, parts)
        rows = rows._replace(uniforms=uniforms, lengths=lengths, ends=row_ends)
        with inference(self._model):
            stop = begun.index + rounds * self._patch
            state = append(self._model, rows, stop, begun, None, pick, observe if scored else None)
            done = int((state.rounds - begun.rounds).max())
            start = begun.index.tolist()
            waiting = begun.constraint.where(begun.done, state.constraint)
            state = state._replace(constraint=waiting)
            _keep(begun, state)
            self._state.rounds.zero_()
        index, ended, ends = (each.tolist() for each in (state.index, state.done, row_ends))
        fresh = state.ids[:, self._patch :].cpu().numpy()
        scores = (
            Scores(*(np.stack(part, axis=1) for part in zip(*heard, strict=True)))
            if heard
            else None
        )
        written = []
        for slot in busy:
            row, begin = slot - first, self._read[slot]
            last = max(begin, min(index[row], ends[row]))
            mine = None
            if scores is not None and self._settings[slot].scores:
                at = slice(begin - start[row], last - start[row])
                mine = Scores(*(part[row, at] for part in scores))
            written.append(written_by(slot, fresh[row, begin:last], ended[row], mine, vocab))
            self._read[slot] = last
            if written[-1].end or written[-1].error:
                self.leave(slot)
            if written[-1].error:
                self._prompts.forget(slot)
        return written, done

    def score(self, text: bytes) -> Scores:
        """A full forward pass over the text."""
        return in_own_thread(partial(self._score, text))

    def _score(self, text: bytes) -> Scores:
        ids = prompt_ids([text], self.config.vocab, (1, len(text)), 0).to(self._at)
        with inference(self._model):
            return _scores(self._model(ids)[0], ids[0], self.config.vocab)

    def _by_sampler(self, settings: Sequence[Settings]) -> list[tuple[SamplerConfig, bool, Tensor]]:
        """The samplers, whether the text may end, and the rows that have these."""
        groups: dict[tuple[SamplerConfig, bool], list[int]] = {}
        for row, each in enumerate(settings):
            groups.setdefault((each.sampler, each.stop_at_eos), []).append(row)
        at = self._at
        return [(*key, torch.tensor(rows, device=at)) for key, rows in groups.items()]

    def _pick(
        self, groups: Sequence[tuple[SamplerConfig, bool, Tensor]], logits: Tensor,
        uniforms: Tensor, states: Tensor, left: Tensor, rows: Rows, vocab: ByteVocab,
    ) -> Tensor:  # fmt: skip
        """`pick_ids`, for the rows of each sampler."""
        chosen = torch.empty_like(states)
        for sampler, allow_eos, at in groups:
            mine = rows._replace(sampler=sampler, allowed=self._allowed[allow_eos])
            if len(at) == len(chosen):
                return pick_ids(logits, uniforms, states, left, mine, vocab)
            chosen[at] = pick_ids(logits[at], uniforms[at], states[at], left[at], mine, vocab)
        return chosen

    def _bytes(self, read: int) -> int:
        """Memory for the caches of all slots, and of so many prompts that are read at once."""

        def size(rounds: int) -> int:
            one = tree_leaves(self._model.init_cache(1, rounds * self._patch))
            return sum(each.nbytes for each in one if isinstance(each, Tensor))

        rounds = self._length // self._patch
        few = min(64, rounds // 2)
        row = size(few or rounds)
        if few:  # caches grow evenly, and those of the whole length may not fit into memory
            row += (size(2 * few) - row) * (rounds - few) // few
        return (row + 12 * self._length) * (self.slots + read)


def _rows_at(rows: Any) -> Callable[[Any], Any]:
    """Takes some rows of a tensor; of a slice of rows it is a view."""

    def take(buffer: Any) -> Any:
        return buffer[rows] if isinstance(buffer, Tensor) and buffer.ndim else buffer

    return take


def _keep(views: Any, found: Any) -> None:
    """Writes what was not written in place into the views, from which it was made."""
    for view, new in zip(tree_leaves(views), tree_leaves(found), strict=True):
        if isinstance(view, Tensor) and view.ndim and view is not new:
            view.copy_(new)


def _put(buffers: Any, rows: Any, slots: list[int]) -> None:
    """Writes these rows into the tensors of a tree."""
    for buffer, new in zip(tree_leaves(buffers), tree_leaves(rows), strict=True):
        if isinstance(buffer, Tensor) and buffer.ndim:
            buffer[slots] = new


def _memory(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else host_memory()


def _scores(logits: Tensor, ids: Tensor, vocab: ByteVocab) -> Scores:
    """The logarithm of each id's probability [N], and the most likely candidates."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logs = wide.log_softmax(dim=-1).float()
    mine = logs.gather(-1, ids[:, None])[:, 0]
    columns, low = torch.from_numpy(candidate_columns(vocab)), min(vocab.offset, vocab.eos_id)
    columns = columns.to(logs.device)
    among = logs[:, low : low + len(columns)].masked_fill(columns < 0, -torch.inf)
    values, places = among.topk(TOP, dim=-1)
    return Scores(mine.cpu().numpy(), columns[places].int().cpu().numpy(), values.cpu().numpy())
