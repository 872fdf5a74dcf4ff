"""Cached decoding of the Byte Latent Transformer, and its window in chunks."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from bytelm.config import BLTConfig, EntropyConfig
from bytelm.tolerances import GRADIENTS, LOGITS
from bytelm_jax.kernels.backend import pretend_platform
from bytelm_jax.kernels.decoding import attend_once
from bytelm_jax.kernels.segment_sum import ordered_segment_sum
from bytelm_jax.layers.cross_attention import CrossAttention
from bytelm_jax.layers.grouped_attention import causal_attention, grouped_attention
from bytelm_jax.layers.segments import segment_max, take_segments
from bytelm_jax.models import Params, abstract_params, define_model, patching, split_model
from parity_tests.cases import quick

LENGTH, ROWS = 80, 3

CONFIG = BLTConfig(
    entropy=EntropyConfig(dim=16, layers=1, heads=2, hidden_dim=24, window=8),
    threshold=4.637,
    patch_budget=1.0,
    ngram_sizes=(4, 3),
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
    "bytropix": dataclasses.replace(
        CONFIG,
        patcher="histogram",
        threshold=7.0,
        ngram_combine="mean",
        feedforward="spline",
        entropy_attention=True,
        positions="sinusoidal",
    ),
}
VOCAB = CONFIG.vocab


@functools.cache
def model_of(name: str) -> tuple[BLTConfig, Params, Any]:
    """Config, random parameters and `bind`. The text sways between letters and separators."""
    config, source, params = CONFIGS[name], np.random.default_rng(0), {}
    for key, leaf in sorted(abstract_params(config).items()):
        scale = 0.1 if leaf.ndim == 1 else 1.5 * leaf.shape[key.endswith("embedding")] ** -0.5
        value = scale * source.standard_normal(leaf.shape) + (leaf.ndim == 1)
        params[key] = jnp.asarray(value, jnp.float32)
    return config, params, define_model(config)[0]


def prompts() -> np.ndarray:
    """ids [B, L]: words, separators and characters of two to four bytes."""
    text = "Aé b: 🙂x, 日本 — the end.\n\n  ünd so we go on, and (on) and on … ".encode() * 3
    rows = [text[segment_start : segment_start + LENGTH] for segment_start in (0, 7, 31)]
    return np.array([list(row) for row in rows], np.int32) + VOCAB.offset


@functools.cache
def programs(name: str) -> tuple[Any, Any, Any]:
    """(whole forward pass, prefill, loop over rounds); rounds are one program for all lengths."""
    config, _, bind = model_of(name)

    @jax.jit
    def whole(params: Params, ids: Any) -> Any:
        model = bind(params)
        shifted = jnp.pad(ids, ((0, 0), (1, 0)), constant_values=VOCAB.bos_id)[:, :-1]
        starts = patching.patch_starts(config, shifted, model.entropies(shifted))
        return model(ids), starts

    @jax.jit
    def prefill(params: Params, ids: Any) -> Any:
        model = bind(params)
        return model.prefill(ids, model.init_cache(ROWS, LENGTH))

    @jax.jit
    def decode(params: Params, cache: Any, ids: Any, first: Any, last: Any, lengths: Any) -> Any:
        """Rounds `first` to `last`; a row takes its own ids up to its length, then likely ones."""
        model = bind(params)

        def body(index: Any, carry: Any) -> Any:
            cache, ids, logits = carry
            previous = jax.lax.dynamic_slice_in_dim(ids, jnp.maximum(index - 1, 0), 1, axis=1)
            forced = jax.lax.dynamic_index_in_dim(ids, index, axis=1, keepdims=False)
            seen = []

            def choose(row: Any, i: int) -> Any:
                seen.append(row)
                return jnp.where(index < lengths, forced, greedy(row))

            cache, chosen = model.decode_round(cache, previous, index, choose)
            ids = jax.lax.dynamic_update_slice_in_dim(ids, chosen, index, axis=1)
            logits = jax.lax.dynamic_update_slice_in_dim(logits, seen[0][:, None], index, axis=1)
            return cache, ids, logits

        logits = jnp.zeros((ROWS, LENGTH, VOCAB.size))
        return jax.lax.fori_loop(first, last, body, (cache, ids, logits))

    return whole, prefill, decode


def greedy(logits: Any) -> Any:
    """The likeliest byte, never a special id."""
    return logits[:, VOCAB.offset :].argmax(axis=-1).astype(jnp.int32) + VOCAB.offset


def uncached(name: str, ids: np.ndarray, lengths: np.ndarray, count: int) -> np.ndarray:
    """`count` greedy ids behind each row's prompt, by a whole pass for each."""
    whole, _, _ = programs(name)
    _, params, _ = model_of(name)
    ids, rows = ids.copy(), np.arange(len(ids))
    for position in (lengths + i for i in range(count)):
        ids[rows, position] = np.asarray(greedy(whole(params, ids)[0][rows, position]))
    return ids


