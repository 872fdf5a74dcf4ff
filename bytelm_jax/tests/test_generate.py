"""Samplers on known distributions; cached decoding against a full pass for every byte."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from bytelm.config import ByteVocab, MegabyteConfig
from bytelm.sampling import SamplerConfig
from bytelm.tolerances import LOGITS
from bytelm_jax.inference import sampling
from bytelm_jax.inference.generate import complete, generate, generate_uncached, stream
from bytelm_jax.inference.sampling import next_ids, probabilities, sample
from bytelm_jax.kernels.backend import pretend_platform
from bytelm_jax.models.megabyte import Megabyte
from bytelm_jax.models.megabyte_decoding import MegabyteCache

PATCH, MAX_LENGTH = 4, 40
TEXT = b"Patches of 4: \xc3\xa9!"
PROMPTS = [TEXT[:length] for length in range(4 * PATCH + 1)]
RAGGED = [TEXT[:length] for length in (6, 16, 9, 4, 5, 7, 12, 16)]
VARIANTS = ["paper", "in_action"]
GREEDY = SamplerConfig(sampler="greedy")
PLAIN = SamplerConfig()
CUT = SamplerConfig(temperature=1.5, top_k=40, top_p=0.9)
MIXED = SamplerConfig(sampler="entropy", temperature=2.0)
PLAIN_TRANSFORMER = MegabyteConfig(
    patch_size=1,
    global_dim=16,
    global_layers=2,
    global_heads=2,
    local_dim=8,
    local_layers=0,
    init_std=0.3,
)


def tiny(variant, kind=Megabyte, **biases):
    """Distributions of 0 to 6 bits, 1.5 in the middle; `biases` go to the specials' logits."""
    config = MegabyteConfig(
        variant=variant,
        patch_size=PATCH,
        global_dim=8,
        local_dim=16,
        max_length=MAX_LENGTH,
        global_layers=2,
        global_heads=2,
        local_layers=1,
        local_heads=2,
        init_std=0.3,
    )
    model: Any = filled(config, kind)
    for name, bias in biases.items():
        place = getattr(config.vocab, name)
        model.to_logits.bias[...] = model.to_logits.bias[...].at[place].add(bias)
    return model


def filled(config, kind=Megabyte, seed=0):
    """A model of random weights from numpy: JAX would compile a program for each shape."""
    source = np.random.default_rng(seed)

    def fill(path, leaf):
        if "scale" in jax.tree_util.keystr(path):
            return jnp.ones(leaf.shape)
        return jnp.asarray(source.normal(0, config.init_std, leaf.shape), jnp.float32)

    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: kind(config, rngs=nnx.Rngs(0))))
    return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(fill, abstract))


pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def models():
    return {variant: tiny(variant) for variant in VARIANTS}


def one_by_one(model, prompts, new, **options):
    return [generate(model, [prompt], new, GREEDY, **options)[0] for prompt in prompts]


def assert_cached_equals_uncached(model, prompts, new, reference=None):
    cached = one_by_one(model, prompts, new)
    assert cached == generate_uncached(reference or model, prompts, new, GREEDY)
    return cached


# ---- samplers as functions of logits --------------------------------------------------------

ROWS, WIDTH = 16, 259


def logits_of(*chances):
    """[16, 259], equal rows; one shape for all tests, so that every operation compiles once."""
    padded = np.zeros(WIDTH, np.float32)
    padded[: len(chances)] = chances
    with np.errstate(divide="ignore"):
        return jnp.asarray(np.tile(np.log(padded), (ROWS, 1)))


def possible(logits, **fields):
    """The indices that can be drawn."""
    return drawable(probabilities(logits, SamplerConfig(**fields)))


def drawable(chances):
    return set(np.flatnonzero(np.asarray(chances)[0]))


def test_temperature_divides_the_logits():
    logits = np.random.default_rng(0).normal(size=(ROWS, WIDTH)).astype(np.float32)
    for heat in (0.25, 1.0, 3.0):
        actual = probabilities(jnp.asarray(logits), SamplerConfig(temperature=heat))
        expected = np.exp(logits.astype(float) / heat)
        expected /= expected.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(actual, expected, rtol=LOGITS["float32"])


