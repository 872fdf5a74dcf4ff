"""The report behind `bytelm parity`: both twins on the same bytes, layer by layer.

Imports both packages, lazily: the rest of `bytelm_jax` never needs torch. The twins run one after
the other, torch first: what it does waits in files, so that memory holds one model at a time, its
gradients, and the activations of a training step on these rows.
"""

import math
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bytelm import data
from bytelm.config import BLTConfig, ModelConfig, to_dict
from bytelm.tokenizer import ByteTokenizer
from bytelm_jax.inference.generate import SamplerConfig, generate
from bytelm_jax.interop import convert
from bytelm_jax.models import Params, define_model
from bytelm_jax.parity.recording import Place, Shelf, listen_jax, listen_torch
from bytelm_jax.training import checkpoint
from bytelm_jax.training.loss import cross_entropy

LOGITS = {"float64": 1e-12, "float32": 1e-5}
"""Bound of ‖a − b‖ / ‖b‖ for layers, logits and loss; integers and booleans must be equal."""

GRADIENTS = {"float64": 1e-10, "float32": 5e-5}
"""The same for every gradient."""

_NEW_BYTES = 32
"""Bytes generated greedily and compared."""

_ROUNDS = 8
"""Rounds of cached decoding that are compared layer by layer."""


@dataclass
class Report:
    """The lines of a comparison, and whose fault the first thing past its tolerance is."""

    lines: list[str] = field(default_factory=list)
    first: str | None = None
    seen: str | None = None

    @property
    def passed(self) -> bool:
        """Whether everything was within tolerance."""
        return self.first is None

    @property
    def text(self) -> str:
        """The report for a person."""
        verdict = "equal: every tensor within tolerance"
        if not self.passed:
            seen = "" if self.seen == self.first else f" (first seen: {self.seen})"
            verdict = f"DIFFERENT from {self.first} on{seen}"
        return "\n".join([*self.lines, verdict])

    def compare(
        self, what: str, ours: np.ndarray, theirs: np.ndarray, bound: float, suspect: str = ""
    ) -> None:
        """Adds one tensor; `suspect` is to blame when it is the first that differs."""
        found, good = difference(ours, theirs, bound)
        self.add(what, found, good, suspect)

    def compare_all(
        self, what: str, rows: Iterable[tuple[str, str, np.ndarray, np.ndarray]], bound: float
    ) -> None:
        """One line for many tensors, (name, suspect, ours, theirs), and one for each that differs.

        An error counts from a thousandth of the bound of the largest norm on: what should be zero
        is noise in both, and has no digits to compare.
        """
        count, largest = 0, 0.0
        for name, suspect, ours, theirs in rows:
            count, largest = count + 1, max(largest, _norm(theirs))
            found, good = difference(ours, theirs, bound, floor=1e-3 * largest)
            if not good:
                self.add(name, found, good, suspect)
        self.add(f"{what}: {count} arrays", "compared", True)

    def add(self, what: str, found: str, good: bool, suspect: str = "") -> None:
        """Adds one line."""
        self.lines.append(f"{'ok  ' if good else 'PAST'} {found:>8}  {what}")
        if not good and self.first is None:
            self.first, self.seen = suspect or what, what


def difference(
    ours: np.ndarray, theirs: np.ndarray, bound: float, floor: float = 0.0
) -> tuple[str, bool]:
    """The difference of two arrays in a word, and whether it is within the bound."""
    if ours.shape != theirs.shape:
        return f"shape {ours.shape} against {theirs.shape}", False
    if theirs.dtype.kind in "iub":
        wrong = int((ours != theirs).sum())
        return (f"{wrong} of {theirs.size}" if wrong else "same"), not wrong
    error = relative_error(ours, theirs, floor)
    return f"{error:.1e}", error <= bound


