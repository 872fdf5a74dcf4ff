"""What training and generation need from every architecture."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, cast

import torch
from jaxtyping import Bool, Float, Int, Integer
from torch import Tensor, nn

from bytelm.config import PatchingContract
from bytelm.lora import LoRA
from bytelm_torch.layers.caches import Index, read_at, write_at
from bytelm_torch.layers.ids import as_ids

Choose = Callable[[Tensor, int], Tensor]
"""`choose(logits [B, V], i) -> ids [B]`: chooses byte number i of the current round."""


class ModelOutput(NamedTuple):
    """The result of `model.outputs(ids, remat)`; `model(...)` returns its logits alone.

    Everything but the logits is one value per row, so that data parallelism averages it exactly.
    """

    logits: Float[Tensor, "B T V"]
    extra_loss: Float[Tensor, " B"]
    """Averaged over the rows and added to the mean cross-entropy: nats, coefficient included."""
    metrics: dict[str, Float[Tensor, " B"]]
    """Statistics for the training log, averaged over the rows."""


class ByteModel:
    """What every model has unless it says otherwise: no patches, and decoding without a cache.

    Its decoding (see `Decoder`) takes a full forward pass for every byte, so that a causal model
    generates before it has cached decoding. What it passes on as a cache are a pad and the ids.
    """

    config: Any
    patching: PatchingContract | None = None
    """The contract of the run that the model comes from, if there is one."""
    training_length: int = 0
    """The bytes of the windows on which the model was trained; 0 if that is not known."""
    lora: LoRA | None = None
    """The low-rank adapters that the model trains, if it has any."""

    def patch_starts(self, ids: Integer[Tensor, "B T"]) -> Bool[Tensor, "B T"] | None:
        """Whether a patch starts at each byte; None for a model without patches."""
        return None

    @property
    def has_cached_decoding(self) -> bool:
        """Whether the model decodes from a cache of its own."""
        return type(self).extend is not ByteModel.extend

    @property
    def round_length(self) -> int:
        """Bytes that one call of `decode_round` appends."""
        return 1

    def init_cache(self, batch: int, length: int, by_byte: bool = False) -> Any:
        """Room for the ids of sequences of up to `length` bytes."""
        model: Any = self
        device = next(model.parameters()).device
        return torch.full((batch, 1 + length), self.config.vocab.pad_id, device=device)

    def prefill(self, ids: Integer[Tensor, "B T"], cache: Any) -> Any:
        """Writes a prompt, which may be padded: later rounds overwrite the padding."""
        return write_at(cache, ids, 1)

    @property
    def prefills_in_parts(self) -> bool:
        """Whether `prefill_further` takes less work than `prefill` of everything again."""
        return True

    def prefill_further(self, previous: Integer[Tensor, "B T"], cache: Any, index: Index) -> Any:
        """Writes T more bytes of a prompt; `previous` holds the byte before each of them."""
        if not self.has_cached_decoding:
            return write_at(cache, previous, index)
        return self.extend(previous, cache, index)[1]

    def extend(
        self, before: Integer[Tensor, "B T"], cache: Any, index: Index
    ) -> tuple[Float[Tensor, "B T V"], Any]:
        """Logits of T bytes of each row, which no id from there on changes, and the new cache."""
        count, model = before.shape[1], cast(Any, self)
        cache = write_at(cache, before, index)
        known = cache[:, 1 : index + count + 1] if isinstance(index, int) else cache[:, 1:]
        return read_at(model(known), index, count), cache

    def verify(
        self, before: Integer[Tensor, "B T"], cache: Any, index: Index
    ) -> tuple[Float[Tensor, "B T V"], Any, Int[Tensor, " B"]]:
        """`extend` for drafts; also gives how many of each row's logits hold, at least 1."""
        logits, cache = self.extend(before, cache, index)
        return logits, cache, torch.full((len(before),), before.shape[1], device=logits.device)

    def decode_round(
        self, cache: Any, previous: Integer[Tensor, "B P"], index: Index, choose: Choose
    ) -> tuple[Any, Int[Tensor, "B P"]]:
        """Appends byte number `index`, of all rows or of each; `previous` is the byte before it.

        `choose(logits [B, V], 0)` gives its ids [B].
        """
        logits, cache = self.extend(previous, cache, index)
        return cache, as_ids(choose(logits[:, 0], 0))[:, None]

    def start_round(
        self, cache: Any, previous: Integer[Tensor, "B P"], index: Index
    ) -> tuple[Any, Any, Int[Tensor, " B"]]:
        """The part of `decode_round` before its first byte: the cache, the round, a first `before`.

        `round_logits` takes the round byte by byte, for callers that choose elsewhere.
        """
        heard: list[Tensor] = []
        before = as_ids(previous)[:, -1]

        def choose(logits: Tensor, i: int) -> Tensor:
            heard.append(logits)
            return before

        cache, _ = self.decode_round(cache, previous, index, choose)
        if len(heard) != 1:
            raise NotImplementedError(f"{type(self).__name__}.start_round: rounds of several bytes")
        return cache, heard[0], before

    def round_logits(
        self, state: Any, before: Int[Tensor, " B"], i: int
    ) -> tuple[Float[Tensor, "B V"], Any]:
        """The logits of a round's byte number i, and the round with `before`, the byte before it.

        For i = 0, `before` is the one that `start_round` gave.
        """
        return state, state


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Inference mode, no dropout; afterwards every module trains, or does not, as before."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, training in modes:
            module.training = training