@pytest.mark.parametrize("name", quick(CONFIGS, "entropy, small budget", "bytropix"))
def test_forced_rounds_give_the_logits_of_the_whole_pass(name):
    _, params, _ = model_of(name)
    whole, prefill, decode = programs(name)
    ids = prompts()
    expected, starts = map(np.asarray, whole(params, ids))
    everything = np.full(ROWS, LENGTH, np.int32)
    for first, filled in ((0, 0), (0, 40), (17, 40), (40, 40)):
        # What a prefill wrote from `first` on is junk that the rounds must write once more.
        prefix = np.where(np.arange(LENGTH) < first, ids, np.roll(ids, 3, axis=0))[:, :filled]
        empty = define_model(CONFIGS[name])[0](params).init_cache(ROWS, LENGTH)
        cache = prefill(params, prefix) if filled else empty
        cache, actual_ids, actual = decode(params, cache, ids, first, LENGTH, everything)
        actual = np.asarray(actual)
        np.testing.assert_array_equal(actual_ids, ids)
        error = np.linalg.norm(actual[:, first:] - expected[:, first:])
        assert error <= LOGITS["float32"] * np.linalg.norm(expected[:, first:])
        capacity = CONFIGS[name].budget(LENGTH)
        numbers = np.minimum(np.cumsum(starts, axis=1) - 1, capacity)
        np.testing.assert_array_equal(cache.patches, numbers)
        ends = (np.diff(numbers[:, first:], axis=1) > 0).any(axis=0)
        assert cache.global_calls == ends.sum(), "once for every byte behind which a patch ends"
    assert len(set(np.bincount(numbers[0]))) > 1


@pytest.mark.parametrize("name", quick(["entropy", "bytropix"], "entropy"))
def test_greedy_bytes_are_those_of_whole_passes_at_every_prompt_length(name):
    _, params, bind = model_of(name)
    _, prefill, decode = programs(name)
    new = 6
    # As generation does it: a padded prefill, then rounds from the shortest prompt on.
    lengths = np.arange(65, dtype=np.int32)[:, None] + np.array([0, 3, 8], np.int32)
    prompt_ids = np.where(np.arange(LENGTH) < lengths[..., None], prompts(), VOCAB.pad_id)
    prompt_ids = prompt_ids.astype(np.int32)
    flat = uncached(name, prompt_ids.reshape(-1, LENGTH), lengths.reshape(-1), new)
    for counts, ids, expected in zip(
        lengths, prompt_ids, flat.reshape(prompt_ids.shape), strict=True
    ):
        first, last = counts.min(), counts.max() + new
        cache = prefill(params, ids) if first else bind(params).init_cache(ROWS, LENGTH)
        _, actual, _ = decode(params, cache, ids, first, last, counts)
        for ours, theirs, end in zip(np.asarray(actual), expected, counts + new, strict=True):
            np.testing.assert_array_equal(ours[:end], theirs[:end])


