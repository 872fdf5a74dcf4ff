"""Records the calls inside a model, in both frameworks: the evidence behind `bytelm parity`.

Every call of a layer, and of the functions named in `FUNCTIONS`, is recorded with its input and
output arrays, under the same name in both packages, because these mirror each other. At the first
array where two recordings differ, the fault lies between it and the one before: in a layer whose
inputs agree and whose output does not, or in the caller that computes the next call's input.
Gradients at the same points, read backwards, locate a fault of the backward pass likewise.
"""

import contextlib
import importlib
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

METHODS = (
    *("extend", "extend_rows", "pool", "pool_cached", "pool_one", "read", "read_each"),
    *("keys_values", "predict", "predict_cached", "probabilities", "dense", "sparse"),
)
"""Methods that are calls of a layer, besides `__call__` and torch's `forward`.

In each package some layer must have each of them, otherwise recording raises: a method that was
renamed and is no longer recorded would leave the report shorter but still green.
"""

FUNCTIONS = {
    "layers.attention": ("multi_query_attention",),
    "layers.grouped_attention": ("rotate", "guide", "causal_attention", "grouped_attention"),
    "layers.cross_attention": ("segment_max", "grouped_attention"),
    "layers.experts": ("choose_experts",),
    "layers.spline": ("spline_activation",),
    "layers.transformer": ("rotation",),
    "models.blt": ("entropy", "ngram_rows", "shift_right", "sinusoids"),
    "models.blt_decoding": ("entropy", "ngram_rows", "shift_right"),
    "models.blt_local": ("segment_max",),
    "models.entropy": ("shift_right",),
    "models.lfbyte": ("extend_running_mean", "running_mean", "sinusoidal_positions", "sinusoids"),
    "models.patching": ("histogram_entropy", "sums_since_start", "boundary_after", "plan_patches"),
}
"""Functions that count as layers, by the module that calls them; both packages have each."""


class Tap(NamedTuple):
    """An array at the boundary of a layer: an input or an output."""

    key: str
    layer: str
    caller: str
    entering: bool

    @property
    def blamed(self) -> str:
        """The layer at fault if this array is the first wrong one."""
        return self.caller if self.entering else self.layer

    @property
    def backward_blamed(self) -> str:
        """The layer at fault if its gradient is the first wrong one, going backwards."""
        return self.layer if self.entering else self.caller


Visit = Callable[[str, Any], Any]
"""Called with the key and value of an array; its result replaces the array."""


