"""Conversion and exports: every bit, every name, and files that are damaged or cut short."""

from __future__ import annotations

import json
import os
import stat
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from bytelm.config import MegabyteConfig, to_dict
from bytelm.folders import check_replaceable
from bytelm_jax.interop import convert, formats
from bytelm_jax.tests.exports import (
    CONFIGS,
    PAPER,
    abstract_params,
    any_bits,
    bits,
    export,
    message,
    tensors,
    traced_once,  # noqa: F401, a fixture for every test
)

# ---- names and layouts ----------------------------------------------------------------------


def test_each_kind_of_leaf_has_its_name_and_layout() -> None:
    matrix = jnp.arange(6.0).reshape(2, 3)
    params = {
        "a.kernel": matrix,
        "b.0.embedding": matrix,
        "n.scale": matrix[0],
        "n.bias": matrix[1],
    }
    converted = convert.to_torch(params)
    assert {name: value.tolist() for name, value in converted.items()} == {
        "a.weight": [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]],
        "b.0.weight": [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]],
        "n.weight": [0.0, 1.0, 2.0],
        "n.bias": [3.0, 4.0, 5.0],
    }
    stacked = jnp.arange(24.0).reshape(2, 3, 4)  # experts and filters: alike in both packages
    alike = convert.to_torch({"e.kernels": stacked, "c.taps": matrix})
    assert {name: value.tolist() for name, value in alike.items()} == {
        "e.kernels": stacked.tolist(),
        "c.taps": matrix.tolist(),
    }
    assert message(convert.to_torch, {"a.gadget": matrix}).startswith(
        "a.gadget: a leaf must be one of"
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, jnp.bfloat16])
@pytest.mark.parametrize("variant", CONFIGS)
def test_round_trip_keeps_every_bit(variant: str, dtype: Any, x64: None, tmp_path: Path) -> None:
    config = CONFIGS[variant]
    params = any_bits(config, dtype, finite=False)
    assert bits(convert.from_torch(convert.to_torch(params), config)) == bits(params)
    params = any_bits(config, dtype)
    convert.export_model(config, params, tmp_path)
    again, loaded = convert.load_export(tmp_path)
    assert (again, bits(loaded)) == (config, bits(params))


def test_results_share_no_memory_with_what_they_came_from() -> None:
    params = any_bits(PAPER, np.float32)
    before = bits(params)
    converted = convert.to_torch(params)
    back = convert.from_torch(converted, PAPER)
    for value in converted.values():
        assert value.flags.c_contiguous and value.flags.writeable
        value[...] = 7.0
    assert bits(params) == before
    assert bits(back) == before


# ---- strict ---------------------------------------------------------------------------------


def without(state: dict[str, np.ndarray]) -> None:
    del state["local_embed.weight"]


def extra(state: dict[str, np.ndarray]) -> None:
    state["local_transformer.layers.1.attention.to_q.weight"] = np.zeros((8, 8), np.float32)


def transposed(state: dict[str, np.ndarray]) -> None:
    state["to_logits.weight"] = state["to_logits.weight"].T


def flat(state: dict[str, np.ndarray]) -> None:
    state["to_logits.bias"] = state["to_logits.bias"][None]


def integers(state: dict[str, np.ndarray]) -> None:
    state["to_logits.bias"] = np.zeros(512, np.int32)


def complexes(state: dict[str, np.ndarray]) -> None:
    state["to_logits.bias"] = np.zeros(512, np.complex64)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (without, "local_embed.weight: missing; expected shape (512, 8), floating point"),
        (extra, "local_transformer.layers.1.attention.to_q.weight: unexpected; "),
        (transposed, "to_logits.weight: shape (8, 512); expected (512, 8)"),
        (flat, "to_logits.bias: shape (1, 512); expected (512,)"),
        (integers, "to_logits.bias: dtype int32; expected float16, "),
        (complexes, "to_logits.bias: dtype complex64; expected float16, "),
    ],
)
def test_a_wrong_tensor_is_named(damage: Callable[..., None], expected: str) -> None:
    state = tensors()
    damage(state)
    assert message(convert.from_torch, state, PAPER).startswith(expected)


