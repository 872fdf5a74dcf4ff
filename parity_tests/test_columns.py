"""Large n-gram tables, which `--fsdp` cuts by columns, are those of one device."""

import functools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from bytelm import tolerances
from bytelm.config import TrainConfig
from bytelm_jax.parity.report import relative_error
from bytelm_jax.tools.collectives import read_collectives
from bytelm_jax.training import mesh as meshes
from parity_tests.cases import quick
from parity_tests.test_tensor import MODELS, compile_step, step_of
from parity_tests.twins import random_ids

CONFIG = replace(MODELS["blt"], global_layers=1)
ROWS = CONFIG.ngram_tables * CONFIG.ngram_rows
TABLE = "encoder.ngrams.embedding"
LAYOUTS: list[dict[str, Any]] = [
    {"fsdp": 2, "devices": 4},
    {"fsdp": 4, "devices": 4, "parallel": "shard_map"},
    {"fsdp": 2, "devices": 8, "tensor": 2},
]


@pytest.fixture(autouse=True)
def large(monkeypatch):
    """604 rows are a large table."""
    monkeypatch.setattr(meshes, "_MIN_COLUMN_ROWS", ROWS)


@functools.cache
def expected() -> tuple[np.ndarray, float, dict[str, np.ndarray]]:
    """Ids with pads and n-grams that stand twice in a row; one device's loss and gradients."""
    ids = random_ids(CONFIG, 8, 24)
    ids[:, ::5] = 32 + CONFIG.vocab.offset
    ids[::3, 16:] = CONFIG.vocab.pad_id
    return ids, *step_of(CONFIG, ids, devices=1)


@pytest.mark.parametrize("layout", quick(LAYOUTS, LAYOUTS[1]), ids=str)
def test_it_computes_as_one_device(layout, x64):
    """The loss and all gradients."""
    ids, loss, gradients = expected()
    other, cut = step_of(CONFIG, ids, **layout)
    assert abs(other - loss) <= tolerances.LOGITS["float64"] * loss
    for leaf in [leaf for leaf, value in gradients.items() if np.any(value)]:
        error = relative_error(cut[leaf], gradients[leaf])
        assert error <= tolerances.GRADIENTS["float64"], leaf


@pytest.mark.parametrize("layout", quick(LAYOUTS, LAYOUTS[2]), ids=str)
def test_no_device_ever_holds_all_columns(layout):
    train = TrainConfig(steps=2, batch_size=8, **layout)
    state, compiled, mesh = compile_step(CONFIG, train, "float32", length=16)
    shape = state.params[TABLE].shape
    lies = state.params[TABLE].sharding.shard_shape(shape)
    assert lies == (ROWS // train.tensor, CONFIG.local_dim // train.fsdp)
    text = compiled.as_text()
    assert f"f32[{lies[0]},{lies[1]}]" in text
    assert f"f32[{lies[0]},{CONFIG.local_dim}]" not in text  # neither it nor its gradient
    assert "all-to-all" in {each.kind for each in read_collectives(text, mesh.size)}


def test_small_tables_and_odd_widths_are_gathered():
    mesh = meshes.make_mesh(4, 4)
    assert meshes.stays_cut(mesh, (ROWS, 32), TABLE)
    assert not meshes.stays_cut(mesh, (ROWS - 1, 32), TABLE)
    assert not meshes.stays_cut(mesh, (ROWS, 30), TABLE)
    assert not meshes.stays_cut(mesh, (ROWS, 32), "encoder.embed.embedding")
    assert not meshes.stays_cut(meshes.make_mesh(4, 1), (ROWS, 32), TABLE)
