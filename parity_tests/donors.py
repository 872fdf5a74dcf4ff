"""Tiny random token models of transformers, and their exact forms in float64."""

import functools
import json
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from bytelm.config import BLTConfig, to_dict
from bytelm_jax.cli import main as cli
from bytelm_jax.interop.convert import to_torch
from bytelm_jax.interop.llama import (
    STACK,
    byte_config,
    donor_name,
    in_our_layout,
    read_donor,
    read_stack,
)
from bytelm_jax.layers.transformer import Transformer
from bytelm_jax.models import split_model
from bytelm_jax.parity.report import relative_error
from bytelm_torch.layers import transformer as torch_transformer
from bytelm_torch.models import parameter_paths

SIZES: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "pad_token_id": None, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
_LLAMA3 = {"rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0}
_LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 32}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"attention_bias": True, "head_dim": 8, "rope_parameters": _LLAMA3}),
    "smollm": ("Llama", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "qwen2": (
        "Qwen2",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e6, "factor": 4.0}},
    ),
    "qwen3": ("Qwen3", {"head_dim": 6, "tie_word_embeddings": True}),
    "olmo2": ("Olmo2", {"num_key_value_heads": 4, "rms_norm_eps": 1e-6}),
}
"""Name → transformers' class and what differs from `SIZES`."""

LOCAL = BLTConfig(
    patcher="space", ngram_sizes=(3,), ngram_rows=11, local_dim=12, local_window=8,
    encoder_heads=2, encoder_hidden_dim=8, decoder_layers=1, decoder_heads=2,
    decoder_hidden_dim=8, patch_budget=1.0,
)  # fmt: skip
"""The byte encoder and decoder; its global transformer gives way to the donor's layers."""


def make_donor(family: str, seed: int = 0, dtype: Any = torch.float64, **sizes: Any) -> Any:
    """A model with random weights, norms and biases included, so that none of them can hide."""
    import transformers

    stem, changes = FAMILIES[family]
    config = getattr(transformers, f"{stem}Config")(**SIZES | changes | sizes)
    torch.manual_seed(seed)
    model = getattr(transformers, f"{stem}ForCausalLM")(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def save_donor(model: Any, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    return folder


def save_tokenizer(folder: Path, text: str, size: int = 300) -> None:
    """A byte-level BPE of `size` tokens, as transformers saves it."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet)
    tokenizer.train_from_iterator([text], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))


def make_exact(model: Any) -> Any:
    """`model` with norms and rotary tables, which transformers computes in float32, in float64."""

    def norm(self: Any, x: torch.Tensor) -> torch.Tensor:
        power = x.square().mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(power + self.variance_epsilon))

    def rotary(self: Any, x: torch.Tensor, position_ids: torch.Tensor) -> Any:
        angles = position_ids[..., None].double() * self.inv_freq.double()
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos(), angles.sin()

    for module in model.modules():
        forms = {"RMSNorm": norm, "RotaryEmbedding": rotary}
        for ending, form in forms.items():
            if type(module).__name__.endswith(ending):
                module.forward = types.MethodType(form, module)
    return model


def hidden_states(dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Inputs of the layers, and what their outputs are multiplied by to give a loss."""
    source = np.random.default_rng(1)
    x, weights = source.normal(size=(2, 2, 37, SIZES["hidden_size"]))
    return x.astype(dtype), weights.astype(dtype)


def read_layers(folder: Path) -> tuple[BLTConfig, Mapping[str, Any]]:
    """The global transformer that a donor's folder becomes: configuration and parameters."""
    donor = read_donor(folder)
    return byte_config(LOCAL, donor), read_stack(donor, LOCAL)[0]


def put_back(params: Mapping[str, Any], config: BLTConfig, model: Any) -> None:
    """Gives the donor `model` the parameters of a global transformer: import, the other way."""
    held = model.state_dict()
    for name, value in params.items():
        if name.startswith(STACK):
            target = held[donor_name(name, config)]
            places = np.arange(target.numel()).reshape(target.shape)
            array = np.empty(target.numel(), value.dtype)
            array[in_our_layout(name, places, config)] = value
            target.copy_(torch.from_numpy(array).reshape(target.shape))


def compare_layers(
    model: Any, config: BLTConfig, params: Mapping[str, Any], dtype: str
) -> Iterator[tuple[str, float]]:
    """(what, relative error) of both twins' global transformer against the donor `model`.

    `params` are parameters of a byte model with `config`, those of its global transformer among
    them. What is compared are outputs, and gradients of inputs and of every parameter, on the same
    hidden states.
    """
    x, weights = hidden_states(dtype)
    out, of_x, by_name = _in_transformers(model, x, weights)
    sizes = (config.global_dim, config.global_layers, config.global_heads, config.global_kv_heads)
    sizes += (config.global_hidden_dim, 0, config.rope_theta, 0.0, "gated", False)
    bare = {
        name.removeprefix(STACK): jnp.asarray(value, dtype)
        for name, value in params.items()
        if name.startswith(STACK)
    }
    for twin, run in (("JAX", _in_jax), ("torch", _in_torch)):
        ours, ours_of_x, gradients = run((*sizes, config.global_block), bare, x, weights)
        yield f"{twin} output", relative_error(ours, out)
        yield f"{twin} gradient of the input", relative_error(ours_of_x, of_x)
        assert gradients.keys() == bare.keys()
        for name, actual in gradients.items():
            expected = in_our_layout(STACK + name, by_name[donor_name(name, config)], config)
            yield f"{twin} gradient of {name}", relative_error(actual, expected)


def _in_transformers(model: Any, x: np.ndarray, weights: np.ndarray) -> Any:
    model.zero_grad()
    states = torch.tensor(x, requires_grad=True)
    out = model.model(inputs_embeds=states, use_cache=False).last_hidden_state
    (out * torch.tensor(weights)).sum().backward()
    named = dict(model.named_parameters())
    gradients = {name: p.grad.numpy() for name, p in named.items() if p.grad is not None}
    return out.detach().numpy(), _gradient(states), gradients


def _in_jax(sizes: Any, params: Any, x: np.ndarray, weights: np.ndarray) -> Any:
    (_, out), (of_params, of_x) = jax.device_get(_jitted(sizes)(params, x, weights))
    return out, of_x, of_params


@functools.cache
def _jitted(sizes: Any) -> Callable[..., Any]:
    """One for all donors of a family, which compile once."""
    bind, _ = split_model(Transformer(*sizes, rngs=nnx.Rngs(0)))

    def loss(params: Any, x: Any, weights: Any) -> Any:
        out, _ = bind(params)(x)
        return (out * weights).sum(), out

    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))


