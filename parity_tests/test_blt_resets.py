"""BLT and the entropy model with `reset_on`: each line, or document, is a text of its own.

The torch twin runs every patcher, and what it makes of a line without resets is the reference. JAX
is held to it: whole passes and gradients of both presets, cached decoding, the plans of the others.
"""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from bytelm.config import BLTConfig
from bytelm.tolerances import GRADIENTS, LOGITS
from bytelm_jax.interop.convert import to_torch
from bytelm_jax.models import Params, define_model, patching
from bytelm_jax.models.entropy import segment_starts_of, shift_right
from bytelm_jax.parity.twins import make_twin
from bytelm_jax.training.loss import cross_entropy
from bytelm_torch.models import entropy as torch_entropy
from bytelm_torch.models import patching as torch_patching
from bytelm_torch.training import loss as torch_loss
from parity_tests import test_blt
from parity_tests.cases import quick
from parity_tests.test_blt import TINY, random_leaves, relative

LENGTH = 40
TEXTS = (
    # A newline first, three in a row, one last; lines beyond the window of 8; one row without.
    "\ncafé, —\n\n\nand 日本 🙂: 1 so\nyza\n",
    "Over and (over) again, ünd so — no en",
    "a\n  if b:\n\treturn 🙂\n\nd(x, y)  # so on",
)
QUICK = {"xla_backend_optimization_level": 0}  # half the time to compile, and nothing runs long


def resetting(config: Any, reset_on: str = "newline") -> Any:
    """`config`, its entropy model included, with another `reset_on`."""
    changed: dict[str, Any] = {"reset_on": reset_on}
    if isinstance(config, BLTConfig):
        changed["entropy"] = dataclasses.replace(config.entropy, reset_on=reset_on)
    return dataclasses.replace(config, **changed)


SMALL = dataclasses.replace(
    test_blt.SMALL,
    entropy=dataclasses.replace(TINY.entropy, layers=1, window=6),
    ngram_functions=1,
    ngram_sizes=(3,),
)
PLAIN = test_blt.CONFIGS | {
    "entropy": SMALL,
    "bytropix": dataclasses.replace(
        test_blt.CONFIGS["bytropix"], patch_queries=1, ngram_functions=1, ngram_sizes=(3,)
    ),
    "model": SMALL.entropy,
}
CONFIGS: dict[str, Any] = {
    name: resetting(config, "document" if name == "byte" else "newline")
    for name, config in PLAIN.items()
}
CONFIGS["entropy, small budget"] = dataclasses.replace(CONFIGS["entropy"], patch_budget=0.1)
TRAINED = ("entropy", "bytropix", "model")
CACHED = (
    "entropy, small budget",
    pytest.param("bytropix", marks=pytest.mark.slow),
    "model",
)
WHOLE = [name for name in CONFIGS if "budget" not in name]


@functools.cache
def tiny(name: str) -> tuple[Any, Params, Any]:
    """Config, parameters in float64 and torch twin of one of `CONFIGS`."""
    with jax.enable_x64(True):
        params = random_leaves(CONFIGS[name], "float64")
        return CONFIGS[name], params, make_twin(CONFIGS[name], params)


@functools.cache
def program(name: str) -> Any:
    """(params, ids) → (logits, gradients of the loss); one program for every test."""
    config = CONFIGS[name]
    bind, _ = define_model(config)

    def loss(params: Params, ids: Any) -> Any:
        logits = bind(params)(ids)
        nats, count = cross_entropy(logits, ids, config.vocab.pad_id)
        return nats.sum() / count.sum(), logits

    def both(params: Params, ids: Any) -> Any:
        (_, logits), gradients = jax.value_and_grad(loss, has_aux=True)(params, ids)
        return logits, gradients

    return jax.jit(both, compiler_options=QUICK)


def forwards(name: str) -> list[Any]:
    """ids → logits: torch, and JAX where it is compiled."""
    _, params, twin = tiny(name)

    @torch.no_grad()
    def by_torch(ids: np.ndarray) -> np.ndarray:
        return twin(torch.from_numpy(ids).long()).numpy()

    def by_jax(ids: np.ndarray) -> np.ndarray:
        return np.asarray(program(name)(params, ids)[0])

    return [by_torch, by_jax] if name in TRAINED else [by_torch]


