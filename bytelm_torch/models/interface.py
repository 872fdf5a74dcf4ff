"""What training and generation need from every architecture."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from jaxtyping import Bool, Float, Int, Integer
from torch import Tensor, nn

from bytelm.config import PatchingContract

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


class PatchedModel:
    """What every model says about patches; the defaults are for a model without patches."""

    patching: PatchingContract | None = None
    """The contract of the run that the model comes from, if there is one."""

    def patch_starts(self, ids: Integer[Tensor, "B T"]) -> Bool[Tensor, "B T"] | None:
        """Whether a patch starts at each byte; None for a model without patches."""
        return None


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

    def init_cache(self, batch: int, length: int) -> Any:
        """An empty cache for sequences of up to `length` bytes."""
        ...

    def prefill(self, ids: Integer[Tensor, "B T"], cache: Any) -> Any:
        """Writes a prompt, T a multiple of `round_length`, into an empty cache in one pass.

        The prompt may be padded, and decoding continue from its true end: a cache keeps its state
        by position, and later rounds overwrite what the padding left.
        """
        ...

    def decode_round(
        self, cache: Any, previous: Integer[Tensor, "B P"], index: int, choose: Choose
    ) -> tuple[Any, Int[Tensor, "B P"]]:
        """Appends round number `index`; `previous` holds the round before it (pads at first)."""
        ...