def test_zero_temperature_and_the_smallest_are_greedy():
    logits = logits_of(0.1, 0.4, 0.4, 0.1)
    cold = SamplerConfig(temperature=0.0)
    assert drawable(probabilities(logits, cold)) == {1}
    everything = SamplerConfig(sampler="entropy", temperature=0.0, top_k=3, top_p=0.5)
    assert drawable(probabilities(logits, everything)) == {1}
    assert possible(logits.at[0, 7].set(1e30), temperature=1e-6) == {7}


def test_top_k_keeps_exactly_k_and_equal_logits_rank_by_id():
    logits = logits_of(0.05, 0.3, 0.15, 0.3, 0.15, 0.15)
    for k, expected in enumerate([{1}, {1, 3}, {1, 3, 2}, {1, 3, 2, 4}], start=1):
        assert possible(logits, top_k=k) == expected
    for k in (0, 6, 7, 10**12):
        assert possible(logits, top_k=k) == set(range(6))


def test_top_p_keeps_the_fewest_that_reach_it():
    logits = logits_of(0.125, 0.5, 0.125, 0.25)
    sets = {1e-300: {1}, 0.5: {1}, 0.51: {1, 3}, 0.75: {1, 3}, 0.76: {1, 3, 0}, 0.875: {1, 3, 0}}
    for p, expected in sets.items():
        assert possible(logits, top_p=p) == expected
    assert possible(logits, top_p=0.88) == possible(logits, top_p=1.0) == {0, 1, 2, 3}
    # Of the three that top_k leaves, with 4/7, 2/7 and 1/7, two reach 0.8; of all four, three.
    assert possible(logits, top_k=3, top_p=0.8) == {1, 3}
    assert possible(logits, top_p=0.8) == {1, 3, 0}
    actual = probabilities(logits, SamplerConfig(top_k=2))
    np.testing.assert_allclose(actual[0, :4], [0, 2 / 3, 0, 1 / 3], rtol=LOGITS["float32"])
    # A flat distribution whose sum passes 1 by rounding loses nothing, however long its tail.
    assert len(possible(logits_of(*[1 / 257] * 257), top_p=1.0, top_k=258)) == 257


@pytest.mark.parametrize(
    ("count", "thresholds", "possible_count", "heat"),
    [
        (2, (1 + 1e-6, 3.0, 4.0), 1, None),
        (2, (1.0, 3.0, 4.0), 3, 2.0),
        (32, (1.0, 5.01, 6.0), 10, None),
        (32, (1.0, 5.0, 6.0), 33, 2.0),
        (32, (1.0, 2.0, 5.0), 33, 2.0),
        (32, (1.0, 2.0, 4.99), 33, 1.6),
    ],
)
def test_entropy_sampler_below_at_and_above_each_threshold(count, thresholds, possible_count, heat):
    # Uniform over 2 and 32 has 1 and 5 bits exactly, in float32 too; one more that is too rare to
    # change the entropy shows the temperature.
    logits = logits_of(*[1 / count] * count).at[0, 258].set(-60.0)
    names = ("entropy_low", "entropy_medium", "entropy_high")
    fields = dict(zip(names, thresholds, strict=True))
    sampler = SamplerConfig(sampler="entropy", temperature=2.0, **fields)
    actual = np.asarray(probabilities(logits, sampler))[0]
    assert (actual > 0).sum() == possible_count
    if heat:
        gap = (-60 + math.log(count)) / heat
        np.testing.assert_allclose(math.log(actual[258] / actual[0]), gap, rtol=LOGITS["float32"])


def two_level(bits, others=WIDTH - 1):
    """Logits whose distribution has the given entropy, by bisection; the first is likeliest."""

    def entropy(p):
        tail = (1 - p) / others
        return -p * math.log2(p) - (1 - p) * math.log2(tail)

    low, high = 1 / (1 + others), 1 - 1e-12
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if entropy(middle) > bits else (low, middle)
    return logits_of(low, *[(1 - low) / others] * others)


def test_entropy_sampler_at_the_default_thresholds():
    counts = {0.299: 1, 0.301: 10, 1.199: 10, 1.201: WIDTH, 2.499: WIDTH, 2.501: WIDTH}
    for bits, count in counts.items():
        logits = two_level(bits)
        actual = np.asarray(probabilities(logits, SamplerConfig(sampler="entropy")))[0]
        assert (actual > 0).sum() == count, bits
        if count == WIDTH:
            heat = 0.8 if bits > 2.5 else 1.0
            gap = float(logits[0, 0] - logits[0, 1]) / heat
            np.testing.assert_allclose(math.log(actual[0] / actual[1]), gap, rtol=LOGITS["float32"])


