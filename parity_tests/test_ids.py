"""Ids of any integer dtype mean the same to every model and loss; other dtypes are refused."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
import torch

from bytelm.config import BLTConfig, ByteVocab, LFByteConfig, ModelConfig, model_from_dict, to_dict
from bytelm_jax.layers import embedding, ids, ngram, resets
from bytelm_jax.models import abstract_params, define_model, patching
from bytelm_jax.training import evaluate, loss
from bytelm_jax.training import mesh as meshes
from bytelm_torch.layers import embedding as torch_embedding
from bytelm_torch.layers import ids as torch_ids
from bytelm_torch.layers import ngram as torch_ngram
from bytelm_torch.layers import resets as torch_resets
from bytelm_torch.models import build_model as build_torch
from bytelm_torch.models import patching as torch_patching
from bytelm_torch.training import evaluate as torch_evaluate
from bytelm_torch.training import loss as torch_loss
from parity_tests.test_blt import CONFIGS as BLTS
from parity_tests.twins import MEGABYTES

DTYPES = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")
BOTH = pytest.mark.parametrize("package", ["jax", "torch"])

# As uint8, BOS is the byte "(", a pad ")" and the end of a document "*".
VOCAB = ByteVocab(size=300, offset=0, bos_id=296, pad_id=297, eos_id=298)
TEXT = np.frombuffer(b"say (so) *or go* onin ()*, or(go)", np.uint8)[:32].reshape(2, 16)
FORMS: dict[str, ModelConfig] = {
    **MEGABYTES,
    "lfbyte": LFByteConfig(embed_dim=12, num_layers=1, adapt_dim=6, rank=3, token_mixing="none"),
    "entropy": BLTS["model"],
    "blt": BLTS["bytropix"],
}


def config_of(form: str) -> Any:
    """The model `form` with `VOCAB`; all but one start over with each document."""
    config: Any = FORMS[form]
    changes: dict[str, Any] = {"vocab": VOCAB}
    changes["reset_on"] = "none" if form == "paper" else "document"
    if isinstance(config, BLTConfig):
        changes["entropy"] = dataclasses.replace(config.entropy, **changes)
    return dataclasses.replace(config, **changes)


def array(package: str, values: Any) -> Any:
    return torch.from_numpy(np.array(values)) if package == "torch" else jnp.asarray(values)


# ---- models ---------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_a_jax_model_reads_ids_as_int32_alone(form: str) -> None:
    """So the program behind the conversion is that of int32, and so is every number."""
    config = config_of(form)
    bind, _ = define_model(config)

    def run(params: Any, rows: Any, previous: Any, chosen: Any) -> Any:
        model = bind(params)
        cache = model.prefill(rows, model.init_cache(*rows.shape))
        return model.outputs(rows), model.decode_round(cache, previous, 1, lambda *_: chosen)

    patch = config.patch_size if form == "paper" else 1
    shapes = TEXT.shape, (len(TEXT), patch), (len(TEXT),)
    inputs = [jax.ShapeDtypeStruct(shape, jnp.uint8) for shape in shapes]
    jaxpr = jax.make_jaxpr(run)(abstract_params(config), *inputs).jaxpr
    for variable in jaxpr.invars[-len(inputs) :]:
        readers = [each for each in jaxpr.eqns if any(v is variable for v in each.invars)]
        assert readers
        for each in readers:
            assert each.primitive.name == "convert_element_type", each
            assert each.params["new_dtype"] == jnp.int32


def test_a_jax_model_takes_the_bytes_of_a_text() -> None:
    config = dataclasses.replace(config_of("in_action"), reset_on="none")
    bind, init = define_model(config)
    params = jax.jit(init, static_argnums=0)(0)
    forward = jax.jit(lambda params, rows: bind(params)(rows))
    text = np.frombuffer(b"say (so) *or go* on", np.uint8)[None]
    expected = np.asarray(forward(params, text.astype(np.int32)))
    np.testing.assert_array_equal(np.asarray(forward(params, text)), expected)


@pytest.mark.parametrize("form", FORMS)
def test_a_torch_model_gives_the_same_logits_for_every_integer_dtype(form: str) -> None:
    torch.manual_seed(0)
    model: Any = build_torch(model_from_dict(to_dict(config_of(form)))).eval()
    start = model.round_length

    def run(dtype: str) -> list[torch.Tensor]:
        rows, rounds = torch.from_numpy(TEXT.astype(dtype)), []

        def choose(logits: torch.Tensor, i: int) -> torch.Tensor:
            rounds.append(logits)
            return rows[:, start + i]

        with torch.no_grad():
            cache = model.prefill(rows[:, :start], model.init_cache(*rows.shape))
            model.decode_round(cache, rows[:, :start], 1, choose)
            return [model(rows), *rounds]

    expected = run("int64")
    for dtype in DTYPES:
        for ours, theirs in zip(run(dtype), expected, strict=True):
            assert torch.equal(ours, theirs), dtype


# ---- what looks at ids by itself ------------------------------------------------------------


@BOTH
def test_losses(package: str) -> None:
    module = torch_loss if package == "torch" else loss
    logits = np.random.default_rng(0).standard_normal((*TEXT.shape, VOCAB.size)).astype(np.float32)
    logits = array(package, logits)
    expected: Any = None
    for dtype in ("int32", *DTYPES):
        rows = array(package, TEXT.astype(dtype))
        nats, count = module.cross_entropy(logits, rows, VOCAB.pad_id)
        each = np.asarray(module.token_nats(logits, rows))
        assert int(count) == TEXT.size, f"{dtype}: no byte is a pad"
        expected = (float(nats), each) if expected is None else expected
        assert float(nats) == expected[0], dtype
        np.testing.assert_array_equal(each, expected[1], dtype)


@BOTH
def test_evaluation_counts_every_byte(package: str) -> None:
    logits = np.zeros((*TEXT.shape, VOCAB.size), np.float32)
    if package == "torch":

        class Model(torch.nn.Module):
            def forward(self, rows: torch.Tensor) -> torch.Tensor:
                return torch.from_numpy(logits)

        row_nats = torch_evaluate.make_row_nats(Model(), VOCAB.pad_id, torch.float32, VOCAB.eos_id)
        nats = row_nats(torch.from_numpy(TEXT.copy())).numpy()
    else:
        mesh = meshes.make_mesh()
        jax_nats = evaluate.make_row_nats(
            lambda params: lambda rows: params["a.logits"],
            VOCAB.pad_id,
            mesh,
            jnp.dtype("float32"),
            VOCAB.eos_id,
        )
        nats, counts = jax.device_get(
            jax_nats({"a.logits": jnp.asarray(logits)}, jnp.asarray(TEXT))
        )
        assert counts.tolist() == [TEXT.shape[1]] * 2
    np.testing.assert_allclose(nats, TEXT.shape[1] * np.log(VOCAB.size), rtol=1e-6)


@BOTH
def test_patches_resets_hashes_and_embeddings(package: str) -> None:
    other = package == "torch"
    cutting = torch_patching if other else patching
    segment_starts = (torch_resets if other else resets).find_segment_starts
    hashed = (torch_ngram if other else ngram).polynomial_hash
    config: Any = dataclasses.replace(config_of("blt"), patcher="space")
    config = model_from_dict(to_dict(config)) if other else config
    table = np.random.default_rng(0).standard_normal((VOCAB.size, 4)).astype(np.float32)

    def gradient(rows: Any) -> Any:
        if not other:
            weigh = lambda table: (embedding.embed(table, rows) ** 2).sum()  # noqa: E731
            return jax.grad(weigh)(jnp.asarray(table))
        layer = torch_embedding.ByteEmbedding(VOCAB.size, 4, 1.0)
        layer.weight.data = torch.from_numpy(table)
        (layer(rows) ** 2).sum().backward()
        return layer.weight.grad

    def run(dtype: str) -> list[Any]:
        rows = array(package, TEXT.astype(dtype))
        results = [cutting.patch_starts(config, rows), cutting.shifted(rows, 2, VOCAB.pad_id)]
        results += [
            cutting.present(rows, config.vocab),
            segment_starts(rows, config.vocab, "document"),
        ]
        return [np.asarray(x) for x in (*results, hashed(rows, 1_000_000_007, 101), gradient(rows))]

    expected = run("int32")
    assert expected[2].all() and not expected[3].any(), "TEXT holds no special id"
    for dtype in ("int8", "uint8", "uint32"):
        for ours, theirs in zip(run(dtype), expected, strict=True):
            np.testing.assert_array_equal(ours, theirs, dtype)


# ---- refused --------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize(
    ("bad_ids", "expected"),
    [
        (np.zeros((1, 2), bool), "ids: dtype bool; give integers, such as int"),
        (np.zeros((1, 2), np.float32), "ids: dtype float32; give integers, such as int"),
        (np.zeros((1, 2), np.complex64), "ids: dtype complex64; give integers, such as int"),
        (np.zeros(2, np.uint8), r"ids: shape \(2,\); give rows of ids, \[B, T\]"),
        (np.array([[1, 300]], np.uint16), "ids: 300 is outside the vocabulary; give ids from 0"),
        (np.array([[-1, 1]], np.int8), "ids: -1 is outside the vocabulary"),
        (np.array([[2**32 + 65]]), f"ids: {2**32 + 65} is outside the vocabulary"),
        (np.array([[65, 2**32 - 1]], np.uint32), f"ids: {2**32 - 1} is outside the vocabulary"),
        (np.array([[2**64 - 1]], np.uint64), f"ids: {2**64 - 1} is outside the vocabulary"),
    ],
)
def test_what_is_no_id_is_refused_in_one_line(
    package: str, bad_ids: np.ndarray, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as it is for users
    check: Any = (torch_ids if package == "torch" else ids).check_ids
    with pytest.raises(ValueError, match=f"^{expected}") as caught:
        check(torch.from_numpy(bad_ids) if package == "torch" else bad_ids, VOCAB.size)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("dtype", "number"), [("uint32", 2**32 - 1), ("int64", 2**32 + 65), ("int64", 65 - 2**32)]
)
def test_a_wide_id_in_a_compiled_program_becomes_no_other(
    dtype: str, number: int, x64: None
) -> None:
    converted = jax.jit(ids.as_ids)(jnp.asarray([[number]], dtype))
    assert converted.dtype == jnp.int32
    row = embedding.embed(jnp.zeros((300, 2)), converted)
    assert np.isnan(np.asarray(row)).all()