def _in_torch(sizes: Any, params: Any, x: np.ndarray, weights: np.ndarray) -> Any:
    twin = torch_transformer.Transformer(*sizes).to(torch.tensor(x).dtype)
    tensors = {name: torch.from_numpy(np.array(v)) for name, v in to_torch(params).items()}
    twin.load_state_dict(tensors, strict=True)
    states = torch.tensor(x, requires_grad=True)
    out, _ = twin(states)
    (out * torch.tensor(weights)).sum().backward()
    paths = parameter_paths(twin)
    gradients = {}
    for name, path in paths.items():
        value = _gradient(twin.get_parameter(name))
        is_matrix = path.endswith(".kernel")
        gradients[path] = value.swapaxes(-1, -2) if is_matrix else value
    return out.detach().numpy(), _gradient(states), gradients


def _gradient(tensor: torch.Tensor) -> np.ndarray:
    assert tensor.grad is not None
    return tensor.grad.numpy()


def write_local(folder: Path) -> Path:
    """A recipe file with `LOCAL`, trained for a step on two short rows."""
    train = {"steps": 1, "batch_size": 2, "devices": 1, "eval_every": 0, "eval_windows": 2}
    recipe = {"model": to_dict(LOCAL), "train": train, "data": {"sequence_length": 32}}
    file = folder / "local.json"
    file.write_text(json.dumps(recipe))
    return file


def pass_through(donor: Path, folder: Path) -> dict[str, Path]:
    """The donor through import, a train step and export by commands; what these wrote, by name."""
    local, text = write_local(folder), folder / "text.txt"
    text.write_text("Words of a text, which is not long. " * 60)
    wrote = {name: folder / name for name in ("imported", "trained", "exported")}
    run = ["import", str(donor), "--format", "llama", "--local", str(local)]
    commands = [[*run, "--out", str(wrote["imported"])]]
    run = ["train", str(local), "--init-from", str(wrote["imported"]), "--data", str(text)]
    commands += [[*run, "--run-dir", str(wrote["trained"])]]
    out = ["--format", "hf", "--out", str(wrote["exported"])]
    commands += [["export", str(wrote["trained"]), *out]]
    for command in commands:
        status = cli.main(command)
        assert status == 0, (command, status)
    return wrote