def test_entropy_is_that_of_the_model_and_the_other_cuts_still_hold():
    logits = two_level(1.0)  # one of the ten likeliest, whatever the temperature
    for heat in (0.1, 1.0, 20.0):
        assert len(possible(logits, sampler="entropy", temperature=heat)) == 10
    assert possible(logits, sampler="entropy", top_k=3) == {0, 1, 2}
    assert possible(logits, sampler="entropy", top_p=0.5) == {0}
    assert len(possible(two_level(0.2), top_k=20)) == 20  # and categorical has no thresholds
    rows = logits.at[0].set(two_level(0.2)[0]).at[2].set(two_level(2.0)[0])
    actual = np.asarray(probabilities(rows, SamplerConfig(sampler="entropy")))
    assert [(row > 0).sum() for row in actual] == [1, 10, WIDTH, *[10] * (ROWS - 3)]


def test_draw_takes_each_by_its_share_and_never_what_has_none():
    shares = np.zeros(WIDTH, np.float32)
    shares[[1, 4, 5, 6]] = 3, 1, 2, 10
    chances = jnp.asarray(np.tile(shares / 16, (ROWS, 1)))
    counts = np.zeros(WIDTH)
    for part in np.split((np.arange(10 * ROWS, dtype=np.float32) + 0.5) / (10 * ROWS), 10):
        np.add.at(counts, np.asarray(sample(chances, jnp.asarray(part))), 1)
    np.testing.assert_array_equal(counts, 10 * shares)
    # Sums that round up or down, both ends of [0, 1), and 1, which a float64 number may round to.
    ragged = np.random.default_rng(0).random((ROWS, WIDTH)).astype(np.float32)
    ragged[:, [0, 1, 100, 256, 257, 258]] = 0
    ragged /= ragged.sum(axis=1, keepdims=True)
    for end, place in ((0.0, 2), (np.nextafter(np.float32(1), np.float32(0)), 255), (1.0, 255)):
        actual = sample(jnp.asarray(ragged), jnp.full(ROWS, end, jnp.float32))
        np.testing.assert_array_equal(actual, place)


@pytest.mark.parametrize("sampler", [GREEDY, PLAIN, CUT, MIXED])
@pytest.mark.parametrize(
    "vocab", [ByteVocab(), ByteVocab(size=264, offset=4, pad_id=3, bos_id=2, eos_id=1)]
)
def test_only_bytes_and_eos_can_follow(sampler, vocab):
    source = np.random.default_rng(1)
    logits = source.normal(size=(ROWS, vocab.size)).astype(np.float32)
    others = np.setdiff1d(np.arange(vocab.size), vocab.offset + np.arange(256))
    logits[:, others] += 50  # eos among them
    uniform = jnp.asarray(source.random(ROWS, np.float32))
    actual = next_ids(jnp.asarray(logits), uniform, sampler, vocab)
    np.testing.assert_array_equal(actual, vocab.eos_id)
    actual = np.asarray(next_ids(jnp.asarray(logits), uniform, sampler, vocab, allow_eos=False))
    assert ((actual >= vocab.offset) & (actual < vocab.offset + 256)).all()
    assert len(set(actual)) > ROWS / 2
    for byte in (0, 255):
        peaked = np.full((ROWS, vocab.size), -5.0, np.float32)
        peaked[:, vocab.offset + byte] = 30
        actual = next_ids(jnp.asarray(peaked), uniform, sampler, vocab)
        np.testing.assert_array_equal(actual, vocab.offset + byte)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1.0),
        ("temperature", 1e-9),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("entropy_low", 2.0),
        ("entropy_medium", 3.0),
        ("entropy_high", math.nan),
    ],
)
def test_samplers_that_cannot_work_are_refused_in_one_line(field, value):
    with pytest.raises(ValueError, match=rf"{field}.*=.*{value}") as caught:
        SamplerConfig(**{field: value})
    assert "\n" not in str(caught.value)


def test_unknown_sampler_is_refused():
    # Past the annotation, which only tests enforce.
    unchecked = object.__new__(SamplerConfig)
    object.__setattr__(unchecked, "sampler", "beam")
    with pytest.raises(ValueError, match="sampler='beam': choose greedy, categorical, entropy"):
        unchecked.__post_init__()