def text_ids(config: Any) -> np.ndarray:
    """ids [3, T]; with documents, each text's newlines are ends of documents."""
    ids = np.stack([np.frombuffer(text.encode(), np.uint8) for text in TEXTS])
    ids = ids.astype(np.int32) + np.int32(config.vocab.offset)
    newline = config.vocab.offset + ord("\n")
    return np.where(ids == newline, separator(config), ids)


def separator(config: Any) -> np.int32:
    """The id behind which a text starts over."""
    newline = config.reset_on == "newline"
    return np.int32(config.vocab.offset + ord("\n") if newline else config.vocab.eos_id)


def segment_starts(config: Any, row: np.ndarray) -> list[int]:
    return [0, *(np.flatnonzero(row[:-1] == separator(config)) + 1).tolist()]


@pytest.mark.parametrize("name", quick(WHOLE, "entropy", "space", "model"))
def test_a_line_in_a_text_is_the_line_alone(name, x64):
    """In the model without resets, too: what it makes of a line alone is what is wanted."""
    config, params, _ = tiny(name)
    plain, ids, lines = make_twin(resetting(config, "none"), params).eval(), text_ids(config), 0
    by_torch, *by_jax = forwards(name)
    whole = by_torch(ids)
    for row, logits in zip(ids, whole, strict=True):
        edges = [*segment_starts(config, row), LENGTH]
        for segment_start, end in itertools.pairwise(edges):
            rest = by_torch(row[None, segment_start:])[0]
            assert relative(logits[segment_start:], rest) <= LOGITS["float64"], segment_start
            with torch.no_grad():
                line = plain(torch.from_numpy(row[None, segment_start:end]).long())[0]
            assert relative(logits[segment_start:end], line) <= LOGITS["float64"], (
                segment_start,
                end,
            )
            lines += 1
    assert lines == 12
    for run in by_jax:
        assert relative(run(ids), whole) <= LOGITS["float64"]


@pytest.mark.parametrize("name", TRAINED)
def test_every_gradient_equals_torch(name, x64):
    config, params, twin = tiny(name)
    ids = text_ids(config)
    ids[2, 30:] = config.vocab.pad_id
    logits, gradients = program(name)(params, ids)
    twin.zero_grad()
    tensor = torch.from_numpy(ids).long()
    theirs = twin(tensor)
    nats, count = torch_loss.cross_entropy(theirs, tensor, config.vocab.pad_id)
    (nats.sum() / count.sum()).backward()
    assert relative(logits, theirs.detach()) <= LOGITS["float64"]
    converted = to_torch(gradients)
    for key, parameter in twin.named_parameters():
        if not key.startswith(config.frozen_prefixes):
            # One vector per patch leaves a softmax nothing to weigh.
            assert name == "bytropix" or np.abs(converted[key]).max() > 0, f"{key} takes no part"
            assert relative(converted[key], parameter.grad) <= GRADIENTS["float64"], key


@pytest.mark.parametrize("name", WHOLE)
def test_what_lies_before_a_reset_changes_nothing(name, x64):
    """Exactly; but more patches before it move a line's own, and sums take another order."""
    config, _, _ = tiny(name)
    ids, source = text_ids(config), np.random.default_rng(0)
    ends = sorted(
        {segment_start - 1 for row in ids for segment_start in segment_starts(config, row)} - {-1}
    )
    for run in forwards(name):
        base = run(ids)
        for end in ends:
            rows = ids[:, end] == separator(config)
            changed = ids.copy()
            changed[:, :end] = source.integers(0, config.vocab.size, (3, end))
            actual = run(changed)[rows, end + 1 :]
            assert relative(actual, base[rows, end + 1 :]) <= LOGITS["float64"]
            if name == "model":
                np.testing.assert_array_equal(actual, base[rows, end + 1 :])
        # Other words of as many patches.
        letters = (ids > ord("a") + 4) & (ids < ord("z") + 4)
        changed = np.where(letters & (np.arange(LENGTH) < max(ends)), ids + 1, ids)
        rows = ids[:, max(ends)] == separator(config)
        if name not in ("entropy", "bytropix"):
            actual = run(changed)[rows, max(ends) + 1 :]
            np.testing.assert_array_equal(actual, base[rows, max(ends) + 1 :])
            assert rows.any() and (changed != ids)[rows].any()


