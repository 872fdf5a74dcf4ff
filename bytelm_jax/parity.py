"""The report behind `bytelm parity`: both twins on the same bytes, layer by layer.

Imports both packages, lazily: the rest of `bytelm_jax` never needs torch.
"""

import contextlib
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bytelm_jax import checkpoint, convert, data
from bytelm_jax.config import BLTConfig, ModelConfig, to_dict
from bytelm_jax.generate import SamplerConfig, generate
from bytelm_jax.loss import cross_entropy
from bytelm_jax.models import Params, define_model
from bytelm_jax.tokenizer import ByteTokenizer

LOGITS = {"float64": 1e-12, "float32": 1e-5}
"""Bound of ‖a − b‖ / ‖b‖ for layers, logits and loss."""

GRADIENTS = {"float64": 1e-10, "float32": 5e-5}
"""The same for every gradient leaf."""

_NEW_BYTES = 32
"""Bytes generated greedily and compared."""


@dataclass
class Report:
    """The lines of a comparison, and the first thing that was past its tolerance."""

    lines: list[str] = field(default_factory=list)
    first: str | None = None

    @property
    def passed(self) -> bool:
        """Whether everything was within tolerance."""
        return self.first is None

    @property
    def text(self) -> str:
        """The report for a person."""
        verdict = "equal: every tensor within tolerance"
        return "\n".join(
            [*self.lines, verdict if self.passed else f"DIFFERENT from {self.first} on"]
        )

    def compare(self, what: str, ours: np.ndarray, theirs: np.ndarray, bound: float) -> None:
        """Adds one tensor."""
        if ours.shape != theirs.shape:
            self.add(what, f"shape {ours.shape} against {theirs.shape}", False)
            return
        error = relative_error(ours, theirs)
        self.add(what, f"{error:.1e}", error <= bound)

    def add(self, what: str, found: str, good: bool) -> None:
        """Adds one line."""
        self.lines.append(f"{'ok  ' if good else 'PAST'} {found:>8}  {what}")
        if not good and self.first is None:
            self.first = what


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """‖a − b‖ / ‖b‖ in float64; the absolute error where b is zero; infinite where not finite."""
    a, b = ours.astype(np.float64), theirs.astype(np.float64)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return float("inf")
    scale = float(np.linalg.norm(b))
    return float(np.linalg.norm(a - b)) / (scale or 1.0)


def compare(
    path: Path, dtype: str, paths: Sequence[Path], rows: int, length: int, which: str
) -> Report:
    """Compares the twins of a run folder or an export in `dtype` on `rows` windows of bytes.

    Raises `ValueError` for what cannot be read, and when torch is not installed.
    """
    try:
        import bytelm_torch
    except ImportError:
        raise ValueError("torch: not installed; install bytelm[torch]") from None
    config, params, twin = _load(path, which, bytelm_torch)
    length = length or _default_length(config)
    windows = data.Windows(data.open_corpus(paths), config.vocab, length, append_eos=False)
    ids = next(data.evaluation_batches(windows, rows, rows))
    return compare_twins(config, params, twin, ids, dtype)


def _default_length(config: ModelConfig) -> int:
    """A little more than four patches, an odd number; with resets enough for some lines."""
    if config.reset_on == "newline":
        return min(131, getattr(config, "max_length", 131))
    if isinstance(config, BLTConfig) and config.patcher in ("entropy", "space"):
        return 4 * math.ceil(config.bytes_per_patch) + 3
    return 4 * getattr(config, "patch_size", 8) + 3


def compare_twins(
    config: ModelConfig, params: Params, twin: Any, ids: np.ndarray, dtype: str
) -> Report:
    """Compares layers, logits, loss, gradients and greedy generation on ids int[B, T]."""
    report = Report()
    twin = twin.to(_torch_dtype(dtype)).eval()
    with jax.enable_x64(dtype == "float64"), jax.default_matmul_precision("highest"):
        params = {name: value.astype(dtype) for name, value in params.items()}
        bind, _ = define_model(config)
        theirs, their_logits, their_loss, their_gradients = _run_torch(twin, config, ids)
        inputs = jnp.asarray(ids)

        @jax.jit
        def run(params: Params) -> tuple[jax.Array, dict[str, jax.Array]]:
            model = bind(params)
            with _record_jax(model) as seen:
                return model(inputs), seen

        logits, ours = jax.device_get(run(params))
        _compare_layers(report, ours, theirs, LOGITS[dtype])
        report.compare("logits", logits, their_logits, LOGITS[dtype])

        def mean_loss(params: Params) -> jax.Array:
            nats, count = cross_entropy(bind(params)(inputs), inputs, config.vocab.pad_id)
            return nats / count

        loss, gradients = jax.jit(jax.value_and_grad(mean_loss))(params)
        report.compare("loss", np.asarray(loss), their_loss, LOGITS[dtype])
        for name, gradient in sorted(convert.to_torch(gradients).items()):
            what = f"gradient of {name}"
            if name in their_gradients:
                report.compare(what, gradient, their_gradients[name], GRADIENTS[dtype])
            else:  # frozen: torch has none, so ours must be zero to the last bit
                moved = bool(np.any(gradient))
                report.add(what, "not zero" if moved else "none", not moved)
        _compare_generation(report, bind(params), twin, ids, config)
    return report


