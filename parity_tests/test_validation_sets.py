"""Validation sets of the user's choice in the PyTorch trainer: their figures are those of JAX."""

import jax
import jax.numpy as jnp

from bytelm import tolerances
from bytelm.data import evaluation_batches
from bytelm.metrics import comparable, read_metrics
from bytelm.run_data import open_windows
from bytelm.runs import load_recipe
from bytelm_jax.interop import convert
from bytelm_jax.models import define_model
from bytelm_jax.training.evaluate import evaluate_batches, make_row_nats
from bytelm_jax.training.mesh import make_mesh, place
from bytelm_torch import train
from parity_tests.tiny_models import CONFIGS

MODEL = CONFIGS["megabyte"]


def test_the_figures_of_validation_sets_are_those_of_jax(tmp_path):
    for name in "abcd":
        (tmp_path / name).write_bytes(b"".join(b"%d%s" % (i, name.encode()) for i in range(99)))
    params = jax.jit(define_model(MODEL)[1], static_argnums=0)(0)
    convert.export_model(MODEL, params, tmp_path / "start")
    command = ["megabyte_tiny", f"train.init_from={tmp_path}/start", "train.steps=1"]
    command += ["train.batch_size=4", "data.sequence_length=15", "--run-dir", str(tmp_path / "run")]
    sets = [f"one={tmp_path}/a", f"two={tmp_path}/b", f"one={tmp_path}/c"]
    assert train.main([*command, "--data", str(tmp_path / "d"), "--valid", *sets]) == 0
    record = comparable(read_metrics(tmp_path / "run" / "metrics.jsonl"))[-1]

    _, params = convert.load_export(tmp_path / "run" / "checkpoints" / "1")
    bind, mesh = define_model(MODEL)[0], make_mesh(1)
    row_nats = make_row_nats(bind, MODEL.vocab.pad_id, mesh, jnp.dtype("float32"))
    found = open_windows(load_recipe(tmp_path / "run")).validation
    assert list(found) == ["one", "two"]
    for name, windows in found.items():
        batches = evaluation_batches(windows, 4)
        bits = evaluate_batches(row_nats, place(mesh, params), batches, mesh).bits_per_byte
        theirs = record.pop(f"validation_bits_per_byte/{name}")
        assert abs(theirs - bits) <= tolerances.DEVICES_AFTER_5_STEPS * bits, name
    assert not any("/" in key for key in record)
