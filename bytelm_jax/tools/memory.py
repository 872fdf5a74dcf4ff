"""The bytes that the backward pass needs from the forward pass, determined from the program itself.

A compiler keeps some arrays from the forward to the backward pass and recomputes others. Which ones
is a minimum cut: of all sets of arrays from which the backward pass can be computed by cheap
operations alone, the smallest. Cheap is what XLA's fusion is willing to repeat (where
`InstructionFusion::IsExpensive` is false): arithmetic, comparisons, conversions, slices. Products,
sums, indexed reads and transcendental functions are computed once, and what a library call reads in
both passes is in memory anyway.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Literal, jaxpr_as_fun

from bytelm_jax.kernels.dtypes import array_bytes


def names(text: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(text.split())


SAME = names(
    "reshape squeeze expand_dims transpose copy copy_p stop_gradient name layout_constraint "
    "optimization_barrier sharding_constraint pvary pcast reduce_precision"
)
"""Primitives whose result is their operand in another form."""

CHEAP = names(
    "abs add add_any and bitcast_convert_type broadcast_in_dim ceil clamp concatenate "
    "convert_element_type dynamic_slice dynamic_update_slice eq floor ge gt imag integer_pow "
    "iota is_finite le lt max min mul ne neg not or pad real rev round select_n shift_left "
    "shift_right_arithmetic shift_right_logical sign slice split square sub xor"
)

_LIBRARY = names(
    "conv_general_dilated dot_general fft pallas_call pure_callback ragged_dot_general sort"
)
"""Primitives that read their operands from memory: no fusion reaches into them."""

CALLS = names(
    "checkpoint closed_call core_call custom_jvp_call custom_vjp_call jit pjit remat2 shard_map"
)
"""Primitives that only wrap a program of their own."""

_MUCH = 2**30


class Held(NamedTuple):
    """An array in memory."""

    shape: tuple[int, ...]
    dtype: Any
    primitive: str

    @property
    def bytes(self) -> int:
        """Its size in bytes."""
        return array_bytes(self.shape, self.dtype)


class _Value:
    """One array of a flattened program; a program that is called twice has two of each."""

    def __init__(self, aval: Any, primitive: str):
        self.held = Held(tuple(aval.shape), aval.dtype, primitive)


class _Operation(NamedTuple):
    inputs: list[_Value]
    outputs: list[_Value]
    cheap: bool
    library: bool


class Program:
    """The operations of a program in order, with the programs that it calls inlined."""

    def __init__(self, closed: ClosedJaxpr):
        jaxpr = closed.jaxpr
        self.inputs = {v: _Value(v.aval, "") for v in (*jaxpr.invars, *jaxpr.constvars)}
        self.operations: list[_Operation] = []
        self.rematerialised: list[ClosedJaxpr] = []
        values: dict[Any, _Value | None] = dict(self.inputs)
        self._add(jaxpr, values)
        self.results = [_look_up(values, v) for v in jaxpr.outvars]

    def _add(self, jaxpr: Any, values: dict[Any, _Value | None]) -> None:
        for eqn in jaxpr.eqns:
            name = eqn.primitive.name
            inputs = [_look_up(values, v) for v in eqn.invars]
            if name in CALLS:
                inner, constants = program_of(eqn)
                if name in ("checkpoint", "remat2"):
                    self.rematerialised.append(ClosedJaxpr(inner, constants))
                known: dict[Any, _Value | None] = dict(zip(inner.invars, inputs, strict=True))
                known |= {v: _Value(v.aval, "") for v in inner.constvars}
                self._add(inner, known)
                results = [_look_up(known, v) for v in inner.outvars]
                values.update(zip(eqn.outvars, results, strict=True))
            elif name in SAME or changes_nothing(eqn):
                values.update(zip(eqn.outvars, inputs, strict=True))
            else:
                outputs = {v: _Value(v.aval, name) for v in eqn.outvars}
                values |= outputs
                real = [value for value in inputs if value is not None]
                cheap = name in CHEAP or (name == "div" and _divides_by_number(eqn))
                self.operations.append(
                    _Operation(real, list(outputs.values()), cheap, name in _LIBRARY)
                )


def _look_up(values: dict[Any, _Value | None], variable: Any) -> _Value | None:
    """The array that a variable stands for; None for a literal."""
    return None if isinstance(variable, Literal) else values[variable]


def program_of(eqn: Any) -> tuple[Any, list[Any]]:
    """The program that an equation wraps, and its constants."""
    inner = next(eqn.params[k] for k in ("jaxpr", "call_jaxpr") if k in eqn.params)
    return (inner.jaxpr, inner.consts) if isinstance(inner, ClosedJaxpr) else (inner, [])


def changes_nothing(eqn: Any) -> bool:
    """Whether it converts to the dtype that its operand has."""
    return (
        eqn.primitive.name == "convert_element_type"
        and eqn.invars[0].aval.dtype == eqn.outvars[0].aval.dtype
    )


def _divides_by_number(eqn: Any) -> bool:
    return eqn.invars[1].aval.shape == ()


def saved_for_backward(function: Callable[..., Any], moving: Any, *rest: Any) -> list[Held]:
    """The arrays kept between the passes of the gradient of `function(moving, *rest)` by `moving`.

    Shapes are enough as arguments, which themselves are not counted. With rematerialisation the
    arrays are the inputs of its parts and, for the part that needs most, what is kept while that
    part is differentiated.
    """

    def residuals(moving: Any, *rest: Any) -> list[Any]:
        _, pull = jax.vjp(lambda moving: function(moving, *rest), moving)
        return jax.tree.leaves(pull)

    held = _least(Program(jax.make_jaxpr(residuals)(moving, *rest)))
    parts: list[list[Held]] = [[]]
    # `residuals` contains the forward pass of these parts, but no longer where each begins and
    # ends.
    for part in _distinct(Program(jax.make_jaxpr(function)(moving, *rest)).rematerialised):
        shapes = [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in part.in_avals]
        floating = [i for i, v in enumerate(shapes) if jax.numpy.issubdtype(v.dtype, np.inexact)]
        parts.append(saved_for_backward(*_by(jaxpr_as_fun(part), shapes, floating)))
    return held + max(parts, key=total)


def _by(
    function: Callable[..., Any], shapes: list[Any], floating: list[int]
) -> tuple[Callable[..., Any], list[Any], list[Any]]:
    """`function` as one of (its floating-point arguments, all of them), and these arguments."""

    def split(moving: list[Any], every: list[Any]) -> Any:
        arguments = list(every)
        for i, value in zip(floating, moving, strict=True):
            arguments[i] = value
        return function(*arguments)

    return split, [shapes[i] for i in floating], shapes


def _distinct(parts: Iterable[ClosedJaxpr]) -> list[ClosedJaxpr]:
    """One of each kind, distinguished by their arguments' shapes and their length."""
    kinds = {(tuple(map(str, p.in_avals)), len(p.jaxpr.eqns)): p for p in parts}
    return list(kinds.values())


