"""Generation, JAX against torch: samplers on the same numbers, greedy bytes of the same model."""

import inspect

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import bytelm
from bytelm.config import ByteVocab, EntropyConfig, MegabyteConfig
from bytelm.config import ByteVocab as TorchVocab
from bytelm.tolerances import LOGITS
from bytelm_jax.inference import generate as generation
from bytelm_jax.inference import rounds
from bytelm_jax.inference import sampling as ours
from bytelm_jax.inference.generate import generate
from bytelm_jax.models import define_model
from bytelm_jax.models.entropy import EntropyModel
from bytelm_jax.models.interface import ByteModel
from bytelm_jax.parity.report import compare_twins
from bytelm_jax.parity.twins import make_twin
from bytelm_torch.inference import generate as torch_generation
from bytelm_torch.inference import sampling as theirs
from bytelm_torch.inference.generate import generate as torch_generate
from bytelm_torch.inference.generate import generate_uncached as torch_uncached
from bytelm_torch.models.entropy import EntropyModel as TorchEntropyModel
from bytelm_torch.models.interface import ByteModel as TorchByteModel
from parity_tests.twins import random_ids, random_params

TEXT = b"Patches of 4: \xc3\xa9!"
# No share here is met exactly by a number of equal probabilities: there rounding would decide.
SAMPLERS = [
    {"sampler": "greedy"},
    {"temperature": 0.0},
    {},
    {"temperature": 0.7},
    {"top_k": 10},
    {"top_p": 0.83, "temperature": 1.3},
    {"top_p": 1e-300},
    {"top_k": 40, "top_p": 0.96},
    {"sampler": "entropy"},
    {"sampler": "entropy", "temperature": 0.6, "top_k": 30, "top_p": 0.87},
    {"sampler": "entropy", "entropy_low": 1.0, "entropy_medium": 3.0, "entropy_high": 6.0},
]


pytestmark = pytest.mark.usefixtures("quick_compilation")


def public(module):
    """Names and signatures of what a module defines, in its order."""
    defined = [
        (name, thing)
        for name, thing in vars(module).items()
        if not name.startswith("_") and getattr(thing, "__module__", "") == module.__name__
    ]
    return [(name, list(inspect.signature(thing).parameters)) for name, thing in defined]


def test_public_names_are_the_same_in_order():
    assert public(generation) == public(torch_generation)
    shared = ("probabilities", "sample", "next_ids")
    pairs = ((inspect.signature(getattr(m, name)) for m in (ours, theirs)) for name in shared)
    assert all(list(a.parameters) == list(b.parameters) for a, b in pairs)
    assert len(public(generation)) == 4
    assert ours.SamplerConfig is theirs.SamplerConfig is bytelm.SamplerConfig


def logits_of_every_entropy(rows, size):
    """Peaked and flat rows, with equal logits among them and an id ruled out."""
    source = np.random.default_rng(0)
    logits = source.normal(size=(rows, size)) * np.geomspace(0.01, 30, rows)[:, None]
    logits[::3] = np.round(logits[::3])
    logits[:, 5] = -np.inf
    return logits


@pytest.mark.parametrize("fields", SAMPLERS)
def test_samplers_agree(fields, x64):
    logits = logits_of_every_entropy(48, 259)
    uniform = np.random.default_rng(1).random(48)
    uniform[::6] = 1  # which a number below 1 may round to
    left = ours.probabilities(jnp.asarray(logits), ours.SamplerConfig(**fields))
    right = theirs.probabilities(torch.from_numpy(logits), theirs.SamplerConfig(**fields))
    assert left.dtype == jnp.float64 and right.dtype == torch.float64
    np.testing.assert_array_equal(np.asarray(left) > 0, right.numpy() > 0)
    np.testing.assert_allclose(left, right.numpy(), rtol=LOGITS["float64"])
    np.testing.assert_array_equal(
        ours.sample(left, jnp.asarray(uniform)),
        theirs.sample(right, torch.from_numpy(uniform)).numpy(),
    )
    for special in ({}, {"size": 264, "offset": 4, "pad_id": 3, "bos_id": 2, "eos_id": 1}):
        wide = logits_of_every_entropy(48, special.get("size", 512))
        for allow_eos in (True, False):
            np.testing.assert_array_equal(
                ours.next_ids(
                    jnp.asarray(wide),
                    jnp.asarray(uniform),
                    ours.SamplerConfig(**fields),
                    ByteVocab(**special),
                    allow_eos,
                ),
                theirs.next_ids(
                    torch.from_numpy(wide),
                    torch.from_numpy(uniform),
                    theirs.SamplerConfig(**fields),
                    TorchVocab(**special),
                    allow_eos,
                ).numpy(),
            )


@pytest.mark.parametrize("variant", ["paper", "in_action"])
def test_greedy_bytes_of_the_same_model_are_the_same(variant):
    config = MegabyteConfig(
        variant=variant,
        patch_size=4,
        global_dim=8,
        local_dim=16,
        max_length=40,
        global_layers=2,
        global_heads=2,
        local_layers=1,
        local_heads=2,
        init_std=0.3,
    )
    params = random_params(config, "float32")
    model, twin = define_model(config)[0](params), make_twin(config, params)
    options = {"max_new_bytes": 24, "stop_at_eos": False}
    left, right = ours.SamplerConfig(sampler="greedy"), theirs.SamplerConfig(sampler="greedy")
    prompts = [TEXT[:length] for length in (0, 3, 4, 16, 7, 5, 11)]
    # One by one here, as a ragged batch there.
    generated = [generate(model, [prompt], sampler=left, **options)[0] for prompt in prompts]
    assert generated == torch_generate(twin, prompts, sampler=right, **options)
    assert generated == torch_uncached(twin, prompts, sampler=right, **options)
    assert len(set(b"".join(generated))) > 20


def test_a_model_without_cached_decoding_generates_the_same_bytes(monkeypatch, x64):
    """By full passes; `bytelm parity` says that there is nothing cached to compare."""
    config = EntropyConfig(dim=12, layers=1, heads=2, hidden_dim=12, reset_on="newline")
    params = random_params(config, "float64")
    model, twin = define_model(config)[0](params), make_twin(config, params)
    prompts = [TEXT[:length] for length in (5, 3, 16)]  # a prefill, and none below

    def generated():
        # A program is known by the model's class, whose methods change below.
        rounds.prefill_program.cache_clear()
        rounds.append_program.cache_clear()
        for module, one in ((generation, model), (torch_generation, twin)):
            yield module.generate(one, prompts, 11, stop_at_eos=False)
            yield module.generate(one, [b"", *prompts], 11, stop_at_eos=False)
            yield b"".join(module.stream(one, TEXT, 11, seed=3, chunk_bytes=4))

    cached = list(generated())
    with monkeypatch.context() as patch:
        for kind, base in ((EntropyModel, ByteModel), (TorchEntropyModel, TorchByteModel)):
            for name in ("init_cache", "prefill", "extend"):
                patch.setattr(kind, name, vars(base)[name])
        assert list(generated()) == cached
        report = compare_twins(config, params, twin, random_ids(config, 2, 9), "float64")
    rounds.prefill_program.cache_clear()
    rounds.append_program.cache_clear()
    assert report.passed, report.text
    assert "ok   left out  cached decoding: the model has none" in report.lines
    assert not any("in cached decoding" in line for line in report.lines)
