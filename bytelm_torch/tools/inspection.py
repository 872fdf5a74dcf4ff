"""`bytelm_torch.inspect`: what a model thinks of a text."""

from typing import Any

import torch

from bytelm.inspection import Inspection, inspection, padded_ids
from bytelm_torch.models.entropy import entropy
from bytelm_torch.models.interface import inference
from bytelm_torch.training.loss import token_nats


def inspect(model: Any, data: bytes) -> Inspection:
    """Surprise and entropy, in bits, of every byte of a text, and where patches start.

    The patches of an entropy model are those that its run was calibrated for (`model.patching`).
    Raises `ValueError` for an empty text, for one that is longer than the model's `longest_input`,
    and for a model that sees the bytes that it would predict.
    """
    ids = torch.from_numpy(padded_ids(model.config, data)).to(model.to_logits.weight.device)
    with inference(model):
        logits = model(ids)
        starts = model.patch_starts(ids)
        nats, expected = token_nats(logits, ids), entropy(logits)
    boundaries = None if starts is None else starts.cpu().numpy()
    return inspection(model, data, nats.cpu().numpy(), expected.cpu().numpy(), boundaries)
