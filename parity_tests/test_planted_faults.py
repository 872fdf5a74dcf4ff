"""`bytelm parity` names the faulty layer for every fault of parity_tests/faults.py."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from bytelm.config import LFByteConfig
from bytelm_jax.cli import main as cli
from bytelm_jax.interop import convert
from bytelm_jax.models import abstract_params
from bytelm_jax.parity import recording
from bytelm_jax.parity.recording import ArrayStore
from parity_tests import faults


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return faults.Bench(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("name", faults.MODELS)
def test_without_a_fault_the_twins_are_equal(name, bench):
    assert bench.run(name, None) == (0, "equal: every tensor within tolerance")


@pytest.mark.parametrize("fault", faults.FAULTS, ids=lambda fault: fault[0])
def test_the_faulty_layer_is_named(fault, bench):
    _, name, expected, plant = fault
    code, line = bench.run(name, plant)
    assert (code, faults.named(line)) == (1, expected)


def test_the_faults_are_of_many_kinds():
    assert len({what for what, *_ in faults.FAULTS}) == len(faults.FAULTS) >= 20
    assert len({layer for _, _, layer, _ in faults.FAULTS}) >= 20


def test_an_encoder_is_compared_but_does_not_generate(tmp_path, capsys):
    config = LFByteConfig.original(embed_dim=4, num_layers=1, adapt_dim=2, num_experts=2)
    source = np.random.default_rng(0)
    leaves = abstract_params(config).items()
    params = {
        name: jnp.asarray(source.standard_normal(leaf.shape), jnp.float32) for name, leaf in leaves
    }
    convert.export_model(config, params, tmp_path / "out")
    (tmp_path / "text").write_bytes(b"an encoder sees every byte")
    options = ["--data", str(tmp_path / "text"), "--length", "9"]
    assert cli.main(["parity", str(tmp_path / "out"), *options]) == 0
    output = capsys.readouterr().out
    assert "left out  generation: causal=False, an encoder does not generate" in output
    assert output.endswith("equal: every tensor within tolerance\n")


@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_a_name_that_no_longer_exists_is_not_passed_over(framework, monkeypatch):
    """A function or method to record that was renamed would leave the report emptier."""
    models = {"jax": nnx.Dict(), "torch": torch.nn.Identity()}
    listen = getattr(recording, f"listen_{framework}")

    def start():
        with listen(models[framework], lambda key, value: value):
            pass

    start()
    with monkeypatch.context() as patch:
        patch.setattr(recording, "METHODS", (*recording.METHODS, "extends"))
        with pytest.raises(AttributeError, match=f"no layer of bytelm_{framework} .* extends"):
            start()
    with monkeypatch.context() as patch:
        patch.setitem(recording.FUNCTIONS, "models.patching", ("histogram_entropies",))
        with pytest.raises(AttributeError, match=f"bytelm_{framework}.models.patching.*entropies"):
            start()
    start()  # and nothing stays replaced


def test_what_torch_did_waits_in_files():
    value = np.random.default_rng(0).standard_normal((3, 2))
    with ArrayStore() as store:
        store["a"], store["b"], store["c"] = value, value > 0, np.array(1.0)
        assert (store["a"] == value).all() and store["b"].dtype == bool and store["c"].shape == ()
        store["a"] = value + 1
        del store["b"]
        assert set(store) == {"a", "c"} and (store["a"] == value + 1).all() and "b" not in store
