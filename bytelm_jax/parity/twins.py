"""What each twin computes on the same bytes: forward, backward, cached decoding and generation.

Torch is imported where it is used: the rest of `bytelm_jax` never needs it.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bytelm.config import ModelConfig, to_dict
from bytelm.sampling import SamplerConfig
from bytelm.tokenizer import ByteTokenizer
from bytelm_jax.inference.generate import generate
from bytelm_jax.interop import convert
from bytelm_jax.models import Params, define_model
from bytelm_jax.parity.recording import Tap, listen_jax, listen_torch
from bytelm_jax.training.loss import cross_entropy

_NEW_BYTES = 32
"""Bytes generated greedily and compared."""

_ROUNDS = 8
"""Rounds of cached decoding that are compared layer by layer."""


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
    """The recording of one twin. Arrays are named by tap, by round, or by what they are."""

    values: MutableMapping[str, np.ndarray]
    taps: list[Tap] = field(default_factory=list)
    decoding: list[Tap] = field(default_factory=list)
    moving: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """The taps that a gradient flows through in torch, with the arrays' shapes."""
    cached: bool = True
    """Whether the model has cached decoding, without which `decoding` is empty."""
    texts: list[bytes] | None = None

    def keep(self, key: str, value: Any) -> None:
        """Stores a copy of an array or tensor: torch writes its caches in place."""
        plain = value if isinstance(value, np.ndarray) else value.detach().numpy()
        self.values[key] = np.array(plain)


