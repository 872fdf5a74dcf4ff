"""A model as `bytelm.harness` asks for it."""

import functools
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int32

from bytelm.harness import Place
from bytelm_torch.inference.generate import generate
from bytelm_torch.models.interface import inference
from bytelm_torch.training.loss import token_nats


def harness_place(model: Any) -> Place:
    """Scores and continues texts with `model`, on its device."""
    device = model.to_logits.weight.device

    def scored(
        ids: Int32[np.ndarray, "B T"],
    ) -> tuple[Float[np.ndarray, "B T"], Bool[np.ndarray, "B T"]]:
        rows = torch.from_numpy(ids).to(device)
        with inference(model):
            logits = model(rows)
            nats, best = token_nats(logits, rows), logits.argmax(dim=-1) == rows
        return nats.cpu().numpy(), best.cpu().numpy()

    return Place(model.config, scored, functools.partial(generate, model))