@pytest.mark.parametrize("name", WHOLE)
def test_nothing_tells_that_a_line_is_about_to_end(name, x64):
    """The decoder's read depends on whether a patch starts behind t: never because of ids[t]."""
    config, _, _ = tiny(name)
    ids = text_ids(config)
    for run in forwards(name):
        base = run(ids)
        for t in range(LENGTH):
            if t % 4 and not (ids[:, t] == separator(config)).any():
                continue
            changed = ids.copy()
            changed[:, t] = np.where(ids[:, t] == separator(config), 100, separator(config))
            if t % 2:
                changed[:, t + 1 :] = np.roll(ids[:, t + 1 :], 3, axis=1)
            np.testing.assert_array_equal(run(changed)[:, : t + 1], base[:, : t + 1])


@pytest.mark.parametrize("name", ["space", "fixed", "byte"])
def test_plans_equal_torch(name):
    config, ids, budgets = CONFIGS[name], text_ids(CONFIGS[name]), (5, LENGTH)
    ids[1, 20:] = ids[2, 13:16] = config.vocab.pad_id  # at the end of a row, and of a line

    @jax.jit
    def plans(ids: Any) -> Any:
        segment_starts = segment_starts_of(ids, config)
        shifted = shift_right(ids, config.vocab.bos_id, segment_starts)
        starts = patching.patch_starts(config, shifted, None, segment_starts)
        counted = patching.present(shifted, config.vocab, segment_starts)
        return counted, [patching.plan_patches(starts, counted, n, segment_starts) for n in budgets]

    counted, ours_by_budget = plans(ids)
    assert counted[2, 23:].all() and not counted[1, 21:].any()
    for budget, ours in zip(budgets, ours_by_budget, strict=True):
        theirs = torch_plan(tiny(name)[2], ids, budget)
        for field, a, b in zip(ours._fields, ours, theirs, strict=True):
            np.testing.assert_array_equal(a, b, field)
        assert (ours.lengths.sum(axis=1) == counted.sum(axis=1)).all()
        assert (np.asarray(ours.overflow) > 0).any() == (budget == 5)


def torch_plan(twin: Any, ids: np.ndarray, budget: int) -> Any:
    """The torch twin's patches."""
    config, tensor = twin.config, torch.from_numpy(ids).long()
    segment_starts = torch_entropy.segment_starts_of(tensor, config)
    shifted = torch_entropy.shift_right(tensor, config.vocab.bos_id, segment_starts)
    starts = torch_patching.patch_starts(
        config, shifted, twin.entropies(shifted, segment_starts), segment_starts
    )
    counted = torch_patching.present(shifted, config.vocab, segment_starts)
    return torch_patching.plan_patches(starts, counted, budget, segment_starts)


def test_lines_past_the_budget_stay_apart(x64):
    """They merge into the patch that nobody reads, are counted, and see no other line."""
    (run,), config = forwards("entropy, small budget"), CONFIGS["entropy, small budget"]
    ids = text_ids(config)
    output = tiny("entropy, small budget")[2].outputs(torch.from_numpy(ids).long())
    assert (output.metrics["patch_overflow"] > 0).all()
    base = output.logits.detach().numpy()
    whole = forwards("entropy")[0](ids)
    last = segment_starts(config, ids[0])[-1]
    assert relative(base[0, :4], whole[0, :4]) <= LOGITS["float64"]
    assert relative(base[0, last:], whole[0, last:]) > LOGITS["float64"], "past the budget"
    changed = ids.copy()
    changed[0, 1:last:3] = separator(config)
    changed[0, last - 1] = separator(config)
    np.testing.assert_array_equal(run(changed)[0, last:], base[0, last:])


# ---- cached decoding ----------------------------------------------------------------------------

FILLED = 24


@functools.cache
def decoder(name: str) -> Any:
    """(params, prompt [B, FILLED], ids [B, T], first, lengths, tilt) → (cache, ids, logits).

    The prompt is written in one pass; then come rounds from `first` on, in which a row takes its
    own ids up to its length and behind it the likeliest, newlines being likelier by `tilt`.
    """
    config = CONFIGS[name]
    bind, _ = define_model(config)

    def run(params: Params, prompt: Any, ids: Any, first: Any, lengths: Any, tilt: Any) -> Any:
        model = bind(params)

        def body(index: Any, carry: Any) -> Any:
            cache, ids, logits = carry
            previous = jax.lax.dynamic_slice_in_dim(ids, jnp.maximum(index - 1, 0), 1, axis=1)
            forced = jax.lax.dynamic_index_in_dim(ids, index, axis=1, keepdims=False)
            seen = []

            def choose(row: Any, i: int) -> Any:
                seen.append(row)
                likeliest = (row + tilted(config, tilt)[None]).argmax(axis=-1)
                return jnp.where(index < lengths, forced, likeliest.astype(jnp.int32))

            cache, chosen = model.decode_round(cache, previous, index, choose)
            ids = jax.lax.dynamic_update_slice_in_dim(ids, chosen, index, axis=1)
            logits = jax.lax.dynamic_update_slice_in_dim(logits, seen[0][:, None], index, axis=1)
            return cache, ids, logits

        cache = model.prefill(prompt, model.init_cache(3, LENGTH))
        logits = jnp.zeros((3, LENGTH, config.vocab.size))
        return jax.lax.fori_loop(first, LENGTH, body, (cache, ids, logits))

    return jax.jit(run, compiler_options=QUICK)


