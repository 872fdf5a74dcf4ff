"""Resets: each line is a text of its own, in both packages.

Of MEGABYTE, LFByte, and every tiny model that resets (`TINY_MODELS` of the parity tests).
"""

import functools
import itertools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from bytelm import tolerances
from bytelm.config import LFByteConfig, MegabyteConfig
from bytelm.sampling import SamplerConfig
from bytelm_jax.inference.generate import generate
from bytelm_jax.interop import convert
from bytelm_jax.layers.long_convolution import segmented_convolution
from bytelm_jax.layers.resets import find_segment_starts, position_in_segment
from bytelm_jax.models import abstract_params, define_model
from bytelm_jax.parity.report import relative_error
from bytelm_jax.parity.twins import make_twin
from bytelm_torch.inference.generate import generate as torch_generate
from bytelm_torch.inference.generate import generate_uncached as torch_generate_uncached
from bytelm_torch.layers.long_convolution import segmented_convolution as torch_convolution
from parity_tests.tiny_models import CONFIGS

PATCH, NEWLINE = 4, 10
SMALL: Any = {"global_dim": 8, "local_dim": 16, "max_length": 48, "init_std": 0.3}
SMALL |= {"global_layers": 1, "global_heads": 2, "local_layers": 1, "local_heads": 2}
FORMS: dict[str, Any] = {
    "paper": MegabyteConfig(**SMALL | {"global_layers": 2}, patch_size=PATCH),
    "in_action": MegabyteConfig(**SMALL, patch_size=PATCH, variant="in_action"),
    "plain": MegabyteConfig(**SMALL | {"local_layers": 0}, patch_size=1),
    "lfbyte": LFByteConfig(
        embed_dim=12, num_layers=1, adapt_dim=6, kernel_length=5, rank=3, dropout=0.0, top_k=0
    ),
} | {name: replace(c, reset_on="none") for name, c in CONFIGS.items() if c.reset_on == "newline"}
LINES = [
    [1, PATCH - 1, PATCH, PATCH + 1, 1, 1, 2 * PATCH, 6],  # newlines first, in a row and last
    [2 * PATCH + 3, 3, 1, 14],
    [29],
]


def text(lines, seed):
    """Lines of the given lengths, their newlines counted; the last row has none."""
    source = np.random.default_rng(seed)
    ids = source.integers(97, 123, sum(lines)).astype(np.int32)
    if len(lines) > 1:
        ids[np.cumsum(lines) - 1] = NEWLINE
    return ids


def rows(seed=0):
    return np.stack([text(lines, seed + i) for i, lines in enumerate(LINES)])


def segments(row):
    """(first, one past the last) of each line."""
    cuts = [0, *(np.flatnonzero(row[:-1] == NEWLINE) + 1).tolist(), len(row)]
    return list(itertools.pairwise(cuts))


def random_params(config, dtype):
    """Random values for every parameter, so that none of them can hide behind a zero."""
    source = np.random.default_rng(0)
    shapes = sorted((name, leaf.shape) for name, leaf in abstract_params(config).items())
    return {
        name: jnp.asarray(0.3 * source.standard_normal(shape) + name.endswith("scale"), dtype)
        for name, shape in shapes
    }


@functools.cache
def models(form, dtype="float64"):
    """(bind, parameters, compiled logits, the torch twin, its twin without resets)."""
    plain = FORMS[form]
    config = replace(plain, reset_on="newline")
    with jax.enable_x64(dtype == "float64"):
        params = random_params(config, dtype)
        bind, _ = define_model(config)
        twin, alone = make_twin(config, params), make_twin(plain, params)
        return bind, params, jax.jit(lambda p, ids: bind(p)(ids)), twin, alone


@pytest.mark.parametrize("form", FORMS)
def test_logits_are_those_of_each_line_alone(form, x64):
    _, params, forward, twin, alone = models(form)
    ids = rows()
    ours, theirs = np.asarray(forward(params, ids)), twin(torch.from_numpy(ids)).detach().numpy()
    for row, logits, other in zip(ids, ours, theirs, strict=True):
        for segment_start, end in segments(row):
            # What follows the line does not matter to it, in resets or without.
            for stop in {end, len(row)}:
                wanted = alone(torch.from_numpy(row[None, segment_start:stop])).detach().numpy()[0]
                wanted = wanted[: end - segment_start]
                for actual in (logits[segment_start:end], other[segment_start:end]):
                    assert relative_error(actual, wanted) <= tolerances.LOGITS["float64"]
    assert relative_error(ours, alone(torch.from_numpy(ids)).detach().numpy()) > 0.01


@pytest.mark.parametrize("form", FORMS)
def test_no_logit_sees_its_own_byte_a_later_one_or_another_line(form, x64):
    _, params, forward, twin, _ = models(form)
    ids = rows()
    for run in (
        lambda ids: np.asarray(forward(params, ids)),
        lambda ids: twin(torch.from_numpy(ids)).detach().numpy(),
    ):
        before = run(ids)
        for position in (0, 1, 3, 4, 7, 8, 14, 20, 28):
            for byte in (NEWLINE, 65):  # that a line ends here must not be known here
                changed = ids.copy()
                changed[:, position:] = byte
                before_change = slice(0, position + 1)
                np.testing.assert_array_equal(
                    run(changed)[:, before_change], before[:, before_change]
                )
        changed = ids.copy()
        for row, segment_start in zip(
            changed, (23, 15, 0), strict=True
        ):  # where the last line begins
            row[:segment_start] = np.where(row[:segment_start] == NEWLINE, NEWLINE, 65)
        after = run(changed)
        for i, segment_start in enumerate((23, 15, 0)):
            np.testing.assert_array_equal(after[i, segment_start:], before[i, segment_start:])
        assert (after[0, 5:13] != before[0, 5:13]).any()  # the change does reach its own line
        permuted = run(ids[::-1].copy())
        assert relative_error(permuted, before[::-1]) <= tolerances.OTHER_PLACE["float64"]