def test_float64_is_never_silently_rounded() -> None:
    state = tensors()
    state["to_logits.bias"] = np.full(512, 0.1)
    text = message(convert.from_torch, state, PAPER)
    assert text.startswith("to_logits.bias: dtype float64, and JAX's 64-bit mode is off; ")


def test_a_cast_to_float32_tells_what_it_rounded() -> None:
    cast = convert.Float32Cast()
    for dtype in (np.float32, np.float16, jnp.bfloat16, np.float64):
        exact = np.array([[0.5, -3.0, 0.0]] * 5, dtype)
        result = cast("exact", exact)
        assert result.dtype == np.float32 and (result == exact).all()
    assert (cast.rounding, cast.rounded) == (0.0, "")
    tiny = cast("tiny", np.array([[1e-44], [1e-300]]))  # below the normal range: no error of 100 %
    assert tiny.tolist() == [[np.float32(1e-44)], [0]] and cast.rounding <= 2**-24
    cast("worst", np.array([0.0, 1 + 2**-24]))  # halfway between two numbers
    cast("better", np.array([1.0, 0.1]))
    assert cast.rounded == "worst" and cast.rounding == pytest.approx(2**-24)
    assert not np.isfinite(cast("left to the reader", np.array([np.nan, -np.inf]))).any()
    assert message(cast, "large", np.array([1.0, -1e300])) == (
        "large: holds -1e+300, too large for float32"
    )


@pytest.mark.parametrize("dtype", [np.float64, np.float16, jnp.bfloat16])
def test_an_export_in_another_dtype_is_imported_as_float32(
    dtype: Any, x64: None, tmp_path: Path
) -> None:
    source = np.random.default_rng(0)
    params = {
        name: jnp.asarray(source.standard_normal(leaf.shape), dtype)
        for name, leaf in abstract_params(PAPER).items()
    }
    convert.export_model(PAPER, params, tmp_path)
    with jax.enable_x64(False):
        _, imported = formats.import_any(tmp_path)
    assert bits(imported) == bits({k: v.astype(jnp.float32) for k, v in params.items()})


def test_parameters_of_another_config_are_not_exported(tmp_path: Path) -> None:
    params = any_bits(PAPER, np.float32)
    text = message(convert.export_model, CONFIGS["in_action"], params, tmp_path / "out")
    assert text == "embed.embedding: missing; expected shape (512, 4), floating point"
    params["to_logits.bias"] = jnp.zeros(512, jnp.int32)
    text = message(convert.export_model, PAPER, params, tmp_path / "out")
    assert text.startswith("to_logits.bias: dtype int32; expected float16")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_what_is_not_finite_is_not_exported(value: float, tmp_path: Path) -> None:
    params = any_bits(PAPER, np.float32)
    params["to_logits.bias"] = params["to_logits.bias"].at[511].set(value)
    text = message(convert.export_model, PAPER, params, tmp_path / "out")
    assert text.startswith("to_logits.bias: holds NaN or infinity; ")
    assert not (tmp_path / "out").exists()


# ---- export ---------------------------------------------------------------------------------


