"""The names of the LFByteTransformer project: the model, its checkpoints, text from it."""

from pathlib import Path
from typing import Any

import torch

from bytelm.config import LFByteConfig
from bytelm_torch.inference import generate
from bytelm_torch.models.lfbyte import LFByteTransformer as _Model


class LFByteTransformer(_Model):
    """The model by the original's arguments and defaults."""

    def __init__(
        self,
        embed_dim: int = 512,
        num_layers: int = 8,
        adapt_dim: int = 512,
        num_experts: int = 4,
        dropout: float = 0.1,
    ):
        super().__init__(
            LFByteConfig(
                embed_dim=embed_dim,
                num_layers=num_layers,
                adapt_dim=adapt_dim,
                num_experts=num_experts,
                dropout=dropout,
            )
        )


def save_checkpoint(
    path: str | Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, epoch: int
) -> None:
    """Writes `model_state_dict`, `optimizer_state_dict` and `epoch` for `torch.load`."""
    state: dict[str, Any] = {"epoch": epoch, "model_state_dict": model.state_dict()}
    torch.save({**state, "optimizer_state_dict": optimizer.state_dict()}, path)


def generate_text(
    model: LFByteTransformer,
    start_sequence: str,
    max_length: int = 100,
    temperature: float = 1.0,
    seed: int = 0,
) -> str:
    """`start_sequence` and up to `max_length` more bytes."""
    start = start_sequence.encode("utf-8", "surrogateescape")
    sampler = generate.SamplerConfig(temperature=temperature)
    made = generate.generate(model, [start], max_length, sampler, seed)[0]
    return (start + made).decode("utf-8", "replace")