@pytest.mark.parametrize("form", ["paper", "in_action", "lfbyte"])
def test_training_gradients_and_overflow_over_two_devices(form, x64):
    bind, params, _, twin, _ = models(form)
    ids = np.concatenate([rows(), rows(7)[:1]])
    ids[1] = NEWLINE  # 29 lines, for which there is no room
    weights = np.random.default_rng(1).standard_normal((*ids.shape, twin.config.vocab.size))
    keys = jax.random.split(jax.random.key(0), len(ids))  # which say that this is training

    def weighed(params, ids, weights, keys):
        output = bind(params).outputs(ids, keys)
        total = (weights * output.logits).sum() + output.extra_loss.sum()
        return jax.lax.psum(total, "rows"), output.metrics.get("reset_overflow", jnp.zeros(2))

    mesh = jax.make_mesh((2,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.P("rows")
    spread = jax.shard_map(
        jax.value_and_grad(weighed, has_aux=True),
        mesh=mesh,
        in_specs=(jax.P(), split, split, split),
        out_specs=((jax.P(), split), jax.P()),
    )
    (total, overflow), gradients = jax.jit(spread)(params, ids, weights, keys)
    twin.train().zero_grad()
    output = twin.outputs(torch.from_numpy(ids), remat=form == "paper")
    wanted = (torch.from_numpy(weights) * output.logits).sum() + output.extra_loss.sum()
    wanted.backward()
    twin.eval()
    assert (
        relative_error(np.asarray(total), wanted.detach().numpy()) <= tolerances.LOGITS["float64"]
    )
    if form != "lfbyte":
        np.testing.assert_array_equal(overflow, output.metrics["reset_overflow"])
        assert overflow[1] > 0 and overflow[2] == 0
    for name, gradient in convert.to_torch(gradients).items():
        theirs = twin.get_parameter(name).grad.numpy()
        assert relative_error(gradient, theirs) <= tolerances.GRADIENTS["float64"], name


PROMPT = b"ab\n\nPatch\nes of\n4:\n\n\xc3\xa9!"


@pytest.fixture
def quick_compilation():
    """The loops of generation run for milliseconds and compile for seconds."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


# Added to the newline's logit, so that some lines end and not all bytes are newlines.
@pytest.mark.parametrize(("form", "bias"), [("paper", 22), ("in_action", 14), ("lfbyte", 3)])
def test_cached_generation_is_uncached_generation(form, bias, quick_compilation):
    bind, params, _, _, _ = models(form, "float32")
    params = dict(params)
    params["to_logits.bias"] = params["to_logits.bias"].at[NEWLINE].add(bias)
    model, twin = bind(params), make_twin(bind(params).config, params)
    prompts = [PROMPT[:length] for length in range(21)]
    greedy = SamplerConfig(sampler="greedy")
    wanted = torch_generate_uncached(twin, prompts, 12, greedy, stop_at_eos=False)
    newlines = sum(text.count(b"\n") for text in wanted)
    assert 12 < newlines < 12 * 20
    # One batch without a prefill, and two whose shortest prompt is prefilled.
    for low, high in ((0, 8), (5, 13), (13, 21)):
        ours = generate(model, prompts[low:high], 12, greedy, stop_at_eos=False)
        assert ours == wanted[low:high]
        theirs = torch_generate(twin, prompts[low:high], 12, greedy, stop_at_eos=False)
        assert theirs == wanted[low:high]


@pytest.mark.parametrize("form", ["in_action", "lfbyte"])
@pytest.mark.parametrize("resets", [True, False])
def test_cached_decoding_of_transformers_with_rows_of_unequal_length(form, resets, monkeypatch):
    from bytelm_torch.interop.transformers import ByteCache

    monkeypatch.setattr(ByteCache, "headroom", 4)  # so that it grows on the way
    twin: Any = models(form)[3 if resets else 4]
    ids, lengths = torch.from_numpy(rows()).long(), torch.tensor([6, 12, 5])
    with torch.inference_mode():
        whole = twin(ids)
        cache = ByteCache(twin, 3, None)
        rounds = [cache.extend(ids[:, :12], torch.arange(12) < lengths[:, None])]
        for step in range(12):
            rounds.append(cache.extend(ids[torch.arange(3), lengths + step][:, None]))
    for step, logits in enumerate(rounds):
        wanted = whole[torch.arange(3), lengths + step]
        error = relative_error(logits[:, 0].numpy(), wanted.numpy())
        assert error <= tolerances.OTHER_PLACE["float64"]


@pytest.mark.parametrize("taps", [5, 20])
def test_the_convolution_within_segments_is_the_plain_sum(taps, x64):
    source = np.random.default_rng(taps)
    x, kernel = source.standard_normal((3, 29, 2)), source.standard_normal((taps, 2))
    segment_positions = np.array(
        position_in_segment(
            find_segment_starts(jnp.asarray(rows()), FORMS["lfbyte"].vocab, "newline")
        )
    )
    wanted = np.zeros_like(x)
    for t in range(29):
        for j in range(min(taps, t + 1)):
            wanted[:, t] += np.where(
                (segment_positions[:, t] >= j)[:, None], kernel[j] * x[:, t - j], 0
            )
    ours = np.asarray(jax.jit(segmented_convolution)(x, kernel, segment_positions))
    theirs = torch_convolution(*map(torch.from_numpy, (x, kernel, segment_positions))).numpy()
    for actual in (ours, theirs):
        assert relative_error(actual, wanted) <= tolerances.LOGITS["float64"]