def total(held: Iterable[Held]) -> int:
    """Total bytes of all arrays."""
    return sum(array.bytes for array in held)


def device_limit(device: jax.Device) -> int | None:
    """Bytes of the device available to programs; None if it does not say, as a CPU."""
    return (device.memory_stats() or {}).get("bytes_limit")


def _least(program: Program) -> list[Held]:
    """The minimum cut between what is computed once and the program's results."""
    inputs = set(program.inputs.values())
    wanted = {value for value in program.results if value is not None} - inputs
    read = {v for operation in program.operations if operation.library for v in operation.inputs}
    number: dict[_Value, int] = {}
    edges: list[tuple[int, int, int]] = []
    # scipy needs 32-bit integers; the error is a millionth of the whole.
    unit = max(1, sum(value.held.bytes for value in wanted) >> 20)
    source, sink = 0, 1

    def ends(value: _Value) -> tuple[int, int]:
        first = 2 + 2 * number.setdefault(value, len(number))
        return first, first + 1

    for operation in program.operations:
        for value in operation.outputs:
            start, end = ends(value)
            edges.append((start, end, min(_MUCH, -(-value.held.bytes // unit))))
            if not operation.cheap or (value in wanted and value in read):
                edges.append((source, start, _MUCH))
            else:
                edges += [(ends(v)[1], start, _MUCH) for v in operation.inputs if v not in inputs]
    edges += [(ends(value)[1], sink, _MUCH) for value in wanted]
    reached = _reached(edges, 2 + 2 * len(number), source, sink)
    cut = (v for v in number if ends(v)[0] in reached and ends(v)[1] not in reached)
    return [value.held for value in cut]


def _reached(edges: list[tuple[int, int, int]], nodes: int, source: int, sink: int) -> set[int]:
    """The nodes on the source's side of the minimum cut."""
    # Imported here because every `bytelm train` imports this module and hardly any uses it.
    from scipy.sparse import csr_matrix
    from scipy.sparse.csgraph import breadth_first_order, maximum_flow

    starts, stops, capacities = np.asarray(edges, np.int32).reshape(-1, 3).T
    graph = csr_matrix((capacities, (starts, stops)), shape=(nodes, nodes))
    graph.data = np.minimum(graph.data, _MUCH)  # two edges between the same nodes were added
    left = graph - maximum_flow(graph, source, sink).flow
    left.data[left.data < 0] = 0
    left.eliminate_zeros()
    return set(breadth_first_order(left, source, return_predecessors=False).tolist())