# ---- cached decoding ------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_cached_equals_uncached_at_every_prompt_length(models, variant):
    new = MAX_LENGTH - len(TEXT[: 4 * PATCH])  # up to the last position of the paper variant
    generated = assert_cached_equals_uncached(models[variant], PROMPTS, new)
    assert len(set(generated)) == len(generated)  # the prompt matters
    assert len(set(b"".join(generated))) > 20  # and what comes out is no constant


def test_a_cache_with_one_layer_unwritten_is_noticed():
    class Stale(Megabyte):
        def decode_round(self, cache, previous, index, choose):
            written, ids = super().decode_round(cache, previous, index, choose)
            return MegabyteCache((written.layers[0], *cache.layers[1:])), ids

    prompts = PROMPTS[2:6]
    assert_cached_equals_uncached(filled(PLAIN_TRANSFORMER), prompts, 11)
    with pytest.raises(AssertionError):
        assert_cached_equals_uncached(
            filled(PLAIN_TRANSFORMER, Stale), prompts, 11, reference=filled(PLAIN_TRANSFORMER)
        )


def test_ragged_batch_equals_one_by_one(models):
    model = models["paper"]
    for prompts in (RAGGED, [b"", *RAGGED[:5]]):  # with and without a prefill
        assert generate(model, prompts, 24, GREEDY) == one_by_one(model, prompts, 24)


@pytest.mark.parametrize("sampler", [CUT, MIXED])
def test_the_second_row_of_a_gpu_changes_nothing(models, sampler):
    expected = generate(models["paper"], [TEXT], 10, sampler)
    with pretend_platform("gpu"):
        assert generate(models["paper"], [TEXT], 10, sampler) == expected
        assert b"".join(stream(models["paper"], TEXT, 10, sampler)) == expected[0]


@pytest.mark.parametrize("ranked", [[], [CUT], [MIXED, GREEDY]])
def test_a_gpu_ranks_candidates_without_being_asked(ranked):
    logits = np.random.default_rng(0).normal(size=(1 + len(ranked), 257)).astype(np.float32)
    rows = [sampling.numbers_of_a_row(each) for each in [PLAIN, *ranked]]
    columns: list[Any] = [
        np.array(column, np.float32)[:, None] for column in zip(*rows, strict=True)
    ]
    numbers = sampling.SamplerNumbers(*columns)
    expected = sampling._probabilities(jnp.asarray(logits), "mixed", numbers)
    with pretend_platform("gpu"):
        actual = sampling._probabilities(jnp.asarray(logits), "mixed", numbers)
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("sampler", [CUT, MIXED])
def test_sampled_cached_equals_uncached(models, sampler):
    generated = generate(models["paper"], RAGGED, 24, sampler, seed=5)
    assert generated == generate_uncached(models["paper"], RAGGED, 24, sampler, seed=5)
    assert generated != generate(models["paper"], RAGGED, 24, GREEDY)


def test_end_of_sequence_ends_a_row(models):
    model = tiny("paper", eos_id=9.0)
    generated = generate(model, RAGGED, 24, PLAIN, seed=1)
    lengths = {len(new) for new in generated}
    assert len(lengths) > 3
    assert generated == generate_uncached(model, RAGGED, 24, PLAIN, seed=1)
    endless = generate(model, RAGGED, 24, PLAIN, seed=1, stop_at_eos=False)
    assert {len(new) for new in endless} == {24}
    assert endless == generate_uncached(model, RAGGED, 24, PLAIN, seed=1, stop_at_eos=False)
    at_once = tiny("paper", eos_id=1e6)
    assert generate(at_once, RAGGED, 24, GREEDY) == [b""] * len(RAGGED)
    assert list(stream(at_once, RAGGED[0], 24, GREEDY)) == []
    assert {row.rounds for row in complete(at_once, RAGGED, 24, GREEDY)} == {1}


def test_other_specials_change_nothing(models):
    pushed = tiny("paper", pad_id=1e6, bos_id=1e6)
    assert generate(pushed, RAGGED, 11, PLAIN) == generate(models["paper"], RAGGED, 11, PLAIN)


def test_seeds_rows_and_positions_make_the_sample(models):
    model, prompts = models["paper"], [TEXT[:6]] * 8
    generated = generate(model, prompts, 24, PLAIN, seed=7)
    assert generated == generate(model, prompts, 24, PLAIN, seed=7)
    assert len(set(generated)) > 1  # equal prompts, different rows
    assert generated != generate(model, prompts, 24, PLAIN, seed=8)
    shorter = generate(model, prompts, 10, PLAIN, seed=7)
    assert shorter == [new[:10] for new in generated]