def test_config_json_and_safetensors_are_what_the_contract_says(tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder"
    params = any_bits(PAPER, np.float32)
    convert.export_model(PAPER, params, out, {"step": 3})
    fields = json.loads((out / "config.json").read_text())
    head = {"library": "bytelm", "format_version": 1}
    assert fields == {**head, **to_dict(PAPER), "extra": {"step": 3}}
    with safe_open(out / "model.safetensors", framework="np") as opened:
        stored = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        assert opened.metadata().keys() == {"format", "sha256", "sha256_config"}
    assert bits(stored) == bits(convert.to_torch(params))
    usual = 0o666 & ~current_umask()
    assert {file.name for file in out.iterdir()} == {"model.safetensors", "config.json"}
    assert {stat.S_IMODE(file.stat().st_mode) for file in out.iterdir()} == {usual}


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_mixed_dtypes_lie_aligned(x64: None, tmp_path: Path) -> None:
    params = any_bits(PAPER, np.float32)
    for name, dtype in (("to_logits.bias", jnp.bfloat16), ("local_embed.embedding", jnp.float64)):
        params[name] = params[name].astype(dtype)
    convert.export_model(PAPER, params, tmp_path)
    data = (tmp_path / "model.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    del header["__metadata__"]
    widths = {"BF16": 2, "F32": 4, "F64": 8}
    starts = {(8 + size + t["data_offsets"][0]) % widths[t["dtype"]] for t in header.values()}
    assert starts == {0}
    assert bits(convert.load_export(tmp_path)[1]) == bits(params)


def test_export_and_load_hold_no_second_copy(tmp_path: Path) -> None:
    config = MegabyteConfig(
        patch_size=4, global_dim=64, global_layers=6, local_layers=0, max_length=8
    )
    leaves = abstract_params(config)
    params = {name: jnp.zeros(leaf.shape, leaf.dtype) for name, leaf in leaves.items()}
    total = 4 * config.parameter_count()
    largest = 4 * max(leaf.size for leaf in leaves.values())
    allowed = 3 * largest + 2**20
    assert allowed < total / 2
    for call in (
        lambda: convert.export_model(config, params, tmp_path),
        lambda: convert.load_export(tmp_path),
    ):
        call()  # caches of JAX and of the file's headers
        tracemalloc.start()
        call()
        peak = tracemalloc.get_traced_memory()[1]  # numpy and bytes, not JAX's own buffers
        tracemalloc.stop()
        assert peak < allowed


@pytest.mark.parametrize(
    ("value", "why"), [({1, 2}, "not JSON serializable"), (float("nan"), "not JSON compliant")]
)
def test_extra_must_be_json(value: Any, why: str, tmp_path: Path) -> None:
    arguments = (PAPER, any_bits(PAPER, np.float32), tmp_path / "out", {"it": value})
    text = message(convert.export_model, *arguments)
    assert text.startswith("extra: cannot be stored as JSON (") and why in text
    assert not (tmp_path / "out").exists()


def test_out_must_be_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    params = any_bits(PAPER, np.float32)
    text = message(convert.export_model, PAPER, params, tmp_path / "file")
    assert text.endswith("file: is a file; name a folder")
    text = message(convert.export_model, PAPER, params, tmp_path / "file" / "below")
    assert "below: cannot be written (Not a directory)" in text
    text = message(check_replaceable, tmp_path / "file" / "below", bool)
    assert text.endswith("below: file is no folder")
    assert (tmp_path / "file").read_text() == "mine"
    (tmp_path / "out" / "config.json").mkdir(parents=True)
    text = message(convert.export_model, PAPER, params, tmp_path / "out")
    assert "config.json: is a folder; " in text
    assert os.listdir(tmp_path / "out") == ["config.json"]


# ---- hostile files --------------------------------------------------------------------------


def test_import_any_tells_the_formats_apart(tmp_path: Path) -> None:
    export(tmp_path / "out", seed=3)
    for kind in ("auto", "bytelm"):
        config, params = formats.import_any(tmp_path / "out", kind)
        assert (config, bits(params)) == (PAPER, bits(any_bits(PAPER, np.float32, 3)))
    text = message(formats.import_any, tmp_path / "out", "hf")
    assert text == "format='hf': choose one of auto, bytelm, megabyte, hf-blt"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text('{"name": "megabyte_tiny"}')
    text = message(formats.import_any, tmp_path / "run")
    assert text.endswith("run/config.json: library=None: must be 'bytelm'")
    error = message(formats.import_any, tmp_path / "out" / "model.safetensors")
    assert error.endswith("g_embedder.weight: missing; expected in a MEGABYTE state dict")