def _plan(ids: np.ndarray, patch: int) -> tuple[int, int]:
    """The length of the prompt and the number of rounds of cached decoding after it."""
    start = ids.shape[1] // 2 // patch * patch
    return start, min(_ROUNDS, (ids.shape[1] - start) // patch)


def _before(ids: np.ndarray, start: int, patch: int, pad: int) -> np.ndarray:
    """The ids of the round before `start`, pads if there is none."""
    return ids[:, start - patch : start] if start else np.full_like(ids[:, :patch], pad)


def _prompts(ids: np.ndarray, config: ModelConfig) -> tuple[list[bytes], int]:
    """The prompts of greedy generation, and the largest number of bytes to generate."""
    half = max(1, ids.shape[1] // 2)
    capacity = min(_NEW_BYTES, (config.longest_input or half + _NEW_BYTES) - half)
    return [ByteTokenizer(config.vocab).to_bytes(row[:half]) for row in ids], capacity


def record_torch(
    config: ModelConfig,
    twin: Any,
    ids: np.ndarray,
    dtype: str,
    values: MutableMapping[str, np.ndarray] | None = None,
    decode: bool = True,
    counted: np.ndarray | None = None,
) -> Recording:
    """Records forward, backward, cached decoding and generation of the torch twin into `values`.

    `decode=False` omits the last two, which an encoder, `causal=False`, cannot do anyway. `counted`
    says of which ids the loss is; None of all.
    """
    import torch

    from bytelm_torch.inference.generate import generate as torch_generate
    from bytelm_torch.training.loss import cross_entropy as torch_cross_entropy

    recording = Recording({} if values is None else values)
    twin = twin.to(getattr(torch, dtype)).eval()
    twin.zero_grad()  # a backward pass of the caller's would be added to the one below
    tensor = torch.from_numpy(ids)
    with _recorded_gradients(twin, recording):
        with listen_torch(twin, partial(_visit_torch, recording)) as recorder:
            output = twin.outputs(tensor)
        recording.taps = recorder.taps
        mask = None if counted is None else torch.from_numpy(counted)
        nats, count = torch_cross_entropy(output.logits, tensor, config.vocab.pad_id, mask)
        loss = nats / count + output.extra_loss.mean()
        recording.keep("logits", output.logits)
        recording.keep("loss", loss)
        loss.backward()
    if not (decode and config.causal):
        return recording
    recording.cached = twin.has_cached_decoding
    if recording.cached:
        with torch.no_grad():
            _decode_torch(recording, twin, ids)
    prompts, capacity = _prompts(ids, config)
    recording.texts = torch_generate(twin, prompts, capacity, SamplerConfig(sampler="greedy"))
    return recording


def _visit_torch(recording: Recording, key: str, value: Any) -> Any:
    """Records an array, and the gradient that flows through it, if any."""
    recording.keep(key, value)
    if isinstance(value, np.ndarray) or not value.requires_grad:
        return value
    recording.moving[key] = tuple(value.shape)
    value = value.view_as(value)  # so that the gradient is that of this use alone
    value.register_hook(lambda gradient: recording.keep(f"gradient at {key}", gradient))
    return value


@contextlib.contextmanager
def _recorded_gradients(twin: Any, recording: Recording) -> Iterator[None]:
    """Moves each parameter's gradient from the model into `recording` as soon as it is complete."""

    def take(name: str, parameter: Any) -> None:
        recording.keep(f"gradient of {name}", parameter.grad)
        parameter.grad = None

    hooks = [
        p.register_post_accumulate_grad_hook(partial(take, name))
        for name, p in twin.named_parameters()
        if p.requires_grad
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _decode_torch(recording: Recording, twin: Any, ids: np.ndarray) -> None:
    import torch

    patch = twin.round_length
    start, rounds = _plan(ids, patch)
    tensor, cache = torch.from_numpy(ids), twin.init_cache(len(ids), start + rounds * patch)

    def run(when: str, step: Callable[[], Any]) -> None:
        def visit(key: str, value: Any) -> Any:
            recording.keep(f"{when}{key}", value)
            return value

        with listen_torch(twin, visit) as recorder:
            step()
        recording.decoding += [tap._replace(key=when + tap.key) for tap in recorder.taps]

    if start:
        run("prefill: ", lambda: twin.prefill(tensor[:, :start], cache))
    previous = torch.from_numpy(_before(ids, start, patch, twin.config.vocab.pad_id))
    for r in range(rounds):
        chosen = tensor[:, start + r * patch : start + (r + 1) * patch]
        when, logits = f"decoding, round {r + 1}: ", []

        def choose(row: Any, i: int, chosen: Any = chosen, logits: list = logits) -> Any:
            logits.append(row)
            return chosen[:, i]

        index = torch.full((len(ids),), start // patch + r)  # in each row, as in JAX
        step = partial(twin.decode_round, cache, previous, index, choose)
        run(when, step)
        recording.keep(f"{when}logits", torch.stack(logits, dim=1))
        previous = chosen


def record_jax(
    config: ModelConfig,
    load: Callable[[], Params],
    ids: np.ndarray,
    dtype: str,
    moving: Mapping[str, tuple[int, ...]],
    decode: bool = True,
    counted: np.ndarray | None = None,
) -> Recording:
    """Version of `record_torch` for the JAX twin, with the gradients at the taps in `moving`."""
    with jax.enable_x64(dtype == "float64"), jax.default_matmul_precision("highest"):
        params = {name: value.astype(dtype) for name, value in load().items()}
        bind, _ = define_model(config)
        recording = Recording({})
        inputs = jnp.asarray(ids)

        def run(params: Params, nudges: dict[str, jax.Array]) -> Any:
            model, seen = bind(params), {}

            def visit(key: str, value: Any) -> Any:
                seen[key] = value
                same = key in nudges and nudges[key].shape == value.shape
                return value + nudges[key] if same else value

            with listen_jax(model, visit) as recorder:
                output = model.outputs(inputs)
            recording.taps = recorder.taps
            nats, count = cross_entropy(output.logits, inputs, config.vocab.pad_id, counted)
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
        recording.values.update(seen)
        recording.values.update(
            (f"gradient at {key}", value)
            for key, value in at.items()
            if key in seen and seen[key].shape == value.shape
        )
        named = convert.to_torch(gradients).items()
        recording.values.update((f"gradient of {name}", value) for name, value in named)
        if decode and config.causal:
            model = bind(params)
            recording.cached = model.has_cached_decoding
            if recording.cached:
                _decode_jax(recording, bind, params, ids, config)
            prompts, capacity = _prompts(ids, config)
            recording.texts = generate(model, prompts, capacity, SamplerConfig(sampler="greedy"))
    return recording


def _decode_jax(
    recording: Recording, bind: Callable, params: Params, ids: np.ndarray, config: ModelConfig
) -> None:
    patch = bind(params).round_length
    start, rounds = _plan(ids, patch)
    length, taps = start + rounds * patch, []

    def heard(model: Any, step: Callable[[], Any]) -> Any:
        seen: dict[str, Any] = {}
        with listen_jax(model, lambda key, value: seen.setdefault(key, value)) as recorder:
            result = step()
        taps[:] = recorder.taps
        return result, seen

    @jax.jit
    def prefill(params: Params, prompt: jax.Array) -> Any:
        model = bind(params)
        cache = model.init_cache(len(ids), length)
        return heard(model, lambda: model.prefill(prompt, cache)) if start else (cache, {})

    @jax.jit
    def step(params: Params, cache: Any, before: jax.Array, chosen: jax.Array, n: jax.Array) -> Any:
        model, logits = bind(params), []

        def choose(row: jax.Array, i: int) -> jax.Array:
            logits.append(row)
            return chosen[:, i]

        output, seen = heard(model, lambda: model.decode_round(cache, before, n, choose))
        return output[0], seen | {"logits": jnp.stack(logits, axis=1)}

    def keep(when: str, seen: dict[str, Any]) -> None:
        recording.values.update({when + k: v for k, v in jax.device_get(seen).items()})
        recording.decoding += [tap._replace(key=when + tap.key) for tap in taps]

    cache, seen = prefill(params, ids[:, :start])
    keep("prefill: ", seen)
    before = _before(ids, start, patch, config.vocab.pad_id)
    for r in range(rounds):
        chosen = ids[:, start + r * patch : start + (r + 1) * patch]
        cache, seen = step(params, cache, before, chosen, jnp.int32(start // patch + r))
        keep(f"decoding, round {r + 1}: ", seen)
        before = chosen
