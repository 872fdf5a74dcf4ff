"""Hashes of a million n-grams: JAX without 64-bit integers = torch = numpy's wrapping int64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import bytelm.config as torch_config
from bytelm.config import BLTConfig, to_dict
from bytelm.config.blt import HASH_PRIMES
from bytelm.tolerances import GRADIENTS, LOGITS
from bytelm_jax.layers import ngram
from bytelm_jax.models import split_model
from bytelm_torch.layers import ngram as torch_ngram

MILLION = 1_000_000
CONFIG = BLTConfig(ngram_functions=len(HASH_PRIMES), ngram_sizes=(3, 4, 5, 6, 7, 8))


def wrapping_hash(grams: np.ndarray, prime: int, rows: int) -> np.ndarray:
    """numpy's int64 wraps, and its % floors."""
    with np.errstate(over="ignore"):
        powers = np.power(np.int64(prime), np.arange(grams.shape[1], dtype=np.int64))
        return (grams.astype(np.int64) * powers).sum(axis=1) % rows


@pytest.fixture(scope="module")
def grams() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 260, (MILLION, 8), dtype=np.int32)


def expected_rows(grams: np.ndarray, config: BLTConfig) -> np.ndarray:
    columns = [
        wrapping_hash(grams[:, 8 - size :], prime, config.ngram_rows)
        for prime in HASH_PRIMES[: config.ngram_functions]
        for size in config.ngram_sizes
    ]
    return np.stack(columns, axis=1) + np.arange(len(columns)) * config.ngram_rows


@pytest.mark.slow
def test_a_million_grams_by_every_prime_and_size(grams):
    assert not jax.config.read("jax_enable_x64")
    ours = jax.jit(lambda x: ngram.ngram_rows(x, CONFIG))(grams)
    twin_config = torch_config.from_dict(torch_config.BLTConfig, to_dict(CONFIG))
    twin = torch_ngram.ngram_rows(torch.from_numpy(grams), twin_config)
    expected = expected_rows(grams, CONFIG)
    assert ours.dtype == jnp.int32
    np.testing.assert_array_equal(ours, expected)
    np.testing.assert_array_equal(twin, expected)
    assert len(np.unique(expected[:, 5])) > CONFIG.ngram_rows * 0.8, "the buckets are used"


@pytest.mark.parametrize("rows", [1, 2, 30_000, 2**16, 500_002, 2**30 + 7, 2**31 - 1])
def test_tables_of_any_size(grams, rows):
    few = grams[:5000]
    for prime in HASH_PRIMES[:2]:
        expected = wrapping_hash(few, prime, rows)
        np.testing.assert_array_equal(
            ngram.polynomial_hash(jnp.asarray(few), prime, rows), expected
        )
        twin = torch_ngram.polynomial_hash(torch.from_numpy(few), prime, rows)
        np.testing.assert_array_equal(twin, expected)


def test_wide_ids_and_literal_values():
    wide = np.array([[65535] * 8, [0] * 8, [0] * 7 + [65535]], np.int32)
    for prime in HASH_PRIMES:
        expected = wrapping_hash(wide, prime, 500_002)
        np.testing.assert_array_equal(
            ngram.polynomial_hash(jnp.asarray(wide), prime, 500_002), expected
        )
    # The oldest id has power 0; 7 + 5·31 + 3·31² = 3045.
    assert ngram.polynomial_hash(jnp.asarray([7, 5, 3]), 31, 1_000_003) == 3045


def test_order_of_tables(grams):
    config = dataclasses.replace(CONFIG, ngram_functions=2, ngram_sizes=(5, 3), ngram_rows=97)
    ours = np.asarray(ngram.ngram_rows(jnp.asarray(grams[:100]), config))
    np.testing.assert_array_equal(ours, expected_rows(grams[:100], config))


def test_embedding_sums_rows_and_padding_adds_nothing(x64):
    rng = np.random.default_rng(1)
    table = rng.normal(size=(40, 6))
    rows = rng.integers(0, 40, (3, 5, 4)).astype(np.int32)
    rows[1] = 40
    bind, _ = split_model(ngram.NgramEmbedding(40, 6, rngs=nnx.Rngs(0)))
    twin = torch_ngram.NgramEmbedding(40, 6).double()
    twin.weight.data = torch.from_numpy(table)
    upstream = rng.normal(size=(3, 5, 6))

    def loss(table):
        actual = bind({"embedding": table})(jnp.asarray(rows), jnp.zeros((), dtype))
        return (actual * upstream).sum(), actual

    dtype = "float64"
    gradient, actual = jax.grad(loss, has_aux=True)(jnp.asarray(table))
    other = twin(torch.from_numpy(rows))
    (other * torch.from_numpy(upstream)).sum().backward()
    assert (actual[1] == 0).all() and twin.weight.grad is not None
    np.testing.assert_allclose(actual, other.detach(), rtol=0, atol=LOGITS["float64"])
    np.testing.assert_allclose(gradient, twin.weight.grad, rtol=0, atol=GRADIENTS["float64"])
    # A table that is wider than what is computed: sums are rounded once, its gradient is as wide.
    dtype = "bfloat16"
    exact, (wide, rounded) = gradient, jax.grad(loss, has_aux=True)(jnp.asarray(table, "float32"))
    assert rounded.dtype == dtype and wide.dtype == "float32"
    eps = float(jnp.finfo(dtype).eps) / 2
    np.testing.assert_allclose(rounded.astype("float64"), actual, rtol=eps, atol=0)
    assert np.linalg.norm(wide - exact) <= eps * np.linalg.norm(exact)
