"""The README.md of an exported model: what it is, how it was trained, how good it is."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from bytelm.config import Recipe, require
from bytelm.metrics import METRIC

_LOAD = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(DIR, trust_remote_code=True)
inputs = tokenizer("Once upon", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0], skip_special_tokens=True))
```

`DIR` is this folder. It needs torch and transformers alone; `trust_remote_code=True` runs
`modeling_bytelm.py`, which is beside this file. The tokenizer turns each byte of UTF-8 into one id,
and no text into a special id. `bytelm import DIR --out RUN` makes a run folder of it."""


_LOAD_BLT = """```python
from transformers import AutoTokenizer, BltForCausalLM

model = BltForCausalLM.from_pretrained(DIR)
tokenizer = AutoTokenizer.from_pretrained(DIR)
inputs = tokenizer("Once upon", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0], skip_special_tokens=True))
```

`DIR` is this folder. It needs torch and transformers alone, whose own class this is. The tokenizer
turns each byte of UTF-8 into one id, puts BOS before a text, and makes no text a special id.
`bytelm import DIR --out RUN` makes a run folder of it."""

_UNCHECKED_BLT = "Not checked when this folder was written."

_UNCHECKED = (
    "Not checked when this folder was written. `bytelm parity DIR` compares its weights in JAX and "
    "in PyTorch, layer by layer."
)


def model_card(
    recipe: Recipe,
    step: int,
    licence: str,
    records: Sequence[Mapping[str, Any]],
    parity: str = "",
    own_code: bool = True,
) -> str:
    """The text of the card; `records` are those of the run's `metrics.jsonl`.

    `parity` says what was compared, and with which result; empty if nothing was. `own_code` says
    that the folder holds the model's code; otherwise it is of transformers' own BLT class.

    Data are named by the last part of their paths, or by a public address.
    """
    model, title = recipe.model, recipe.name
    longest = model.longest_input
    unchecked = _UNCHECKED if own_code else _UNCHECKED_BLT
    limit = "any length" if longest is None else f"up to {longest - 1:,} bytes"
    lines = [
        *("---", f"license: {licence}", "library_name: transformers"),
        *("pipeline_tag: text-generation", "tags:", "- byte-level", "- bytelm", "---", ""),
        *(f"# {title}", ""),
        f"A byte-level language model of architecture `{model.architecture}` with "
        f"{model.parameter_count():,} parameters, for texts of {limit}. "
        "It has no tokenizer but the bytes themselves.",
        *("", "## Use", "", _LOAD if own_code else _LOAD_BLT, "", "## Training", ""),
        *_training(recipe, step),
        *("", "## Bits per byte", "", *_bits(step, records)),
        *("", "## Parity", "", parity or unchecked, ""),
    ]
    return "\n".join(lines)


def check_licence(licence: str) -> None:
    """Raises `ValueError` for what is no identifier, such as mit or apache-2.0; empty passes."""
    plain = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,63}|", licence)
    require(plain is not None, f"license={licence!r}: give an identifier, such as mit")


def _training(recipe: Recipe, step: int) -> list[str]:
    data, train = recipe.data, recipe.train
    if step == 0:
        return ["These weights were imported or are untrained: this run took no step."]
    named = [_short(path) for path in data.paths] or ["Python's standard library (its source)"]
    seen = step * train.batch_size * data.sequence_length
    lines = [
        f"- Data: {', '.join(named)}",
        f"- Steps: {step:,} of {train.batch_size} windows of {data.sequence_length:,} bytes, "
        f"{seen:,} bytes in all",
        f"- Optimizer: {recipe.optimizer.name}",
    ]
    if train.init_from:
        lines.append(f"- Started from: {_short(train.init_from)}")
    return lines


def _bits(step: int, records: Sequence[Mapping[str, Any]]) -> list[str]:
    found = [r for r in records if r.get("step", step + 1) <= step and r.get(METRIC) is not None]
    if not found:
        return ["Not known: the run has no validation at or before this step."]
    last = found[-1]
    lines = [f"{last[METRIC]:.4f} on the run's validation data at step {last['step']:,}."]
    for key, value in last.items():
        if key.startswith(f"{METRIC}/") and value is not None:
            lines.append(f"- `{key.partition('/')[2]}`: {value:.4f}")
    return lines


def _short(path: str) -> str:
    """A path's last part, since the place of somebody's files is private; public addresses whole.

    What follows `?` in an address may hold a password.
    """
    name, equals, place = path.partition("=")
    place = (place if equals else name).partition("?")[0]
    public = place.startswith(("hf://", "https://"))
    short = place if public else place.rstrip("/").rpartition("/")[2]
    return f"`{name}={short}`" if equals else f"`{short}`"