@dataclass
class Recorder:
    """Names the calls of one model, `root`, and passes each array to `visit`."""

    root: str
    is_array: Callable[[Any], bool]
    visit: Visit
    taps: list[Tap] = field(default_factory=list)
    calls: Counter[str] = field(default_factory=Counter)
    stack: list[str] = field(default_factory=list)

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, a layer called `name`, recorded; ": f" is the function f of the caller."""

        def call(*args: Any, **named: Any) -> Any:
            caller = self.stack[-1] if self.stack else self.root
            layer = caller + name if name.startswith(": ") else name
            self.calls[layer] += 1
            key = layer if self.calls[layer] == 1 else f"{layer} (call {self.calls[layer]})"
            args, named = self._see(f"input of {key}", layer, caller, True, (args, named))
            self.stack.append(layer)
            try:
                output = function(*args, **named)
            finally:
                self.stack.pop()
            return self._see(key, layer, caller, False, output)

        return call

    def _see(self, key: str, layer: str, caller: str, entering: bool, tree: Any) -> Any:
        leaves, structure = jax.tree.flatten(tree)
        arrays = [i for i, leaf in enumerate(leaves) if self.is_array(leaf) and leaf.ndim]
        for number, i in enumerate(arrays):
            name = key if len(arrays) == 1 else f"{key}, {number + 1} of {len(arrays)}"
            self.taps.append(Tap(name, layer, caller, entering))
            leaves[i] = self.visit(name, leaves[i])
        return jax.tree.unflatten(structure, leaves)


class ArrayStore(MutableMapping[str, np.ndarray]):
    """Arrays by name in files of a temporary folder; only the one in use is in memory.

    Use it in a `with` statement, whose end removes the folder.
    """

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="bytelm-parity-")
        self._files: dict[str, Path] = {}

    def __enter__(self) -> "ArrayStore":
        return self

    def __exit__(self, *why: object) -> None:
        self._folder.cleanup()

    def __setitem__(self, key: str, value: np.ndarray) -> None:
        file = self._files.setdefault(key, Path(self._folder.name) / f"{len(self._files)}.npy")
        np.save(file, value)

    def __getitem__(self, key: str) -> np.ndarray:
        return np.load(self._files[key])

    def __delitem__(self, key: str) -> None:
        self._files.pop(key).unlink()

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


# ---- JAX ------------------------------------------------------------------------------------


@contextlib.contextmanager
def listen_jax(model: Any, visit: Visit) -> Iterator[Recorder]:
    """Passes every array at a layer's boundary to `visit` while `model` runs or is traced.

    Calls inside a control-flow primitive, out of which arrays cannot be taken, are not recorded.
    """
    from flax import nnx
    from flax.nnx.tracers import TraceState

    _check_methods("bytelm_jax", nnx.Module)
    outside = TraceState()
    recorder = Recorder(
        type(model).__name__, lambda leaf: isinstance(leaf, jax.Array | np.ndarray), visit
    )
    modules = [(path, m) for path, m in nnx.iter_graph(model) if isinstance(m, nnx.Module) and path]
    names = {id(module): ".".join(map(str, path)) for path, module in modules}
    inside: set[tuple[int, str]] = set()  # a layer that calls itself through `super` is one call

    def method(kind: type, name: str) -> Callable[..., Any]:
        original = getattr(kind, name)

        def call(self: Any, *args: Any, **named: Any) -> Any:
            bound, mark = original.__get__(self), (id(self), name)
            if id(self) not in names or mark in inside or not outside.is_valid():
                return bound(*args, **named)
            label = names[id(self)] + ("" if name == "__call__" else f".{name}")
            inside.add(mark)
            try:
                return recorder.around(label, bound)(*args, **named)
            finally:
                inside.discard(mark)

        return call

    def function(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        listened = recorder.around(f": {name}", original)
        return lambda *a, **k: (listened if outside.is_valid() else original)(*a, **k)

    kinds = {type(module) for _, module in modules}
    with contextlib.ExitStack() as patches:
        for kind in kinds:
            for name in ("__call__", *METHODS):
                if any(name in vars(base) for base in kind.__mro__[:-1]):
                    patches.enter_context(_replaced(kind, name, method(kind, name)))
        _listen_to_functions("bytelm_jax", function, patches)
        yield recorder


def _listen_to_functions(package: str, wrap: Any, patches: contextlib.ExitStack) -> None:
    """Raises `AttributeError` for a function that its module does not have."""
    for path, names in FUNCTIONS.items():
        module = importlib.import_module(f"{package}.{path}")
        for name in names:
            patches.enter_context(_replaced(module, name, wrap(name, getattr(module, name))))


def _check_methods(package: str, base: type) -> None:
    """Raises `AttributeError` for a method that no layer of the package has."""
    importlib.import_module(f"{package}.models")  # and with it every layer
    kinds, names = [base], set()
    while kinds:
        kind = kinds.pop()
        kinds += kind.__subclasses__()
        if kind.__module__.startswith(f"{package}."):
            names |= vars(kind).keys()
    if missing := [name for name in METHODS if name not in names]:
        raise AttributeError(f"no layer of {package} has the method {', '.join(missing)}")


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Sets `owner.name` to `value` for a while; copies no inherited attribute into `owner`."""
    is_own = name in vars(owner)
    before = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if is_own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


# ---- torch ----------------------------------------------------------------------------------


@contextlib.contextmanager
def listen_torch(twin: Any, visit: Visit) -> Iterator[Recorder]:
    """Version of `listen_jax` for the torch twin."""
    import torch

    _check_methods("bytelm_torch", torch.nn.Module)
    recorder = Recorder(
        type(twin).__name__, lambda leaf: isinstance(leaf, torch.Tensor | np.ndarray), visit
    )
    with contextlib.ExitStack() as patches:
        for path, module in twin.named_modules():
            for name in ("forward", *METHODS):
                if path and callable(getattr(module, name, None)):
                    label = path + ("" if name == "forward" else f".{name}")
                    listened = recorder.around(label, getattr(module, name))
                    patches.enter_context(_replaced(module, name, listened))
        wrap = lambda name, original: recorder.around(f": {name}", original)  # noqa: E731
        _listen_to_functions("bytelm_torch", wrap, patches)
        yield recorder
