"""Continuous batching: texts that join and leave a batch of one shape between short advances.

The mirror of `bytelm_jax/inference/slots.py`, without compiled programs. Axes: B slots, C bytes of
the longest text, P bytes per round, K likely bytes that are reported.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from bytelm.config import ByteVocab, require
from bytelm.memory import host_memory
from bytelm.sampling import SamplerConfig, require_sampled
from bytelm.serving.engine import (
    TOP,
    Scores,
    Settings,
    Written,
    both_constraints,
    nothing,
    state_after,
)
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
        size, memory = self._bytes(), _memory(self._at)
        require(
            size <= memory,
            f"slots={slots}: caches of {slots} texts of {self._length} bytes take "
            f"{size / 2**30:.1f} GiB, more than there is; give fewer slots or shorter texts",
        )
        vocab, constraints = self.config.vocab, both_constraints()
        self._allowed = {
            allow_eos: torch.from_numpy(allowed_candidates(constraints, vocab, allow_eos)).to(
                self._at
            )
            for allow_eos in (True, False)
        }
        self._settings = [_FREE] * slots
        self._read = [0] * slots
        self._last: tuple[bytes, Any, Tensor] | None = None
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
        self.join(0, b"\0" * (self._patch + 1), replace(_FREE, max_new_bytes=1))
        self.advance(1)
        self.leave(0)
        self._last = None

    def join(self, slot: int, prompt: bytes, settings: Settings) -> None:
        """Reads the prompt, unless the last one to join was the same, and writes the slot's row."""
        state, rows, size = self._state, self._rows, len(prompt)
        with inference(self._model):
            cache, ids = self._prefilled(prompt)
            for buffer, row in zip(tree_leaves(state.cache), tree_leaves(cache), strict=True):
                if isinstance(buffer, Tensor) and buffer.ndim:
                    buffer[slot] = row[0]
            state.ids[slot] = ids[0]
            uniforms = random_row(settings.seed, settings.sample, self._length)
            rows.uniforms[slot] = uniforms.to(self._at)
            rows.lengths[slot], rows.ends[slot] = size, size + settings.max_new_bytes
            state.index[slot] = size // self._patch * self._patch
            state.done[slot] = False
            state.constraint[slot] = state_after(prompt, settings.valid_utf8)
        self._settings[slot], self._read[slot] = settings, size

    def leave(self, slot: int) -> None:
        """Frees a slot."""
        with torch.inference_mode():
            self._state.done[slot] = True
        self._settings[slot] = _FREE

    def advance(
        self, rounds: int, meanwhile: Callable[[], None] = nothing
    ) -> tuple[list[Written], int]:
        """Writes rounds of every text until all have ended, and waits for them."""
        vocab, begun = self.config.vocab, self._state
        busy = (~begun.done).nonzero()[:, 0].tolist()
        scored = any(self._settings[slot].scores for slot in busy)
        heard: list[Scores] = []
        meanwhile()

        def observe(logits: Tensor, chosen: Tensor) -> None:
            heard.append(_scores(logits, chosen, vocab))

        with inference(self._model):
            stop, count = begun.index + rounds * self._patch, begun.rounds
            state = append(
                self._model, self._rows, stop, begun, None, self._pick, observe if scored else None
            )
            done = int((state.rounds - count).max())
            # In place: `join` and `leave` write into these tensors.
            self._state = state._replace(rounds=torch.zeros_like(count))
        start, index, ended = (each.tolist() for each in (begun.index, state.index, state.done))
        ends = self._rows.ends.tolist()
        scores = (
            Scores(*(np.stack(part, axis=1) for part in zip(*heard, strict=True)))
            if heard
            else None
        )
        written = []
        for slot in busy:
            first, last = self._read[slot], min(index[slot], ends[slot])
            ids = state.ids[slot, self._patch + first : self._patch + last].tolist()
            mine = None
            if scores is not None and self._settings[slot].scores:
                at = slice(first - start[slot], max(first, last) - start[slot])
                mine = Scores(*(part[slot, at] for part in scores))
            written.append(self._written(slot, ids, ended[slot], mine))
            self._read[slot] = max(first, last)
            if written[-1].end or written[-1].error:
                self.leave(slot)
        return written, done

    def score(self, text: bytes) -> Scores:
        """A full forward pass over the text."""
        ids = prompt_ids([text], self.config.vocab, (1, len(text)), 0).to(self._at)
        with inference(self._model):
            return _scores(self._model(ids)[0], ids[0], self.config.vocab)

    def _written(self, slot: int, ids: list[int], done: bool, scores: Scores | None) -> Written:
        """The new bytes of a row, up to its end of sequence."""
        vocab = self.config.vocab
        count = ids.index(vocab.eos_id) if vocab.eos_id in ids else len(ids)
        why = ("eos" if count < len(ids) else "length") if done else None
        try:
            require_sampled(ids[:count], vocab)
        except ValueError as error:
            return Written(slot, b"", None, None, str(error))
        data = bytes(each - vocab.offset for each in ids[:count])
        return Written(slot, data, None if scores is None else scores.cut(0, count), why)

    def _pick(
        self, logits: Tensor, uniforms: Tensor, states: Tensor, left: Tensor, rows: Rows,
        vocab: ByteVocab,
    ) -> Tensor:  # fmt: skip
        """`pick_ids`, for the rows of each sampler."""
        groups: dict[tuple[SamplerConfig, bool], list[int]] = {}
        for slot, each in enumerate(self._settings):
            groups.setdefault((each.sampler, each.stop_at_eos), []).append(slot)
        chosen = torch.empty_like(states)
        for (sampler, allow_eos), slots in groups.items():
            at = torch.tensor(slots, device=states.device)
            mine = rows._replace(sampler=sampler, allowed=self._allowed[allow_eos])
            chosen[at] = pick_ids(logits[at], uniforms[at], states[at], left[at], mine, vocab)
        return chosen

    def _prefilled(self, prompt: bytes) -> tuple[Any, Tensor]:
        """One row's cache and ids, with the prompt."""
        if self._last is not None and self._last[0] == prompt:
            return self._last[1:]
        patch = self._patch
        ids = prompt_ids([prompt], self.config.vocab, (1, patch + self._length), patch)
        ids = ids.to(self._at)
        cache, size = self._model.init_cache(1, self._length), len(prompt) // patch * patch
        if size:
            cache = self._model.prefill(ids[:, patch : patch + size], cache)
        self._last = (prompt, cache, ids)
        return self._last[1:]

    def _bytes(self) -> int:
        """Memory for the caches of all slots, and of one more."""
        one = tree_leaves(self._model.init_cache(1, self._length))
        row = sum(each.nbytes for each in one if isinstance(each, Tensor)) + 12 * self._length
        return row * (self.slots + 1)


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
