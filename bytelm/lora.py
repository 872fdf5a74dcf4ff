"""Low-rank adapters (LoRA, Hu et al. 2021): which layers have them, and the files of peft.

A layer y = x W + b with an adapter computes y + (alpha / rank) · dropout(x) A B, where A [in, rank]
and B [rank, out] are trained and W and b are not. Both packages ask here.
"""

import json
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from bytelm.config import Recipe, require
from bytelm.export import (
    ADAPTER_FILE,
    ArrayLibrary,
    StoredTensor,
    StoredTensors,
    open_safetensors,
    replace_export,
    sum_of_json,
    write_safetensors,
)
from bytelm.files import errors_about, read_json
from bytelm.leaves import ADAPTERS, is_adapter, linear_problem, torch_name

CONFIG_FILE, MODEL_FILE = ADAPTER_FILE, "adapter_model.safetensors"
"""What peft calls the files of an adapter."""

_PREFIX = "base_model.model."
"""What peft puts before the names of the model that it adapts."""

_WRAPPER = "model."
"""What the classes of `bytelm_torch.hf` put before the names of the twin."""

ATTENTION = ("*attention*",)
"""The layers that have adapters unless `train.lora_targets` says otherwise."""


class LoRA(NamedTuple):
    """The adapters of a model."""

    rank: int
    alpha: float
    dropout: float
    layers: tuple[str, ...]
    """Names of the linear layers that have one, in the order of their names."""

    @property
    def scale(self) -> float:
        """What multiplies the product of A and B."""
        return self.alpha / self.rank

    @property
    def leaves(self) -> list[str]:
        """The adapters' parameters, by their names in JAX."""
        return [name for layer in self.layers for name in adapter_leaves(layer)]


def adapter_leaves(layer: str) -> tuple[str, str]:
    """The names in JAX of A and B of the layer called `layer`."""
    first, second = (f"{layer}.{part}.kernel" for part in ADAPTERS)
    return first, second


def lora_of(recipe: Recipe, parameters: Mapping[str, Any]) -> LoRA | None:
    """The adapters that `recipe` asks for; None if it asks for none.

    `parameters` are the model's, or whatever has their shapes in either layout, by their names in
    JAX, with or without adapters. A pattern of `train.lora_targets` matches linear layers by name.
    Raises `ValueError` for one that matches none, and says why the layer that it does match takes
    no adapter; and for a rank that no matrix of a layer has.
    """
    run, frozen = recipe.train, recipe.model.frozen_prefixes
    if not run.lora_rank:
        return None
    leaves = [name for name in parameters if not is_adapter(name)]
    modules = sorted({name.rpartition(".")[0] for name in leaves})
    problems = {
        module: "is frozen anyway" if module.startswith(frozen) else linear_problem(module, leaves)
        for module in modules
    }
    layers: set[str] = set()
    for pattern in run.lora_targets or ATTENTION:
        matched = [module for module in modules if fnmatchcase(module, pattern)]
        found = [module for module in matched if problems[module] is None]
        if not found:
            raise ValueError(_no_layer(recipe, pattern, matched, problems))
        layers |= set(found)
    for layer in sorted(layers):
        shape = tuple(parameters[f"{layer}.kernel"].shape)
        most = f"the largest rank of {layer}, of shape {shape}, is {min(shape)}"
        require(run.lora_rank <= min(shape), f"train.lora_rank={run.lora_rank}: {most}")
    return LoRA(run.lora_rank, run.lora_alpha, run.lora_dropout, tuple(sorted(layers)))


def _no_layer(
    recipe: Recipe, pattern: str, matched: list[str], problems: dict[str, str | None]
) -> str:
    plain = [module for module, problem in problems.items() if problem is None]
    hint = f"linear layers are {', '.join(plain[:3])}{', …' if len(plain) > 3 else ''}"
    if not recipe.train.lora_targets:
        what = f"this {recipe.model.architecture} has no attention"
        return f"train.lora_targets: {what}, the usual target; name others; {hint}"
    where = f"train.lora_targets={pattern}"
    if not matched:
        return f"{where}: matches no layer; {hint}"
    return f"{where}: {matched[0]} {problems[matched[0]]}, which takes no adapter; {hint}"


# ---- files ----------------------------------------------------------------------------------


def adapter_config(lora: LoRA) -> dict[str, Any]:
    """The contents of adapter_config.json: what peft needs to know.

    It does not name the weights below: peft would look for a path like theirs on the Hub.
    """
    alpha = int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": alpha,
        "lora_dropout": lora.dropout,
        "target_modules": [f"{_WRAPPER}{layer}" for layer in lora.layers],
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": False,
    }


def write_adapter(
    out: Path,
    lora: LoRA,
    tensors: Mapping[str, StoredTensor],
    raw: Callable[[Any], memoryview],
) -> None:
    """Writes an adapter as peft does, both files or neither.

    `tensors` are A and B of each layer by their names in the PyTorch twin, in its layout. Raises
    `ValueError` as `replace_export` does.
    """
    config = adapter_config(lora)
    stored = {_file_name(name): tensor for name, tensor in tensors.items()}
    text = (json.dumps(config, indent=2) + "\n").encode()
    replace_export(
        out,
        lambda sink: write_safetensors(sink, stored, raw, sum_of_json(config)),
        text,
        names=(MODEL_FILE, CONFIG_FILE),
    )


def read_adapter(
    folder: Path, arrays: ArrayLibrary, read: Callable[[StoredTensors, LoRA], Any]
) -> Any:
    """What `read` makes of the tensors of an adapter, by their names in the twin, and its LoRA.

    Raises `ValueError` for files that are missing or damaged, and for an adapter of another kind.
    """
    with errors_about(folder / CONFIG_FILE, "give an undamaged copy"):
        config = read_json(folder / CONFIG_FILE)
        lora = _parse(config)
    with open_safetensors(folder / MODEL_FILE, arrays) as stored:
        names = {_file_name(torch_name(name)): torch_name(name) for name in lora.leaves}
        require(
            names.keys() == stored.keys(),
            f"holds other tensors than {CONFIG_FILE} says; give an undamaged copy",
        )
        tensors = StoredTensors(stored.metadata, arrays)
        for name, tensor in stored.items():
            dict.__setitem__(tensors, names[name], tensor)
        result = read(tensors, lora)
        stored.verify(sum_of_json(config))
        return result


def _parse(config: Any) -> LoRA:
    require(isinstance(config, dict), "must hold a JSON object")
    kinds: dict[str, Any] = {"r": int, "lora_alpha": int | float, "lora_dropout": int | float}
    kinds["target_modules"] = list
    for name, kind in kinds.items():
        value = config.get(name)
        require(isinstance(value, kind), f"{name}={value!r}: is not what bytelm writes")
    layers = tuple(str(layer).removeprefix(_WRAPPER) for layer in config["target_modules"])
    lora = LoRA(config["r"], float(config["lora_alpha"]), float(config["lora_dropout"]), layers)
    require(adapter_config(lora) == config, "is not an adapter as bytelm writes them")
    return lora


def _file_name(name: str) -> str:
    return f"{_PREFIX}{_WRAPPER}{name}"
