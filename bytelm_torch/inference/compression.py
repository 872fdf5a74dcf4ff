"""A model as the predictor of `bytelm.compression`: steps of cached decoding at one shape.

The mirror of `bytelm_jax/inference/compression.py`.
Axes: S streams, P bytes per round, V vocabulary, W bytes per window.
"""

from functools import partial
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

import bytelm
from bytelm.compression.codec import Place, check_model
from bytelm.compression.coder import ONE
from bytelm.compression.container import DIGEST_BYTES, short
from bytelm.compression.machine import instruction_set
from bytelm.config import ByteVocab, to_dict
from bytelm.export import sum_of_json
from bytelm_torch.models.interface import inference


def compression_place(model: Any) -> Place:
    """Where this process compresses with `model`; raises `ValueError` if it cannot predict."""
    check_model(model.config)
    device = next(model.parameters()).device
    return Place(partial(describe_machine, device), partial(TorchPredictor, model))


def describe_machine(device: torch.device) -> dict[str, str]:
    """All that torch's arithmetic on `device` depends on beside the program itself."""
    machine = {"backend": f"torch {torch.__version__}", "bytelm": bytelm.__version__}
    precision = torch.get_float32_matmul_precision()
    if device.type == "cpu":
        machine |= {"device": "cpu", "cpu": instruction_set()}
        kernels = torch.backends.cpu.get_cpu_capability()
        machine |= {"threads": str(torch.get_num_threads()), "kernels": kernels}
    else:
        machine["device"] = short(torch.cuda.get_device_name(device))
        machine["platform"] = f"cuda {torch.version.cuda} cudnn {torch.backends.cudnn.version()}"
    return machine | {"settings": f"{precision}, {torch.are_deterministic_algorithms_enabled()}"}


class TorchPredictor:
    """`bytelm.compression.codec.Predictor` of a model, for S streams of windows of W bytes."""

    def __init__(self, model: Any, streams: int, window: int) -> None:
        check_model(model.config, window)
        self._model, self._vocab = model, model.config.vocab
        self._shape, self._patch = (streams, window), model.round_length
        self._device = next(model.parameters()).device
        self._cache: Any = None
        self._round: Any = None
        self._previous = torch.zeros((streams, self._patch), dtype=torch.int64)
        self._position = 0

    @property
    def model_digest(self) -> bytes:
        """Of the configuration and of every parameter's bits."""
        digest = blake2b(
            sum_of_json(to_dict(self._model.config)).encode(), digest_size=DIGEST_BYTES
        )
        for name, value in sorted(self._model.state_dict().items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(flat.numpy().data)
        return digest.digest()

    def restart(self) -> None:
        """Begins a new window in every stream."""
        with inference(self._model):
            self._cache = self._model.init_cache(*self._shape)
        shape = (self._shape[0], self._patch)
        self._previous = torch.full(shape, self._vocab.pad_id, device=self._device)
        self._position = 0

    def advance(self, before: np.ndarray) -> np.ndarray:
        """Cumulative counts uint32[S, 256] of the next byte; `before` uint8[S] is the last one."""
        index, i = divmod(self._position, self._patch)
        ids = torch.from_numpy(before.astype(np.int64) + self._vocab.offset).to(self._device)
        if self._position:
            self._previous[:, i - 1] = ids
        self._position += 1
        with inference(self._model):
            if i == 0:
                start = self._model.start_round(self._cache, self._previous, index)
                self._cache, self._round, ids = start
            logits, self._round = self._model.round_logits(self._round, ids, i)
            return _counts(logits, self._vocab).cpu().numpy().astype(np.uint32)


def _counts(logits: Float[Tensor, "S V"], vocab: ByteVocab) -> Int[Tensor, "S 256"]:
    """Cumulative integer frequencies of the 256 bytes, each at least 1; zeros if not finite."""
    shares = logits.float().softmax(dim=-1)[:, vocab.offset : vocab.offset + 256]
    finite = shares.isfinite().all(dim=-1, keepdim=True)
    counts = (shares.nan_to_num() * ONE).floor().long() + 1
    return torch.where(finite, counts.cumsum(dim=-1), 0)