def test_one_row_calls_the_global_transformer_once_a_patch():
    _, params, bind = model_of("entropy")
    ids, starts = prompts()[:1], programs("entropy")[0](params, prompts())[1]

    @jax.jit
    def run(params: Params, ids: Any) -> Any:
        model = bind(params)

        def body(index: Any, cache: Any) -> Any:
            before = jax.lax.dynamic_slice_in_dim(ids, jnp.maximum(index - 1, 0), 1, axis=1)
            return model.decode_round(cache, before, index, lambda logits, i: ids[:, 0])[0]

        return jax.lax.fori_loop(0, LENGTH, body, model.init_cache(1, LENGTH))

    cache = run(params, ids)
    complete = int(starts[0].sum()) - 1
    assert int(cache.global_calls) == complete == int(cache.patches[0, -1])
    assert 10 < complete < LENGTH - 10


@pytest.mark.parametrize("window", [1, 3, 8])
def test_chunks_see_what_the_full_mask_shows(window, x64):
    source = np.random.default_rng(0)
    q = jnp.asarray(source.normal(size=(2, 21, 4, 6)))
    k, v = (jnp.asarray(source.normal(size=(2, 21, 2, 6))) for _ in "kv")
    back = np.arange(21)[:, None] - np.arange(21)[None, :]
    expected = grouped_attention(q, k, v, (back >= 0) & (back < window))
    actual = causal_attention(q, k, v, window)
    assert np.linalg.norm(actual - expected) <= LOGITS["float64"] * np.linalg.norm(expected)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_one_query_sees_what_many_would(kv_heads, x64):
    source = np.random.default_rng(0)
    q = jnp.asarray(source.normal(size=(3, 1, 4, 6)))
    k, v = (jnp.asarray(source.normal(size=(3, 9, kv_heads, 6))) for _ in "kv")
    mask = np.arange(9)[None, None] < np.array([1, 5, 9])[:, None, None]
    expected = np.asarray(grouped_attention(q, k, v, mask))
    hidden = jnp.where(mask[:, 0, :, None, None], 0, 1e3)
    with pretend_platform("gpu"):
        actual, other = (
            np.asarray(attend_once(q, k + more, v + more, mask, grouped_attention))
            for more in (0, hidden)
        )
    assert np.linalg.norm(actual - expected) <= LOGITS["float64"] * np.linalg.norm(expected)
    np.testing.assert_array_equal(actual, other)


def test_gradients_of_patches_read_in_16_bits_are_rounded_once():
    source = np.random.default_rng(0)
    patch_of = jnp.asarray(np.sort(source.integers(0, 6, (2, 400)), axis=1))
    x, weights = (jnp.asarray(source.normal(size=s), "bfloat16") for s in ((2, 5, 3), (2, 400, 3)))
    _, pull = jax.vjp(lambda x: take_segments(x, patch_of), x)
    (by_scatter,) = pull(weights)
    with pretend_platform("gpu"):
        (by_product,) = pull(weights)
    exact = np.zeros((2, 6, 3))
    for row in range(2):
        np.add.at(exact[row], np.asarray(patch_of[row]), np.asarray(weights[row], np.float64))
    for actual in (by_scatter, by_product):
        assert actual.dtype == x.dtype
        error = np.abs(np.asarray(actual, np.float64) - exact[:, :5])
        assert (error <= 2.0**-8 * np.abs(exact[:, :5]) + 1e-5).all()


def test_sums_that_are_rounded_to_16_bits_have_an_order_and_16_digits():
    source = np.random.default_rng(0)
    patch_of = jnp.asarray(np.sort(source.integers(0, 6, (2, 400)), axis=1))
    x, weights = (jnp.asarray(source.normal(size=s), "float32") for s in ((2, 400, 3), (2, 5, 3)))

    def total(x: Any) -> Any:
        sums = ordered_segment_sum(x, patch_of, 5, kept=jnp.dtype("bfloat16"))
        return (sums * weights).sum(), sums

    (_, expected), by_scatter = jax.value_and_grad(total, has_aux=True)(x)
    with pretend_platform("gpu"):
        (_, actual), by_product = jax.jit(jax.value_and_grad(total, has_aux=True))(x)
    np.testing.assert_array_equal(by_product, by_scatter)
    assert actual.dtype == x.dtype
    sizes = ordered_segment_sum(jnp.abs(x), patch_of, 5)
    assert (np.abs(actual - expected) <= 2.0**-16 * sizes).all()