class Decoder(Protocol):
    """Cached decoding. A round appends `round_length` bytes; caches are passed in and returned."""

    @property
    def round_length(self) -> int:
        """Bytes that one call of `decode_round` appends."""
        ...

    def init_cache(self, batch: int, length: int, by_byte: bool = False) -> Any:
        """An empty cache for sequences of up to `length` bytes.

        Only one made `by_byte` serves `extend` where a round is several bytes.
        """
        ...

    @property
    def prefills_in_parts(self) -> bool:
        """Whether `prefill_further` takes less work than `prefill` of everything again."""
        ...

    def prefill(self, ids: Integer[Tensor, "B T"], cache: Any) -> Any:
        """Writes a prompt, T a multiple of `round_length`, into an empty cache in one pass.

        The prompt may be padded, and decoding continue from its true end: a cache keeps its state
        by position, and later rounds overwrite what the padding left.
        """
        ...

    def prefill_further(self, previous: Integer[Tensor, "B T"], cache: Any, index: Index) -> Any:
        """Writes more of a prompt, from round number `index` on, of all rows or of each.

        `previous` holds the T bytes that lie a round before them (pads at first); T is a multiple
        of `round_length`. What follows the prompt's true end is overwritten later, as in `prefill`.
        """
        ...

    def decode_round(
        self, cache: Any, previous: Integer[Tensor, "B P"], index: Index, choose: Choose
    ) -> tuple[Any, Int[Tensor, "B P"]]:
        """Appends round number `index`, of all rows or of each.

        `previous` holds the round before it (pads at first).
        """
        ...

    def extend(
        self, before: Integer[Tensor, "B T"], cache: Any, index: Index
    ) -> tuple[Float[Tensor, "B T V"], Any]:
        """Logits of T bytes of each row, from byte number `index` on; also gives the new cache.

        `before` holds the byte before each of them (anything before the first). All that is
        kept by position, so a caller may go back to an earlier index: what was written from there
        on is overwritten before it is read.
        """
        ...

    def verify(
        self, before: Integer[Tensor, "B T"], cache: Any, index: Index
    ) -> tuple[Float[Tensor, "B T V"], Any, Int[Tensor, " B"]]:
        """`extend` for drafts; also gives how many of each row's logits hold, at least 1.

        A model may stop where more bytes would cost more than they are worth.
        """
        ...

    def start_round(
        self, cache: Any, previous: Integer[Tensor, "B P"], index: Index
    ) -> tuple[Any, Any, Int[Tensor, " B"]]:
        """The part of `decode_round` before its first byte: the cache, the round, a first `before`.

        `ByteModel` has it for rounds of one byte.
        """
        ...

    def round_logits(
        self, state: Any, before: Int[Tensor, " B"], i: int
    ) -> tuple[Float[Tensor, "B V"], Any]:
        """The logits of a round's byte number i, after the byte `before`, and the round with it."""
        ...
