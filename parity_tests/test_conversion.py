"""The two packages share one file format: same names, same bytes, same logits, same refusals."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor

import bytelm_torch
from bytelm.config import ModelConfig, model_from_dict, to_dict
from bytelm.tolerances import LOGITS
from bytelm_jax.interop import convert
from bytelm_jax.models import Params, abstract_params, cast_params, define_model
from bytelm_torch.models import build_model
from parity_tests.twins import MEGABYTES, random_ids

DTYPES = {"float32": torch.float32, "float64": torch.float64}
traced = functools.cache(abstract_params)


@pytest.fixture(autouse=True)
def traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes are the same every time, and tracing a model costs more than all the rest here."""
    monkeypatch.setattr(convert, "abstract_params", traced)


def twin_of(config: ModelConfig) -> Any:
    return build_model(model_from_dict(to_dict(config)))


def any_bits(config: ModelConfig, dtype: str, finite: bool = False) -> Params:
    """Parameters of random bits, with a signalling NaN, −0.0 and the smallest subnormals first.

    `finite` ones have subnormals where the bits say NaN or infinity.
    """
    source, kind = np.random.default_rng(0), jnp.dtype(dtype)
    unsigned, params = np.dtype(f"u{kind.itemsize}"), {}
    special = np.array([np.inf, -0.0], kind).view(unsigned)
    for name, leaf in traced(config).items():
        raw = np.frombuffer(source.bytes(leaf.size * kind.itemsize), unsigned).copy()
        raw[:4] = [special[0] + 5, special[1], 1, special[1] + 1]
        if finite:
            raw[(raw & special[0]) == special[0]] ^= special[0]
        params[name] = jnp.array(raw.view(kind).reshape(leaf.shape))
    return params


def any_values(config: ModelConfig, dtype: str) -> Params:
    """Ordinary random parameters, norms and biases among them."""
    source = np.random.default_rng(0)
    return {
        name: jnp.array(0.3 * source.standard_normal(leaf.shape), dtype)
        for name, leaf in traced(config).items()
    }


def jax_bits(params: Params) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {
        name: (value.dtype.name, value.shape, np.asarray(value).tobytes())
        for name, value in params.items()
    }


@pytest.mark.parametrize("variant", MEGABYTES)
def test_the_twin_has_the_same_tensors(variant: str) -> None:
    config = MEGABYTES[variant]
    theirs = {k: tuple(v.shape) for k, v in twin_of(config).state_dict().items()}
    converted = convert.to_torch(any_bits(config, "float32"))
    assert {name: value.shape for name, value in converted.items()} == theirs
    assert sum(value.size for value in converted.values()) == config.parameter_count()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", MEGABYTES)
def test_through_a_torch_model_and_back_every_bit_survives(
    variant: str, dtype: str, x64: None
) -> None:
    config = MEGABYTES[variant]
    params = any_bits(config, dtype)
    twin = twin_of(config).to(DTYPES[dtype])
    tensors = {name: torch.from_numpy(v) for name, v in convert.to_torch(params).items()}
    twin.load_state_dict(tensors, strict=True)
    state = {name: value.numpy() for name, value in twin.state_dict().items()}
    assert jax_bits(convert.from_torch(state, config)) == jax_bits(params)


@pytest.mark.parametrize("dtype", [*DTYPES, "bfloat16"])
@pytest.mark.parametrize("variant", MEGABYTES)
def test_through_files_of_both_packages_every_bit_survives(
    variant: str, dtype: str, x64: None, tmp_path: Path
) -> None:
    config = MEGABYTES[variant]
    params = any_bits(config, dtype, finite=True)
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    convert.export_model(config, params, ours)
    bytelm_torch.save_pretrained(bytelm_torch.from_pretrained(ours), theirs)
    again, loaded = convert.load_export(theirs)
    assert (again, jax_bits(loaded)) == (config, jax_bits(params))
    for name in ("model.safetensors", "config.json"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes()


@pytest.mark.parametrize("variant", MEGABYTES)
def test_an_exported_model_gives_the_same_logits(variant: str, x64: None, tmp_path: Path) -> None:
    config = MEGABYTES[variant]
    params = any_values(config, "float64")
    convert.export_model(config, params, tmp_path)
    ids = random_ids(config, 2, 13)
    bind, _ = define_model(config)
    ours = np.asarray(jax.jit(lambda p, i: bind(p)(i))(params, ids))
    with torch.no_grad():
        theirs = bytelm_torch.from_pretrained(tmp_path)(torch.from_numpy(ids)).numpy()
    assert ours.dtype == theirs.dtype == np.float64
    assert np.linalg.norm(ours - theirs) <= LOGITS["float64"] * np.linalg.norm(theirs)


def test_both_cast_norms_alike(tmp_path: Path) -> None:
    config = MEGABYTES["paper"]
    params = any_values(config, "float32")
    convert.export_model(config, params, tmp_path)
    loaded = bytelm_torch.from_pretrained(tmp_path, dtype=torch.bfloat16).state_dict()

    def kind(value: Tensor) -> str:
        return str(value.dtype).removeprefix("torch.")

    cast = convert.to_torch(cast_params(params, jnp.bfloat16))
    assert {k: kind(v) for k, v in loaded.items()} == {k: v.dtype.name for k, v in cast.items()}
    for name, value in cast.items():
        assert loaded[name].float().numpy().tobytes() == value.astype(np.float32).tobytes()


def drop(tensors: dict[str, Any], fields: dict[str, Any]) -> None:
    del tensors["to_logits.bias"]


def add(tensors: dict[str, Any], fields: dict[str, Any]) -> None:
    tensors["to_logits.scale"] = tensors["to_logits.bias"]


def turn(tensors: dict[str, Any], fields: dict[str, Any]) -> None:
    tensors["to_logits.weight"] = np.ascontiguousarray(tensors["to_logits.weight"].T)


def widen(tensors: dict[str, Any], fields: dict[str, Any]) -> None:
    fields["local_layers"] = 3


def misspell(tensors: dict[str, Any], fields: dict[str, Any]) -> None:
    fields["patch_sise"] = fields.pop("patch_size")


def outgrow(tensors: dict[str, Any], fields: dict[str, Any]) -> None:
    fields["global_layers"] = 10**6


def disown(tensors: dict[str, Any], fields: dict[str, Any]) -> None:
    del fields["library"]


def advance(tensors: dict[str, Any], fields: dict[str, Any]) -> None:
    fields["format_version"] = 3


def spoil(tensors: dict[str, Any], fields: dict[str, Any]) -> None:
    tensors["to_logits.bias"][3] = np.inf


@pytest.mark.parametrize(
    "damage", [drop, add, turn, widen, misspell, outgrow, disown, advance, spoil]
)
def test_both_refuse_the_same_damage_in_the_same_words(
    damage: Callable[..., None], tmp_path: Path
) -> None:
    config = MEGABYTES["in_action"]
    convert.export_model(config, any_bits(config, "float32", finite=True), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    fields = json.loads((tmp_path / "config.json").read_text())
    damage(tensors, fields)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(fields))
    errors = []
    for load in (convert.load_export, bytelm_torch.from_pretrained):
        with pytest.raises(ValueError) as caught:
            load(tmp_path)
        errors.append(str(caught.value))
    first = [text.split(" missing;")[0].rpartition(".")[0] for text in errors]
    assert first[0] == first[1] if damage is widen else errors[0] == errors[1]
    assert str(tmp_path) in errors[0] and "\n" not in errors[0]