def tilted(config: Any, tilt: Any) -> Any:
    """What is added to the logits: newlines are likelier, what is no byte is out."""
    known = jnp.arange(config.vocab.size)
    return jnp.where(known < config.vocab.offset, -jnp.inf, tilt * (known == separator(config)))


@pytest.mark.parametrize("name", CACHED)
def test_forced_rounds_give_the_logits_of_the_whole_pass(name, x64):
    config, params, twin = tiny(name)
    ids = text_ids(config)
    expected = forwards(name)[0](ids)
    everything = np.full(3, LENGTH, np.int32)
    for first in (0, 12, 13, FILLED):
        # What the prefill wrote from `first` on is junk that the rounds must write once more.
        junk = np.roll(ids, 1, axis=0)
        prompt = np.where(np.arange(LENGTH) < first, ids, junk)[:, :FILLED]
        cache, _, actual = decoder(name)(params, prompt, ids, first, everything, 0.0)
        assert relative(actual[:, first:], expected[:, first:]) <= LOGITS["float64"], first
        np.testing.assert_array_equal(cache.segment_starts, [line_of(config, row) for row in ids])
        if name != "model" and first == 0:
            # Lines end patches that nobody will read: the global transformer runs for no others.
            plan = torch_plan(twin, ids, config.budget(LENGTH))
            numbers = plan.numbers[:, :-1]
            ends = (plan.read_of == numbers) & (numbers < config.budget(LENGTH))
            assert int(cache.global_calls) == int(ends.any(dim=0).sum())
            assert ends[:, :-1].sum() < (numbers.diff() > 0).sum()


def line_of(config: Any, row: np.ndarray) -> np.ndarray:
    """The position at which the line of each position begins."""
    known = np.array(segment_starts(config, row))
    return known[np.searchsorted(known, np.arange(LENGTH), side="right") - 1]


@pytest.mark.parametrize("name", CACHED)
def test_greedy_bytes_are_those_of_whole_passes(name, x64):
    config, params, _ = tiny(name)
    (run, *_), newlines = forwards(name), 0
    for first, tilt in ((0, 4.0), (10, 0.0), (12, 4.0)):
        lengths = np.array([first, first + 3, first + 7], np.int32)
        inside = np.arange(LENGTH)[None] < lengths[:, None]
        ids = np.where(inside, text_ids(config), config.vocab.pad_id)
        _, actual, _ = decoder(name)(params, ids[:, :FILLED], ids, first, lengths, tilt)
        end, more = min(LENGTH, first + 14), np.asarray(tilted(config, tilt))
        for t in range(first, end):
            chosen = (run(ids)[:, t] + more).argmax(axis=-1)
            ids[:, t] = np.where(t < lengths, ids[:, t], chosen)
        np.testing.assert_array_equal(actual[:, :end], ids[:, :end])
        newlines += (ids[:, :end] == separator(config))[~inside[:, :end]].sum()
    assert newlines > 5


# ---- configuration ------------------------------------------------------------------------------


def test_room_for_lines():
    """Two patches per line of 16 bytes more than without resets, where no budget is given."""
    for patcher in ("space", "fixed"):
        config = dataclasses.replace(TINY, patcher=patcher, patch_budget=0.0, patch_size=6)
        more = resetting(config).budget(4800) - config.budget(4800)
        assert abs(more - 600) < 16
    assert resetting(dataclasses.replace(TINY, patcher="byte")).budget(48) == 48
    assert resetting(dataclasses.replace(TINY, patcher="fixed", patch_size=6)).budget(48) == 48


def test_the_entropy_model_resets_with_its_blt():
    with pytest.raises(ValueError, match=r"entropy.reset_on='none': must be .* 'newline'; give"):
        dataclasses.replace(TINY, reset_on="newline")