def _load(path: Path, which: str, bytelm_torch: Any) -> tuple[ModelConfig, Params, Any]:
    if (path / "model.safetensors").exists():
        config, params = convert.load_export(path)
        return config, params, bytelm_torch.from_pretrained(path)
    recipe, params, _ = checkpoint.load_run(path, which)
    return recipe.model, params, make_twin(recipe.model, params)


def make_twin(config: ModelConfig, params: Params) -> Any:
    """The torch model with the same configuration and parameters."""
    import torch

    from bytelm_torch.config import model_from_dict
    from bytelm_torch.models import build_model

    twin = build_model(model_from_dict(to_dict(config)))
    tensors = {k: torch.from_numpy(np.array(v)) for k, v in convert.to_torch(params).items()}
    twin.to(next(iter(tensors.values())).dtype).load_state_dict(tensors, strict=True)
    return twin.eval()


def _torch_dtype(name: str) -> Any:
    import torch

    return getattr(torch, name)


def _run_torch(
    twin: Any, config: ModelConfig, ids: np.ndarray
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Outputs of every layer, logits, loss and gradients of the torch twin."""
    import torch

    from bytelm_torch.loss import cross_entropy as torch_cross_entropy

    seen: dict[str, np.ndarray] = {}
    calls: Counter[str] = Counter()

    def remember(name: str):
        def hook(module: Any, inputs: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor):
                calls[name] += 1
                seen[_label(name, calls[name])] = output.detach().numpy()

        return hook

    named = [(name, module) for name, module in twin.named_modules() if name]
    hooks = [module.register_forward_hook(remember(name)) for name, module in named]
    try:
        twin.zero_grad()
        tensor = torch.from_numpy(ids)
        logits = twin(tensor)
        nats, count = torch_cross_entropy(logits, tensor, config.vocab.pad_id)
        loss = nats / count
        loss.backward()
    finally:
        for hook in hooks:
            hook.remove()
    gradients = {n: p.grad.numpy() for n, p in twin.named_parameters() if p.grad is not None}
    return seen, logits.detach().numpy(), loss.detach().numpy(), gradients


def _label(name: str, call: int) -> str:
    return name if call == 1 else f"{name} (call {call})"


@contextlib.contextmanager
def _record_jax(model: nnx.Module) -> Iterator[dict[str, jax.Array]]:
    """Collects the outputs of the model's layers, by dotted name, while it runs or is traced."""
    names = {
        id(node): ".".join(map(str, path))
        for path, node in nnx.iter_graph(model)
        if isinstance(node, nnx.Module) and path
    }
    kinds = {type(node) for _, node in nnx.iter_graph(model) if isinstance(node, nnx.Module)}
    seen: dict[str, jax.Array] = {}
    calls: Counter[str] = Counter()
    originals = {kind: kind.__call__ for kind in kinds if "__call__" in vars(kind)}

    def recording(original: Any) -> Any:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            output = original(self, *args, **kwargs)
            name = names.get(id(self))
            if name is not None and isinstance(output, jax.Array):
                calls[name] += 1
                seen[_label(name, calls[name])] = output
            return output

        return call

    try:
        for kind, original in originals.items():
            kind.__call__ = recording(original)
        yield seen
    finally:
        for kind, original in originals.items():
            kind.__call__ = original


def _compare_layers(
    report: Report, ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray], bound: float
) -> None:
    for name, output in theirs.items():  # in the order in which torch finished them
        if name in ours:
            report.compare(name, ours[name], output, bound)
        else:
            report.add(name, "only torch", False)
    for name in sorted(set(ours) - set(theirs)):
        report.add(name, "only JAX", False)


def _compare_generation(
    report: Report, model: Any, twin: Any, ids: np.ndarray, config: ModelConfig
) -> None:
    from bytelm_torch.generate import SamplerConfig as TorchSamplerConfig
    from bytelm_torch.generate import generate as torch_generate

    half = max(1, ids.shape[1] // 2)
    room = min(_NEW_BYTES, getattr(config, "max_length", half + _NEW_BYTES) - half)
    prompts = [ByteTokenizer(config.vocab).to_bytes(row[:half]) for row in ids]
    ours = generate(model, prompts, room, SamplerConfig(sampler="greedy"))
    theirs = torch_generate(twin, prompts, room, TorchSamplerConfig(sampler="greedy"))
    count = sum(len(text) for text in theirs)
    report.add(
        f"greedy generation, {count} bytes", "same" if ours == theirs else "differ", ours == theirs
    )
