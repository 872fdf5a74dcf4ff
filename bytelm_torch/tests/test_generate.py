"""Cached decoding against a full pass for every byte; the samplers are checked against JAX's."""

import pytest
import torch

from bytelm.config import MegabyteConfig
from bytelm.sampling import SamplerConfig
from bytelm_torch.inference.generate import complete, generate, generate_uncached, stream
from bytelm_torch.inference.sampling import probabilities
from bytelm_torch.models.megabyte import Megabyte
from bytelm_torch.models.megabyte_decoding import MegabyteCache

PATCH, MAX_LENGTH = 4, 40
TEXT = b"Patches of 4: \xc3\xa9!"
PROMPTS = [TEXT[:length] for length in range(4 * PATCH + 1)]
RAGGED = [TEXT[:length] for length in (6, 16, 9, 4, 5, 7, 12, 16)]
VARIANTS = ["paper", "in_action"]
GREEDY = SamplerConfig(sampler="greedy")
PLAIN = SamplerConfig()
CUT = SamplerConfig(temperature=1.5, top_k=40, top_p=0.9)
MIXED = SamplerConfig(sampler="entropy", temperature=2.0)


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
    torch.manual_seed(0)
    model = kind(config)
    for name, bias in biases.items():
        model.to_logits.bias.data[getattr(config.vocab, name)] += bias
    return model


@pytest.fixture(scope="module")
def models():
    return {variant: tiny(variant) for variant in VARIANTS}


def one_by_one(model, prompts, new):
    return [generate(model, [prompt], new, GREEDY)[0] for prompt in prompts]


def assert_cached_equals_uncached(model, prompts, new):
    generated = one_by_one(model, prompts, new)
    assert generated == generate_uncached(model, prompts, new, GREEDY)
    return generated


@pytest.mark.parametrize("variant", VARIANTS)
def test_cached_equals_uncached_at_every_prompt_length(models, variant):
    new = MAX_LENGTH - 4 * PATCH  # up to the last position of the paper variant
    generated = assert_cached_equals_uncached(models[variant], PROMPTS, new)
    assert len(set(generated)) == len(generated)  # the prompt matters
    assert len(set(b"".join(generated))) > 20  # and what comes out is no constant
    assert generate(models[variant], PROMPTS, new, GREEDY) == generated  # nor do neighbours
    assert generate(models[variant], RAGGED, new, GREEDY) == one_by_one(
        models[variant], RAGGED, new
    )


def test_a_cache_with_one_layer_unwritten_is_noticed():
    class Stale(Megabyte):
        def decode_round(self, cache, previous, index, choose):
            last = MegabyteCache((cache.layers[0], *map(self._copy, cache.layers[1:])))
            _, ids = super().decode_round(last, previous, index, choose)
            return cache, ids

        def _copy(self, layer):
            return type(layer)(*(part.clone() for part in layer))

    stale = tiny("paper", kind=Stale)
    with pytest.raises(AssertionError):
        assert_cached_equals_uncached(stale, RAGGED, 24)


@pytest.mark.parametrize("sampler", [PLAIN, CUT, MIXED])
def test_sampled_cached_equals_uncached(models, sampler):
    generated = generate(models["paper"], RAGGED, 24, sampler, seed=5)
    assert generated == generate_uncached(models["paper"], RAGGED, 24, sampler, seed=5)
    assert generated != generate(models["paper"], RAGGED, 24, GREEDY)


def test_the_smallest_top_p_is_greedy():
    logits = torch.eye(3, dtype=torch.float32)
    assert torch.equal(probabilities(logits, SamplerConfig(top_p=1e-300)), logits)


