"""The Byte Latent Transformer and its entropy model: JAX = torch, causality, rows, buckets."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from bytelm.config import BlockConfig, BLTConfig, EntropyConfig, ModelConfig
from bytelm.tolerances import GRADIENTS, LOGITS, OTHER_PLACE
from bytelm_jax.interop.convert import to_torch
from bytelm_jax.models import Params, abstract_params, define_model, patching
from bytelm_jax.models.entropy import shift_right
from bytelm_jax.parity.twins import make_twin
from bytelm_jax.training.loss import cross_entropy
from bytelm_torch.training import loss as torch_loss
from parity_tests.cases import quick
from parity_tests.twins import random_ids

LENGTH = 29

# Grouped heads, windows shorter than the text, unequal widths, two hash functions in odd order.
TINY = BLTConfig(
    entropy=EntropyConfig(
        dim=16, layers=2, heads=4, kv_heads=2, hidden_dim=24, window=8, dropout=0.0
    ),
    threshold=4.55,
    patch_size=3,
    patch_budget=1.0,
    ngram_sizes=(4, 3),
    ngram_functions=2,
    ngram_rows=101,
    local_dim=16,
    local_window=8,
    encoder_layers=2,
    encoder_heads=2,
    encoder_hidden_dim=20,
    decoder_layers=2,
    decoder_heads=4,
    decoder_kv_heads=2,
    decoder_hidden_dim=24,
    global_dim=24,
    global_layers=2,
    global_heads=6,
    global_kv_heads=3,
    global_hidden_dim=20,
)
SMALL = dataclasses.replace(TINY, encoder_layers=1, decoder_layers=1, global_layers=1)
CONFIGS: dict[str, ModelConfig] = {
    "entropy": TINY,
    "space": dataclasses.replace(
        SMALL,
        patcher="space",
        patch_queries=1,
        global_dim=16,
        global_heads=4,
        global_kv_heads=0,
        entropy_attention=True,
    ),
    "fixed": dataclasses.replace(
        SMALL,
        patcher="fixed",
        patch_queries=4,
        ngram_sizes=(),
        global_block=BlockConfig(
            norm="after",
            qk_norm="projection",
            bias="all",
            final_norm=True,
            rope_scaling="llama3",
            rope_length=16,
        ),
    ),
    "byte": dataclasses.replace(
        SMALL,
        patcher="byte",
        local_window=0,
        global_dim=32,
        global_heads=4,
        global_kv_heads=0,
        global_block=BlockConfig(
            head_dim=6,
            norm_eps=1e-3,
            qk_norm="head",
            bias="qkv",
            rope_theta=100.0,
            rope_scaling="linear",
            rope_factor=3.0,
        ),
    ),
    "bytropix": dataclasses.replace(
        SMALL,
        patcher="histogram",
        threshold=7.0,
        ngram_combine="mean",
        feedforward="spline",
        entropy_attention=True,
        positions="sinusoidal",
    ),
    "model": TINY.entropy,
}
_TINY_ENTROPY = EntropyConfig(dim=8, layers=1, heads=2, hidden_dim=8)
TINY_MODELS: dict[str, ModelConfig] = {
    "blt": BLTConfig(
        entropy=_TINY_ENTROPY,
        threshold=5.4,
        ngram_rows=50,
        local_dim=8,
        encoder_heads=2,
        encoder_hidden_dim=8,
        decoder_layers=1,
        decoder_heads=2,
        decoder_hidden_dim=8,
        global_dim=16,
        global_layers=1,
        global_heads=2,
        global_hidden_dim=8,
        global_block=BlockConfig(head_dim=6, qk_norm="head", bias="qkv", final_norm=True),
    ),
    "entropy": _TINY_ENTROPY,
}
PATCHERS = ("entropy", "space", "fixed", "byte", "bytropix")


def text_ids(config: ModelConfig, rows: int, length: int) -> np.ndarray:
    """Words and characters of several bytes, so that every patcher finds something to do."""
    text = "The café, naïve — 日本 and 🙂: 12 x\n\n  y. Over (again) and again; ünd so.".encode()
    data = np.frombuffer(text * (rows * length // len(text) + 2), np.uint8)
    starts = np.random.default_rng(rows).integers(0, len(text), rows)
    ids = np.stack(
        [data[segment_start : segment_start + length] for segment_start in starts]
    ).astype(np.int32)
    return ids + np.int32(config.vocab.offset)


def random_leaves(config: ModelConfig, dtype: str) -> Params:
    """Random parameters, norms included; no compiled initialisation, which takes seconds."""
    source, leaves = np.random.default_rng(0), {}
    for name, leaf in sorted(abstract_params(config).items()):
        scale = 0.1 if leaf.ndim == 1 else 1.5 * leaf.shape[name.endswith("embedding")] ** -0.5
        value = scale * source.standard_normal(leaf.shape) + (leaf.ndim == 1)
        leaves[name] = jnp.asarray(value, dtype)
    return leaves


@functools.cache
def tiny(name: str, dtype: str = "float64") -> tuple[ModelConfig, Params, Any]:
    """Config, parameters and torch twin of one of `CONFIGS`."""
    config = CONFIGS[name]
    with jax.enable_x64(dtype == "float64"):
        params = random_leaves(config, dtype)
        return config, params, make_twin(config, params)


@functools.cache
def forward(config: ModelConfig) -> Any:
    """The compiled outputs of a model."""
    bind, _ = define_model(config)
    return jax.jit(lambda params, ids: bind(params).outputs(ids))


@functools.cache
def gradient(config: ModelConfig) -> Any:
    bind, _ = define_model(config)

    def loss(params: Params, ids: Any) -> Any:
        nats, count = cross_entropy(bind(params)(ids), ids, config.vocab.pad_id)
        return nats.sum() / count.sum()

    return jax.jit(jax.value_and_grad(loss))


def relative(ours: Any, theirs: Any) -> float:
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return float(np.linalg.norm(ours - theirs) / (np.linalg.norm(theirs) or 1.0))


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, "float64") for name in CONFIGS), ("entropy", "float32")]
)
def test_logits_and_metrics_equal_torch(name, dtype):
    with jax.enable_x64(dtype == "float64"):
        config, params, twin = tiny(name, dtype)
        ids = text_ids(config, 3, LENGTH)
        ids[2, 20:] = config.vocab.pad_id
        ours = forward(config)(params, ids)
        theirs = twin.outputs(torch.from_numpy(ids).long())
    assert relative(ours.logits, theirs.logits.detach()) <= LOGITS[dtype]
    assert ours.logits.dtype == dtype and np.isfinite(ours.logits).all()
    for key, value in ours.metrics.items():
        assert relative(value, theirs.metrics[key]) <= LOGITS[dtype], key
    if name in PATCHERS:
        assert (ours.metrics["patch_length"] > 1).any() or name == "byte"
        assert (ours.metrics["patch_overflow"] == 0).all()


@pytest.mark.parametrize("name", quick(CONFIGS, "entropy", "space", "bytropix"))
def test_every_gradient_equals_torch(name, x64):
    config, params, twin = tiny(name)
    ids = text_ids(config, 3, LENGTH)
    loss, gradients = gradient(config)(params, ids)
    twin.zero_grad()
    tensor = torch.from_numpy(ids).long()
    nats, count = torch_loss.cross_entropy(twin(tensor), tensor, config.vocab.pad_id)
    theirs = nats.sum() / count.sum()
    theirs.backward()
    assert relative(loss, theirs.detach()) <= LOGITS["float64"]
    converted = to_torch(gradients)
    for key, parameter in twin.named_parameters():
        if key.startswith(config.frozen_prefixes):
            assert parameter.grad is None and (converted[key] == 0).all(), key
            continue
        # One vector per patch, or one byte, leaves a softmax nothing to weigh.
        assert name in ("space", "byte") or np.abs(converted[key]).max() > 0, f"{key} takes no part"
        assert relative(converted[key], parameter.grad) <= GRADIENTS["float64"], key


@pytest.mark.parametrize("name", CONFIGS)
def test_a_changed_future_changes_nothing(name, x64):
    config, params, _ = tiny(name)
    ids, run = text_ids(config, 3, LENGTH), forward(config)
    base = np.asarray(run(params, ids).logits)
    rng = np.random.default_rng(0)
    for t in [*range(0, LENGTH, 3), LENGTH - 1]:
        changed = ids.copy()
        changed[:, t:] = rng.integers(0, config.vocab.size, changed[:, t:].shape)
        changed[0, t:] = config.vocab.pad_id
        actual = np.asarray(run(params, changed).logits)
        np.testing.assert_array_equal(actual[:, : t + 1], base[:, : t + 1])


@pytest.mark.parametrize("name", CONFIGS)
def test_rows_are_independent(name, x64):
    config, params, _ = tiny(name)
    run, ids = forward(config), text_ids(config, 3, LENGTH)
    base = np.asarray(run(params, ids).logits)
    permuted = run(params, ids[::-1].copy()).logits
    assert relative(permuted, base[::-1]) <= OTHER_PLACE["float64"]
    changed = random_ids(config, 3, LENGTH)
    changed[1] = ids[1]
    changed[2, 5:] = config.vocab.pad_id
    np.testing.assert_array_equal(np.asarray(run(params, changed).logits)[1], base[1])


@pytest.mark.parametrize("name", ["entropy", "space", "model"])
def test_another_batch_length_and_bucket_give_the_same_logits(name, x64):
    config, params, _ = tiny(name)
    run, ids = forward(config), text_ids(config, 2, 23)
    padded = np.full((3, LENGTH), config.vocab.pad_id, np.int32)
    padded[:2, :23] = ids
    whole = np.asarray(run(params, padded).logits)[:2, :23]
    assert relative(run(params, ids).logits, whole) <= OTHER_PLACE["float64"]


def test_the_budget_changes_nothing_until_it_overflows(x64):
    config: Any
    config, params, _ = tiny("entropy")
    ids = text_ids(config, 2, LENGTH)
    full = forward(config)(params, ids)
    bind, _ = define_model(config)

    @jax.jit
    def find(params: Params, ids: Any) -> Any:
        shifted = shift_right(ids, config.vocab.bos_id)
        return patching.patch_starts(config, shifted, bind(params).entropies(shifted))

    starts = find(params, jnp.asarray(ids))
    needed = int(starts.sum(axis=1).max()) - 1
    assert 8 < needed < LENGTH - 2

    def with_room(rate: float) -> Any:
        cut = dataclasses.replace(config, patch_budget=rate)
        return cut.budget(LENGTH), forward(cut)(params, ids)

    capacity, exact = with_room((needed - 8) / LENGTH)
    assert capacity == needed and (exact.metrics["patch_overflow"] == 0).all()
    assert relative(exact.logits, full.logits) <= OTHER_PLACE["float64"]
    capacity, short = with_room((needed - 10) / LENGTH)
    lost = np.maximum(np.asarray(starts).sum(axis=1) - 1 - capacity, 0)
    np.testing.assert_array_equal(short.metrics["patch_overflow"], lost)
    assert lost.max() == 2 and relative(short.logits, full.logits) > OTHER_PLACE["float64"]


@pytest.mark.parametrize("length", [0, 1, 2])
def test_shortest_texts(length, x64):
    config, params, twin = tiny("space")
    ids = text_ids(config, 2, length)
    ours = forward(config)(params, ids)
    theirs = twin.outputs(torch.from_numpy(ids).long())
    assert ours.logits.shape == (2, length, config.vocab.size)
    assert relative(ours.logits, theirs.logits.detach()) <= LOGITS["float64"]


def test_ids_outside_the_vocabulary_raise():
    config, params, _ = tiny("space", "float32")
    bind, _ = define_model(config)
    with pytest.raises(ValueError, match="ids: 260 is outside the vocabulary"):
        bind(params)(jnp.full((1, 3), 260, jnp.int32))
