"""Cached decoding of the Byte Latent Transformer: the same logits, one global call per patch."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from bytelm.config import BLTConfig, EntropyConfig
from bytelm.tolerances import LOGITS
from bytelm_torch.models import build_model, patching
from bytelm_torch.models.entropy import segment_starts_of, shift_right
from parity_tests.cases import quick
from parity_tests.patch_thresholds import splitting_threshold

LENGTH = 60

CONFIG = BLTConfig(
    entropy=EntropyConfig(dim=16, layers=1, heads=2, hidden_dim=24, window=8),
    patch_budget=1.0,
    ngram_rows=101,
    local_dim=16,
    local_window=8,
    encoder_heads=2,
    encoder_hidden_dim=20,
    decoder_layers=2,
    decoder_heads=4,
    decoder_kv_heads=2,
    decoder_hidden_dim=24,
    global_dim=24,
    global_layers=2,
    global_heads=2,
    global_hidden_dim=20,
)
CONFIGS = {
    "entropy": CONFIG,
    "entropy, small budget": dataclasses.replace(CONFIG, patch_budget=0.05),
    "space": dataclasses.replace(CONFIG, patcher="space", global_dim=32, ngram_sizes=()),
    "fixed": dataclasses.replace(CONFIG, patcher="fixed", patch_size=5, local_window=0),
}
_LINES: dict[str, Any] = {
    "reset_on": "newline",
    "entropy": dataclasses.replace(CONFIG.entropy, reset_on="newline"),
}
CONFIGS |= {
    "entropy, lines": dataclasses.replace(CONFIG, **_LINES),
    "entropy, lines, small budget": dataclasses.replace(CONFIG, patch_budget=0.05, **_LINES),
    "bytropix, lines": dataclasses.replace(
        CONFIG,
        patcher="histogram",
        threshold=7.0,
        entropy_attention=True,
        positions="sinusoidal",
        **_LINES,
    ),
}


def text_ids() -> torch.Tensor:
    text = "Aé b: 🙂x, 日本 — the end.\n\n  ünd so we go on, and (on) and on … ".encode() * 3
    rows = [text[segment_start : segment_start + LENGTH] for segment_start in (0, 7, 31)]
    return torch.tensor([list(row) for row in rows]) + CONFIG.vocab.offset


def model_of(name: str) -> Any:
    """A random model whose threshold splits the text in patches of several lengths."""
    torch.manual_seed(0)
    model: Any = build_model(CONFIGS[name]).eval()
    if name.startswith("entropy"):
        segment_starts = segment_starts_of(text_ids(), model.config)
        shifted = shift_right(text_ids(), CONFIG.vocab.bos_id, segment_starts)
        entropies = model.entropies(shifted, segment_starts)
        threshold = splitting_threshold(entropies)
        model.config = dataclasses.replace(model.config, threshold=threshold)
    return model


@pytest.mark.parametrize(
    ("name", "rows"),
    quick(
        [(name, rows) for name in CONFIGS for rows in (1, 3)[" lines" in name :]],
        ("space", 1),
        ("entropy, small budget", 3),
        ("entropy, lines", 3),
        ("bytropix, lines", 3),
    ),
)
@torch.no_grad()
def test_forced_rounds_give_the_logits_of_the_whole_pass(name, rows):
    model, ids = model_of(name), text_ids()[:rows]
    config, expected = model.config, model(ids)
    segment_starts = segment_starts_of(ids, config)
    shifted = shift_right(ids, config.vocab.bos_id, segment_starts)
    starts = patching.patch_starts(
        config, shifted, model.entropies(shifted, segment_starts), segment_starts
    )
    counted, capacity = (
        patching.present(shifted, config.vocab, segment_starts),
        config.budget(LENGTH),
    )
    plan = patching.plan_patches(starts, counted, capacity, segment_starts)
    numbers = plan.numbers
    for first, filled in ((0, 0), (17, 40), (40, 40)):
        # What a prefill wrote from `first` on is junk that the rounds must write once more.
        prefix = torch.where(torch.arange(LENGTH) < first, ids, ids.flip(1))[:, :filled]
        cache = model.prefill(prefix, model.init_cache(rows, LENGTH))
        rounds = []
        for index in range(first, LENGTH):

            def choose(logits, i, index=index, rounds=rounds):
                rounds.append(logits)
                return ids[:, index]

            before = ids[:, max(index - 1, 0), None]
            cache, chosen = model.decode_round(cache, before, index, choose)
            assert torch.equal(chosen, ids[:, index : index + 1])
        error = (torch.stack(rounds, dim=1) - expected[:, first:]).norm()
        assert error <= LOGITS["float32"] * expected[:, first:].norm()
        assert torch.equal(cache.patches, numbers)
        ends = (plan.read_of == numbers[:, :-1]) & (numbers[:, :-1] < capacity)
        assert cache.global_calls == ends[:, first:].any(dim=0).sum()
    assert len(set(np.bincount(numbers[0]).tolist())) > 1


def test_the_entropy_model_is_frozen():
    model = model_of("entropy").train()
    assert not model.patcher.training and model.encoder.training
    model(text_ids()).sum().backward()
    for name, parameter in model.named_parameters():
        frozen = name.startswith(CONFIG.frozen_prefixes)
        assert (parameter.grad is None) == frozen, name