def test_end_of_sequence_ends_a_row():
    model = tiny("paper", eos_id=9.0)
    generated = generate(model, RAGGED, 24, PLAIN, seed=1)
    assert len({len(new) for new in generated}) > 3
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
    model, prompts = models["in_action"], [TEXT[:6]] * 4
    generated = generate(model, prompts, 80, PLAIN, seed=7)
    assert generated == generate(model, prompts, 80, PLAIN, seed=7)
    assert len(set(generated)) > 1  # equal prompts, different rows
    other = generate(model, prompts, 80, PLAIN, seed=8)
    assert not set(generated) & set(other)  # no row of one seed is a row of the next
    for shorter in (10, 60):  # within the first block of random numbers and past it
        cut = generate(model, prompts, shorter, PLAIN, seed=7)
        assert cut == [new[:shorter] for new in generated]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_torch_s_default_dtype_changes_no_sample(models, dtype):
    expected = generate(models["paper"], [TEXT[:4]], 12, PLAIN, seed=3)
    torch.set_default_dtype(dtype)
    try:
        assert generate(models["paper"], [TEXT[:4]], 12, PLAIN, seed=3) == expected
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_global_generator_is_left_alone(models):
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    generate(models["paper"], RAGGED, 5, PLAIN)
    assert torch.equal(torch.rand(3), expected)


def test_neighbours_change_nothing(models):
    model = models["paper"]
    generated = generate(model, RAGGED, 20, PLAIN, seed=7)
    other = [prompt if i in (2, 5) else TEXT[:4] for i, prompt in enumerate(RAGGED)]
    changed = generate(model, other, 20, PLAIN, seed=7)
    assert [generated[i] for i in (2, 5)] == [changed[i] for i in (2, 5)]
    assert generated[1] != changed[1]


@pytest.mark.parametrize("sampler", [GREEDY, PLAIN])
def test_streamed_pieces_add_up(models, sampler):
    for prompt in (b"", TEXT[:6], TEXT[:8]):
        whole = generate(models["paper"], [prompt], 23, sampler, seed=3)[0]
        for chunk, count in {1: 7, 4: 7, 9: 4, 64: 1}.items():
            pieces = list(stream(models["paper"], prompt, 23, sampler, seed=3, chunk_bytes=chunk))
            assert b"".join(pieces) == whole
            assert all(pieces)
            # Bytes 6 to 29 lie in patches 1 to 7; a chunk of 9 is two patches.
            if prompt == TEXT[:6] and len(whole) == 23:
                assert len(pieces) == count


def test_the_model_and_the_caller_are_left_as_they_were():
    model = tiny("paper")
    model.train()
    model.to_logits.eval()  # a part that its owner froze
    before = [module.training for module in model.modules()]
    generate(model, RAGGED[:2], 5, GREEDY)
    generate_uncached(model, RAGGED[:2], 5, GREEDY)
    assert [module.training for module in model.modules()] == before
    for _ in stream(model, TEXT, 9, GREEDY, chunk_bytes=4):
        assert [module.training for module in model.modules()] == before
        assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()
    vars(model)["decode_round"] = None
    with pytest.raises(TypeError):
        generate(model, RAGGED[:2], 5, GREEDY)
    assert [module.training for module in model.modules()] == before
    assert not torch.is_inference_mode_enabled()


def test_dropout_is_off():
    model = tiny("paper")
    expected = generate(model, RAGGED, 11, GREEDY)
    for module in model.modules():
        if hasattr(module, "rate"):
            vars(module)["rate"] = 0.5
    model.train()
    assert generate(model, RAGGED, 11, GREEDY) == expected
    assert generate_uncached(model, RAGGED, 11, GREEDY) == expected


def test_requests_that_cannot_work_are_refused(models):
    message = "prompts: 17 bytes and max_new_bytes=24 make 41, .* max_length=40"
    for call in (generate, generate_uncached):
        with pytest.raises(ValueError, match=message):
            call(models["paper"], [b"", TEXT], 24)
        with pytest.raises(ValueError, match="max_new_bytes=-1"):
            call(models["paper"], [b""], -1)
        with pytest.raises(ValueError, match="seed=4294967296"):
            call(models["paper"], [b""], 1, seed=2**32)
        assert call(models["paper"], [], 10) == []
        assert call(models["paper"], [b"a", b""], 0) == [b"", b""]
    with pytest.raises(ValueError, match=message):
        stream(models["paper"], TEXT, 24)  # at the call, not at the first piece
    with pytest.raises(ValueError, match="chunk_bytes=0"):
        stream(models["paper"], b"", 1, chunk_bytes=0)
    assert list(stream(models["paper"], b"a", 0)) == []
    long = generate(models["in_action"], [TEXT], 30, GREEDY, stop_at_eos=False)
    assert len(long[0]) == 30  # in_action has no limit


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
