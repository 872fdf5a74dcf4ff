"""What `bytelm generate` prints, without a model."""

import json

import numpy as np

from bytelm import recipes
from bytelm.generation.completion import Completion
from bytelm_jax.cli.generation import _as_json, _write_text

HALF = "ab€".encode()[:-1]


def test_a_character_that_the_prompt_began_is_printed_whole(capsysbinary):
    _write_text([b"\xac", b" z\xff"], recipes.get("megabyte_tiny"), HALF)
    assert capsysbinary.readouterr().out.decode() == "ab€ z\ufffd\n"
    logs = np.array([-1.5, -0.25, 0.0], np.float32)
    row = json.loads(_as_json(Completion(b"\xac z", logs, "stop", 3, 24, 1), HALF))
    assert row["text"] == "€ z" and bytes.fromhex(row["bytes"]) == b"\xac z"
    assert row["log_probs"] == [-1.5, -0.25, 0.0] and row["end"] == "stop"