def test_neighbours_change_nothing(models):
    model = models["paper"]
    generated = generate(model, RAGGED, 20, PLAIN, seed=7)
    other = [prompt if i in (2, 5) else TEXT[:4] for i, prompt in enumerate(RAGGED)]
    assert other != RAGGED
    changed = generate(model, other, 20, PLAIN, seed=7)
    assert [generated[i] for i in (2, 5)] == [changed[i] for i in (2, 5)]
    assert generated[1] != changed[1]


@pytest.mark.parametrize("sampler", [GREEDY, PLAIN])
def test_streamed_pieces_add_up(models, sampler):
    model = models["paper"]
    for prompt in (b"", TEXT[:6], TEXT[:8]):
        whole = generate(model, [prompt], 23, sampler, seed=3)[0]
        for chunk in (1, 4, 9, 64):
            pieces = list(stream(model, prompt, 23, sampler, seed=3, chunk_bytes=chunk))
            assert b"".join(pieces) == whole
            assert all(pieces)
            # Bytes 6 to 29 lie in patches 1 to 7; a chunk of 9 is two patches.
            if prompt == TEXT[:6] and len(whole) == 23:
                assert len(pieces) == {1: 7, 4: 7, 9: 4, 64: 1}[chunk]


def test_lengths_at_the_limits(models):
    message = "prompts: 17 bytes and max_new_bytes=24 make 41, .* max_length=40"
    for call in (generate, generate_uncached):
        with pytest.raises(ValueError, match=message):
            call(models["paper"], [b"", TEXT], 24)
    with pytest.raises(ValueError, match=message):
        stream(models["paper"], TEXT, 24)  # at the call, not at the first piece
    long = generate(models["in_action"], [TEXT], 30, GREEDY, stop_at_eos=False)
    assert len(long[0]) == 30  # in_action has no limit


def test_nothing_asked_nothing_done(models):
    for call in (generate, generate_uncached):
        assert call(models["paper"], [], 10) == []
        assert call(models["paper"], [b"a", b""], 0) == [b"", b""]
    assert list(stream(models["paper"], b"a", 0)) == []


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("max_new_bytes=-1", {"max_new_bytes": -1}),
        ("seed=-1", {"max_new_bytes": 1, "seed": -1}),
        ("seed=4294967296", {"max_new_bytes": 1, "seed": 2**32}),
    ],
)
def test_requests_that_cannot_work_are_refused(models, field, options):
    with pytest.raises(ValueError, match=field):
        generate(models["paper"], [b""], **options)
    with pytest.raises(ValueError, match="chunk_bytes=0"):
        stream(models["paper"], b"", 1, chunk_bytes=0)


@pytest.mark.parametrize("new", [2**31 - 1, 3_000_000_000, 2**70])
def test_more_bytes_than_memory_holds_are_refused(models, new):
    says, model, most = (
        rf"max_new_bytes={new}: .* memory; give at most (\d+)$",
        models["in_action"],
        [],
    )
    for speculate in (None, "ngram", model):  # drafts take larger caches, a model its own, too
        with pytest.raises(ValueError, match=says) as error:
            generate(model, [TEXT], new, speculate=speculate)
        most.append(int(str(error.value).split()[-1]))
    assert most[0] > most[1] > most[2]


def test_one_program_serves_a_bucket(monkeypatch):
    traced = []
    original = Megabyte.decode_round

    def counted(self, *arguments):
        traced.append(1)
        return original(self, *arguments)

    monkeypatch.setattr(Megabyte, "decode_round", counted)
    model = filled(PLAIN_TRANSFORMER)
    generate(model, PROMPTS[2:4], 11, CUT)
    assert len(traced) == 1
    generate(
        filled(PLAIN_TRANSFORMER, seed=1), [TEXT[:5], b"a"], 7, MIXED, seed=3, stop_at_eos=False
    )
    generate(model, [TEXT[:10], TEXT[:9]], 3, SamplerConfig(top_p=0.2))
    assert len(traced) == 1


def test_parameters_are_read_at_every_call(models):
    model = tiny("paper")
    before = generate(model, RAGGED[:1], 11, GREEDY)
    model.to_logits.bias[...] = jax.random.normal(jax.random.key(1), model.to_logits.bias.shape)
    assert generate(model, RAGGED[:1], 11, GREEDY) != before