def relative_error(ours: np.ndarray, theirs: np.ndarray, floor: float = 0.0) -> float:
    """‖a − b‖ / ‖b‖ in float64; the absolute error where b is zero; infinite where not finite.

    `floor` stands for ‖b‖ where that is less.
    """
    a, b = ours.astype(np.float64), theirs.astype(np.float64)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return float("inf")
    return float(np.linalg.norm(a - b)) / (max(_norm(b), floor) or 1.0)


def _norm(value: np.ndarray) -> float:
    return float(np.linalg.norm(value.astype(np.float64)))


# ---- both twins -----------------------------------------------------------------------------


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
    exported = (path / convert.MODEL_FILE).exists()
    config = convert.load_config(path) if exported else checkpoint.load_config(path).model
    length = length or _default_length(config)
    windows = data.Windows(data.open_corpus(paths), config.vocab, length, append_eos=False)
    ids = next(data.evaluation_batches(windows, rows, rows))

    def load() -> Params:
        if exported:
            return convert.load_export(path, lambda _, array: array.astype(dtype))[1]
        return checkpoint.load_run(path, which)[1]

    def twin() -> Any:
        return bytelm_torch.from_pretrained(path) if exported else make_twin(config, load())

    with Shelf() as shelf:
        theirs = record_torch(config, twin(), ids, dtype, shelf)
        ours = partial(record_jax, config, load, ids, dtype)
        return compare_recordings(config, dtype, theirs, ours)


def _default_length(config: ModelConfig) -> int:
    """A little more than four patches, an odd number; with resets enough for some lines."""
    if config.reset_on == "newline":
        return min(131, getattr(config, "max_length", 131))
    if isinstance(config, BLTConfig) and config.patcher in ("entropy", "space", "histogram"):
        return 4 * math.ceil(config.bytes_per_patch) + 3
    return 4 * getattr(config, "patch_size", 8) + 3


def compare_twins(
    config: ModelConfig, params: Params, twin: Any, ids: np.ndarray, dtype: str
) -> Report:
    """Compares layers, logits, loss, gradients and greedy generation on ids int[B, T]."""
    theirs = record_torch(config, twin, ids, dtype)
    ours = partial(record_jax, config, lambda: params, ids, dtype)
    return compare_recordings(config, dtype, theirs, ours)


def make_twin(config: ModelConfig, params: Params) -> Any:
    """The torch model with the same configuration and parameters."""
    import torch

    from bytelm.config import model_from_dict
    from bytelm_torch.models import build_model

    twin = build_model(model_from_dict(to_dict(config)))
    tensors = {k: torch.from_numpy(np.array(v)) for k, v in convert.to_torch(params).items()}
    twin.to(next(iter(tensors.values())).dtype).load_state_dict(tensors, strict=True)
    return twin.eval()


@dataclass
class Recording:
    """What one twin did. Arrays are called by their place, their round, or what they are."""

    values: MutableMapping[str, np.ndarray]
    places: list[Place] = field(default_factory=list)
    decoding: list[Place] = field(default_factory=list)
    moving: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """The places that a gradient flows through, in torch's eyes, and the arrays' shapes."""
    texts: list[bytes] | None = None