def test_linear_cross_attention_is_the_dense_one(x64):
    """Values and gradients, with padding, a patch of no bytes and a tail of no patch."""
    source = np.random.default_rng(0)
    bind, params = split_model(CrossAttention(8, 4, 2, rngs=nnx.Rngs(0)))
    params = {k: jnp.asarray(source.normal(size=v.shape)) for k, v in params.items()}
    patch_of = jnp.asarray([[0, 1, 1, 1, 2, 3, 3], [0, 1, 1, 4, 4, 4, 4]])
    read_of = jnp.asarray([[0, 0, 0, 0, 1, 2, 3], [0, 0, 1, 1, 1, 1, 1]])
    states, queries = source.normal(size=(2, 7, 8)), source.normal(size=(2, 4, 3, 8))
    states, queries = jnp.asarray(states), jnp.asarray(queries)
    used = (patch_of[:, :, None] == np.arange(4)[None, None]).any(axis=1)[:, :, None, None]

    def linear(params: Params, states: Any, queries: Any) -> Any:
        cross = bind(params)
        pooled = cross.pool_cached(queries, cross.keys_values(states), patch_of)
        read, _ = bind(params).read(states, queries, read_of)
        return jnp.where(used, pooled, 0), read

    def linear_on_a_gpu(*given: Any) -> Any:
        with pretend_platform("gpu"):
            return linear(*given)

    def dense(params: Params, states: Any, queries: Any) -> Any:
        layer, flat = bind(params), queries.reshape(2, 12, 8)
        vectors = jnp.repeat(jnp.arange(4), 3)[None, :, None]
        mask = vectors == patch_of[:, None, :]
        mask = mask | ~mask.any(axis=-1, keepdims=True)
        pooled = attend(layer, flat, states, mask).reshape(queries.shape)
        mask = jnp.swapaxes(vectors == read_of[:, None, :], 1, 2)
        return jnp.where(used, pooled, 0), attend(layer, states, flat, mask)

    def attend(layer: Any, x: Any, seen: Any, mask: Any) -> Any:
        keys, values = layer.keys_values(seen)
        mixed = grouped_attention(layer._queries(x), keys, values, mask)
        return layer._add(x, mixed)

    weights = [source.normal(size=(2, 4, 3, 8)), source.normal(size=(2, 7, 8))]

    def total(form: Any, *arguments: Any) -> Any:
        return sum((out * w).sum() for out, w in zip(form(*arguments), weights, strict=True))

    *ours, result = (
        jax.jit(jax.value_and_grad(functools.partial(total, form), (0, 1, 2)))(
            params, states, queries
        )
        for form in (linear, linear_on_a_gpu, dense)
    )
    for each in ours:
        for a, b in zip(jax.tree.leaves(each), jax.tree.leaves(result), strict=True):
            assert np.linalg.norm(a - b) <= GRADIENTS["float64"] * np.linalg.norm(b)


@pytest.mark.parametrize("machine", ["cpu", "gpu"])
def test_maxima_of_16_bits_are_exact(machine, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: machine)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 6, 3)) - 1, jnp.bfloat16)
    actual = segment_max(x, jnp.asarray([[0, 0, 0, 1, 3, 4], [0, 1, 1, 1, 1, 1]]), 4)
    assert actual.dtype == jnp.bfloat16
    rows = [[x[0, :3], x[0, 3:4], None, x[0, 4:5]], [x[1, :1], x[1, 1:], None, None]]
    exact = [[np.zeros(3) if part is None else part.max(axis=0) for part in row] for row in rows]
    np.testing.assert_array_equal(actual, np.asarray(exact, actual.dtype))


def test_a_shared_maximum_shares_its_gradient():
    x = jnp.asarray([[[1.0], [3.0], [3.0], [2.0], [5.0]]])
    patch_of = jnp.asarray([[0, 0, 0, 1, 2]])
    actual, pull = jax.vjp(lambda x: segment_max(x, patch_of, 2), x)
    assert actual[0, :, 0].tolist() == [3.0, 2.0]
    assert pull(jnp.asarray([[[1.0], [4.0]]]))[0][0, :, 0].tolist() == [0, 0.5, 0.5, 4, 0]