def _plan(ids: np.ndarray, patch: int) -> tuple[int, int]:
    """Ids of the prompt and rounds of cached decoding behind it."""
    start = ids.shape[1] // 2 // patch * patch
    return start, min(_ROUNDS, (ids.shape[1] - start) // patch)


def _before(ids: np.ndarray, start: int, patch: int, pad: int) -> np.ndarray:
    """The ids of the round before `start`, pads where there is none."""
    return ids[:, start - patch : start] if start else np.full_like(ids[:, :patch], pad)


def _prompts(ids: np.ndarray, config: ModelConfig) -> tuple[list[bytes], int]:
    """What greedy generation starts from, and how many bytes there is room for."""
    half = max(1, ids.shape[1] // 2)
    room = min(_NEW_BYTES, getattr(config, "max_length", half + _NEW_BYTES) - half)
    return [ByteTokenizer(config.vocab).to_bytes(row[:half]) for row in ids], room


def record_torch(
    config: ModelConfig,
    twin: Any,
    ids: np.ndarray,
    dtype: str,
    values: MutableMapping[str, np.ndarray] | None = None,
    decode: bool = True,
) -> Recording:
    """Forward, backward, cached decoding and generation of the torch twin, into `values`.

    `decode=False` leaves out the last two, which an encoder, `causal=False`, cannot do anyway.
    """
    import torch

    from bytelm_torch.inference.generate import SamplerConfig as TorchSamplerConfig
    from bytelm_torch.inference.generate import generate as torch_generate
    from bytelm_torch.training.loss import cross_entropy as torch_cross_entropy

    found = Recording({} if values is None else values)
    twin = twin.to(getattr(torch, dtype)).eval()

    def keep(key: str, value: Any) -> None:
        plain = value.detach().numpy() if isinstance(value, torch.Tensor) else value
        found.values[key] = np.array(plain)  # a copy: torch writes its caches in place

    def touch(key: str, value: Any) -> Any:
        keep(key, value)
        if not (isinstance(value, torch.Tensor) and value.requires_grad):
            return value
        found.moving[key] = tuple(value.shape)
        value = value.view_as(value)  # so that the gradient is that of this use alone
        value.register_hook(lambda gradient: keep(f"gradient at {key}", gradient))
        return value

    def store_gradient(name: str, parameter: Any) -> None:
        keep(f"gradient of {name}", parameter.grad)
        parameter.grad = None

    tensor = torch.from_numpy(ids)
    hooks = [
        p.register_post_accumulate_grad_hook(partial(store_gradient, name))
        for name, p in twin.named_parameters()
        if p.requires_grad
    ]
    try:
        with listen_torch(twin, touch) as recorder:
            output = twin.outputs(tensor)
        found.places = recorder.places
        nats, count = torch_cross_entropy(output.logits, tensor, config.vocab.pad_id)
        loss = nats / count + output.extra_loss.mean()
        keep("logits", output.logits)
        keep("loss", loss)
        loss.backward()
    finally:
        for hook in hooks:
            hook.remove()
    if not (decode and getattr(config, "causal", True)):
        return found
    with torch.no_grad():
        _decode_torch(found, twin, ids, keep)
    prompts, room = _prompts(ids, config)
    found.texts = torch_generate(twin, prompts, room, TorchSamplerConfig(sampler="greedy"))
    return found


def _decode_torch(found: Recording, twin: Any, ids: np.ndarray, keep: Callable) -> None:
    import torch

    patch = twin.round_length
    start, rounds = _plan(ids, patch)
    tensor, cache = torch.from_numpy(ids), twin.init_cache(len(ids), start + rounds * patch)

    def run(when: str, step: Callable[[], Any]) -> None:
        def touch(key: str, value: Any) -> Any:
            keep(f"{when}{key}", value)
            return value

        with listen_torch(twin, touch) as recorder:
            step()
        found.decoding += [place._replace(key=when + place.key) for place in recorder.places]

    if start:
        run("prefill: ", lambda: twin.prefill(tensor[:, :start], cache))
    previous = torch.from_numpy(_before(ids, start, patch, twin.config.vocab.pad_id))
    for r in range(rounds):
        given = tensor[:, start + r * patch : start + (r + 1) * patch]
        when, logits = f"decoding, round {r + 1}: ", []

        def choose(row: Any, i: int, given: Any = given, logits: list = logits) -> Any:
            logits.append(row)
            return given[:, i]

        step = partial(twin.decode_round, cache, previous, start // patch + r, choose)
        run(when, step)
        keep(f"{when}logits", torch.stack(logits, dim=1))
        previous = given


def record_jax(
    config: ModelConfig,
    load: Callable[[], Params],
    ids: np.ndarray,
    dtype: str,
    moving: Mapping[str, tuple[int, ...]],
    decode: bool = True,
) -> Recording:
    """The same of the JAX twin, with the gradients at the places that `moving` names."""
    with jax.enable_x64(dtype == "float64"), jax.default_matmul_precision("highest"):
        params = {name: value.astype(dtype) for name, value in load().items()}
        bind, _ = define_model(config)
        found = Recording({})
        inputs = jnp.asarray(ids)

        def run(params: Params, nudges: dict[str, jax.Array]) -> Any:
            model, seen = bind(params), {}

            def touch(key: str, value: Any) -> Any:
                seen[key] = value
                same = key in nudges and nudges[key].shape == value.shape
                return value + nudges[key] if same else value

            with listen_jax(model, touch) as recorder:
                output = model.outputs(inputs)
            found.places = recorder.places
            nats, count = cross_entropy(output.logits, inputs, config.vocab.pad_id)
            loss = nats / count + output.extra_loss.astype(nats.dtype).mean()
            return loss, seen | {"logits": output.logits, "loss": loss}

        @jax.jit
        def differentiate(params: Params) -> Any:
            nudges = {key: jnp.zeros(shape, dtype) for key, shape in moving.items()}
            both = jax.value_and_grad(run, argnums=(0, 1), has_aux=True)
            (_, seen), (gradients, at) = both(params, nudges)
            return seen, gradients, at

        seen, gradients, at = differentiate(params)
        seen, at = jax.device_get((seen, at))
        found.values.update(seen)
        found.values.update(
            (f"gradient at {key}", value)
            for key, value in at.items()
            if key in seen and seen[key].shape == value.shape
        )
        made = convert.to_torch(gradients).items()
        found.values.update((f"gradient of {name}", value) for name, value in made)
        if decode and getattr(config, "causal", True):
            _decode_jax(found, bind, params, ids, config)
            prompts, room = _prompts(ids, config)
            found.texts = generate(bind(params), prompts, room, SamplerConfig(sampler="greedy"))
    return found


def _decode_jax(
    found: Recording, bind: Callable, params: Params, ids: np.ndarray, config: ModelConfig
) -> None:
    patch = bind(params).round_length
    start, rounds = _plan(ids, patch)
    length, places = start + rounds * patch, []

    def heard(model: Any, step: Callable[[], Any]) -> Any:
        seen: dict[str, Any] = {}
        with listen_jax(model, lambda key, value: seen.setdefault(key, value)) as recorder:
            result = step()
        places[:] = recorder.places
        return result, seen

    @jax.jit
    def prefill(params: Params, prompt: jax.Array) -> Any:
        model = bind(params)
        cache = model.init_cache(len(ids), length)
        return heard(model, lambda: model.prefill(prompt, cache)) if start else (cache, {})

    @jax.jit
    def step(params: Params, cache: Any, before: jax.Array, given: jax.Array, n: jax.Array) -> Any:
        model, logits = bind(params), []

        def choose(row: jax.Array, i: int) -> jax.Array:
            logits.append(row)
            return given[:, i]

        made, seen = heard(model, lambda: model.decode_round(cache, before, n, choose))
        return made[0], seen | {"logits": jnp.stack(logits, axis=1)}

    def keep(when: str, seen: dict[str, Any]) -> None:
        found.values.update({when + k: v for k, v in jax.device_get(seen).items()})
        found.decoding += [place._replace(key=when + place.key) for place in places]

    cache, seen = prefill(params, ids[:, :start])
    keep("prefill: ", seen)
    before = _before(ids, start, patch, config.vocab.pad_id)
    for r in range(rounds):
        given = ids[:, start + r * patch : start + (r + 1) * patch]
        cache, seen = step(params, cache, before, given, jnp.int32(start // patch + r))
        keep(f"decoding, round {r + 1}: ", seen)
        before = given


# ---- comparison -----------------------------------------------------------------------------


def compare_recordings(
    config: ModelConfig,
    dtype: str,
    theirs: Recording,
    record_ours: Callable[[Mapping[str, tuple[int, ...]]], Recording],
) -> Report:
    """The report of two recordings, in the order in which things happened."""
    report, ours = Report(), record_ours(theirs.moving)
    forward, backward = LOGITS[dtype], GRADIENTS[dtype]
    _compare_places(report, ours, theirs, forward)
    for name in ("logits", "loss"):
        report.compare(name, ours.values[name], theirs.values[name], forward)
    _compare_gradients(report, ours, theirs, backward)
    if not getattr(config, "causal", True):
        report.add("generation: causal=False, an encoder does not generate", "left out", True)
    elif theirs.texts is not None and ours.texts is not None:
        _compare_decoding(report, ours, theirs, forward)
        count, same = sum(map(len, theirs.texts)), ours.texts == theirs.texts
        report.add(f"greedy generation, {count} bytes", "same" if same else "differ", same)
    return report


def _shared(ours: Recording, theirs: Recording, places: list[Place]) -> list[Place]:
    """The places that both know; inputs may be handed over in other numbers of arrays."""
    return [p for p in places if p.key in ours.values and p.key in theirs.values]


def _compare_places(report: Report, ours: Recording, theirs: Recording, bound: float) -> None:
    count, made = 0, {place.key for place in ours.places if not place.entering}
    for place in theirs.places:  # in the order in which torch came by
        key = place.key
        if key not in ours.values:
            if not place.entering:
                report.add(key, "only torch", False, place.suspect)
            continue
        a, b = ours.values[key], theirs.values[key]
        if place.entering:  # an axis of length 1 is nobody's fault
            a, b = a.squeeze(), b.squeeze()
        count += 1
        if not place.entering or not difference(a, b, bound)[1]:
            report.compare(key, a, b, bound, place.suspect)
        made.discard(key)
    for key in sorted(made):
        report.add(key, "only JAX", False)
    report.add(f"inputs and outputs of layers: {count} arrays", "compared", True)


def _compare_gradients(report: Report, ours: Recording, theirs: Recording, bound: float) -> None:
    """Backwards, from the loss on: at every place, then of every parameter."""

    def rows() -> Iterable[tuple[str, str, np.ndarray, np.ndarray]]:
        for place in reversed(_shared(ours, theirs, theirs.places)):
            key = f"gradient at {place.key}"
            if key in ours.values and place.key in theirs.moving:
                mine = ours.values[key]
                yield key, place.backward_suspect, mine, _or_zero(theirs.values, key, mine)

    report.compare_all("gradients at inputs and outputs of layers", rows(), bound)
    for key in sorted(key for key in ours.values if key.startswith("gradient of ")):
        suspect = key.removeprefix("gradient of ").rpartition(".")[0]
        mine = ours.values[key]
        if key in theirs.values:
            report.compare(key, mine, theirs.values[key], bound, suspect)
        else:  # frozen: torch has none, so ours must be zero to the last bit
            moved = bool(np.any(mine))
            report.add(key, "not zero" if moved else "none", not moved, suspect)


def _or_zero(values: MutableMapping[str, np.ndarray], key: str, like: np.ndarray) -> np.ndarray:
    return values[key] if key in values else np.zeros_like(like)


def _compare_decoding(report: Report, ours: Recording, theirs: Recording, bound: float) -> None:
    def rows() -> Iterable[tuple[str, str, np.ndarray, np.ndarray]]:
        for place in _shared(ours, theirs, theirs.decoding):
            mine, other = ours.values[place.key], theirs.values[place.key]
            if mine.shape == other.shape or not place.entering:  # JAX masks what torch cuts off
                yield place.key, place.suspect, mine, other

    report.compare_all("layers in cached decoding", rows(), bound)
    for key in [key for key in theirs.values if key.endswith(": logits")]:
        report.compare(key, ours.values[key], theirs.values[key], bound)
