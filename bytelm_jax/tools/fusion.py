"""The bytes that a step keeps in memory when a TPU's compiler has memory to spare.

XLA decides array by array what it writes to memory, and a minimum cut (`memory.py`) is the least it
can do with, not what it does. This module traces the gradient of the loss and decides as XLA does:

- Products, sums, indexed reads, sorts and kernels are computed once, and their results written.
  Elementwise operations are repeated in whatever reads them, but not slices from within a tile.
- What alone reads a product, elementwise, is computed with it and written in its place. What is
  moved and then narrowed to 16 bits is narrowed first.
- Products take rows, layers arrays with more axes, and an array that is reshaped between them is
  not repeated across it: a float32 copy of a 16-bit array that several operations read in another
  shape is written beside it.
- Kernels and sorts read from memory. So do products, if several read the same operand; other
  readers of that operand repeat it.
- Where parameters are gathered they are kept, in the dtype of products, from their first use to the
  last, and activation functions are written for the products that read them. Otherwise they are
  cast, and activation functions of what was reshaped computed, again in each product.
- Two axes of an array fill tiles of 8 × 128 32-bit numbers, or 16 × 128 of 16 bits: those that fill
  them best, but for a kernel the last two.
- A buffer takes the lowest free place, in the order of the program, so holes remain.

The rules are those that were seen at work in programs compiled by libtpu 0.0.42.1.
"""

import heapq
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr, Literal

from bytelm_jax.kernels.dtypes import array_bytes
from bytelm_jax.tools.memory import CALLS, CHEAP, SAME, changes_nothing, names, program_of

_ELEMENTWISE = CHEAP | names(
    "cos cbrt div erf erf_inv exp exp2 expm1 log log1p logistic pow random_bits random_fold_in "
    "random_split random_unwrap random_wrap rem rsqrt sin sqrt tanh threefry2x32 tile transpose"
)
_OPAQUE = names("cond pallas_call scan while")
_MOVES = names("broadcast_in_dim concatenate dynamic_slice rev slice split tile transpose")
_ACTIVATIONS = names("erf exp logistic tanh")
_SHORT = names("broadcast_in_dim concatenate pad slice split")
"""Primitives that change nothing where the size of their result is that of their operand."""

_LANES, _SUBLANES = 128, 8
_ALIGNMENT = 2**14
"""Bytes of which the address of a buffer is a multiple."""


class Array:
    """An array of the program; reshaped, it is the same array."""

    def __init__(self, aval: Any, source: "Operation | None" = None):
        self.shapes = {tuple(aval.shape)}
        self.count = math.prod(aval.shape)
        self.width = array_bytes((), aval.dtype)  # bytes of an element
        self.floating = jax.numpy.issubdtype(aval.dtype, jax.numpy.floating)
        self.source = source
        self.readers: list[Operation] = []
        self.written = False
        self.operand = False
        """Written for products, sorts and kernels alone."""
        self.row_major = False
        """Laid out as its shape says, for a kernel."""

    @property
    def is_reshaped(self) -> bool:
        """Whether it is read in another shape than it was computed in, apart from axes of 1."""
        if len({tuple(n for n in shape if n != 1) for shape in self.shapes}) > 1:
            return True
        if self.source is None or self.source.name != "convert_element_type":
            return False
        return any(each.is_reshaped for each in self.source.inputs)

    @property
    def is_narrowed(self) -> bool:
        """Whether it is moved and then narrowed to 16 bits, which is done in the other order."""
        return bool(self.readers) and all(
            _narrows(x) or (x.name in _MOVES and all(result.is_narrowed for result in x.results))
            for x in self.readers
        )

    @property
    def bytes(self) -> int:
        """Its size, in whole tiles."""
        size = tile_bytes if self.row_major else least_tile_bytes
        width = 2 if self.floating and self.is_narrowed else self.width
        return min(size(shape, width) for shape in self.shapes)


class Operation:
    """One operation of the program, at its place in the order."""

    def __init__(self, name: str, inputs: list[Array], cuts_lanes: bool = False):
        self.name, self.inputs, self.place = name, inputs, 0
        self.results: list[Array] = []
        self.cuts_lanes = cuts_lanes
        """Whether it takes parts of the last axis out of the middle of a tile."""

    @property
    def is_elementwise(self) -> bool:
        """Whether XLA repeats it in its readers."""
        return self.name in _ELEMENTWISE and not self.cuts_lanes


def _narrows(operation: Operation) -> bool:
    (result, *_) = operation.results
    return operation.name == "convert_element_type" and result.floating and result.width == 2


class Buffer(NamedTuple):
    """Memory that is taken from one place of the program to another, both included."""

    start: int
    end: int
    bytes: int


def tile_bytes(shape: Iterable[int], width: int) -> int:
    """Bytes of an array whose last two axes, of those longer than 1, fill whole tiles."""
    sizes = [size for size in shape if size != 1]
    if len(sizes) > 1:
        rows = _SUBLANES * max(1, 4 // width)
        sizes[-1] = -(-sizes[-1] // _LANES) * _LANES
        # Shorter than a tile, an axis takes a smaller one.
        sizes[-2] = -(-sizes[-2] // rows) * rows if sizes[-2] >= rows else sizes[-2]
    return math.prod(sizes) * width


def least_tile_bytes(shape: tuple[int, ...], width: int) -> int:
    """The same with those two axes last that fill tiles best."""
    sizes = [size for size in shape if size != 1]
    orders = [
        (*(n for i, n in enumerate(sizes) if i not in (first, second)), sizes[first], sizes[second])
        for first in range(len(sizes))
        for second in range(len(sizes))
        if first != second
    ]
    return min((tile_bytes(order, width) for order in orders), default=math.prod(shape) * width)


class Program:
    """A program in order, with what it calls inlined and equal operations merged."""

    def __init__(self, closed: ClosedJaxpr):
        jaxpr = closed.jaxpr
        values: dict[Any, Array | None] = {
            v: Array(v.aval) for v in (*jaxpr.invars, *jaxpr.constvars)
        }
        self.inputs = [values[v] for v in jaxpr.invars]
        self.operations: list[Operation] = []
        self._add(jaxpr, values, {})
        self.outputs = [values[v] for v in jaxpr.outvars if not isinstance(v, Literal)]
        self._drop_unused()

    def _add(self, jaxpr: Any, values: dict[Any, Array | None], known: dict[Any, Any]) -> None:
        for eqn in jaxpr.eqns:
            name = eqn.primitive.name
            inputs = [None if isinstance(v, Literal) else values[v] for v in eqn.invars]
            if name in CALLS:
                inner, _ = program_of(eqn)
                inside: dict[Any, Array | None] = dict(zip(inner.invars, inputs, strict=True))
                inside |= {v: Array(v.aval) for v in inner.constvars}
                # What is rematerialised must not be found among what was computed before.
                self._add(inner, inside, {} if name in ("checkpoint", "remat2") else known)
                results = [None if isinstance(v, Literal) else inside[v] for v in inner.outvars]
                values.update(zip(eqn.outvars, results, strict=True))
            elif _is_alias(eqn):
                for array, variable in zip(inputs, eqn.outvars, strict=False):
                    values[variable] = array
                    if array is not None:
                        array.shapes.add(tuple(variable.aval.shape))
            else:
                values.update(zip(eqn.outvars, self._operation(eqn, inputs, known), strict=True))

    def _operation(self, eqn: Any, inputs: list[Any], known: dict[Any, Any]) -> list[Array]:
        read = [array for array in inputs if array is not None]
        operation = Operation(eqn.primitive.name, read, _cuts_lanes(eqn))
        key = None
        if operation.name not in _OPAQUE:
            ids = [id(x) if x else str(v) for x, v in zip(inputs, eqn.invars, strict=True)]
            key = (operation.name, *ids, str(eqn.params), str(eqn.outvars[0].aval))
            if key in known:
                return known[key]
        operation.results = [Array(v.aval, operation) for v in eqn.outvars]
        self.operations.append(operation)
        if key is not None:
            known[key] = operation.results
        return operation.results

    def _drop_unused(self) -> None:
        used: set[Operation] = set()
        stack = [array.source for array in self.outputs if array and array.source]
        while stack:
            operation = stack.pop()
            if operation not in used:
                used.add(operation)
                stack += [array.source for array in operation.inputs if array.source]
        self.operations = [each for each in self.operations if each in used]
        for place, operation in enumerate(self.operations):
            operation.place = place
            for array in dict.fromkeys(operation.inputs):
                array.readers.append(operation)


def _is_alias(eqn: Any) -> bool:
    """Whether the results are the operands in another form, without a pass over memory."""
    name = eqn.primitive.name
    if not eqn.invars:
        return False
    operand, result = eqn.invars[0].aval, eqn.outvars[0].aval
    if name == "transpose":
        return len(operand.shape) < 3  # a product reads a matrix either way
    same = name in _SHORT and operand.size == result.size and len(eqn.outvars) == 1
    return name in SAME or same or changes_nothing(eqn)


def _cuts_lanes(eqn: Any) -> bool:
    if eqn.primitive.name not in ("slice", "split"):
        return False
    whole, parts = eqn.invars[0].aval.shape[-1], [v.aval.shape[-1] for v in eqn.outvars]
    first = eqn.params["start_indices"][-1] if eqn.primitive.name == "slice" else 0
    return any(part != whole and (part % _LANES or first % _LANES) for part in parts)


def mark_written(program: Program, gathered: bool) -> None:
    """Marks the arrays that XLA writes, as the head of the file says."""
    for operation in program.operations:
        if not operation.is_elementwise:
            for array in operation.results:
                array.written = True
            if not _is_fusible(operation):
                for array in operation.inputs:
                    array.operand = array.operand or array.source is not None
            if operation.name == "pallas_call" or operation.cuts_lanes:
                for array in (*operation.inputs, *operation.results):
                    array.row_major = True
    for operation in program.operations:
        if operation.name == "dot_general":
            _move_to_end(program, operation.results[0])
    for operation in program.operations:
        if operation.is_elementwise:
            for array in operation.results:
                array.written = array.written or _is_widened(array) or _is_small_part(array)
                array.operand = array.operand or _is_shared(array, gathered)
    for array in program.outputs:
        if array and array.source:
            array.written = True


def _is_fusible(operation: Operation) -> bool:
    """Whether elementwise operations can be computed where this one reads its operands."""
    return operation.name == "dot_general" or operation.name.startswith(("reduce", "arg"))


def _move_to_end(program: Program, array: Array) -> None:
    """Writes what is computed with a product instead of the product."""
    while len(array.readers) == 1 and array not in program.outputs:
        reader = array.readers[0]
        if not reader.is_elementwise or [x.count for x in reader.results] != [array.count]:
            break
        if reader.results[0].width > array.width and not reader.results[0].is_reshaped:
            break
        array.written, array = False, reader.results[0]
    array.written = True


def _is_widened(array: Array) -> bool:
    operation = array.source
    if operation is None or operation.name != "convert_element_type" or not operation.inputs:
        return False
    narrow = operation.inputs[0]
    wider = narrow.floating and narrow.width == 2 and array.width == 4
    return wider and array.is_reshaped and narrow.source is not None and len(array.readers) > 1


def _is_small_part(array: Array) -> bool:
    """Whether it is cut from a written array that it lets go."""
    operation = array.source
    if operation is None or operation.name not in ("slice", "dynamic_slice"):
        return False
    whole = operation.inputs[0]
    return whole.written and 2 * array.bytes <= whole.bytes


def _is_shared(array: Array, gathered: bool) -> bool:
    """Whether several products read it from memory."""
    products = [x for x in array.readers if x.name == "dot_general"]
    if len(products) < 2:
        return False
    repeated, sources = _repeated(array)
    if not repeated & _ACTIVATIONS or not any(each.is_reshaped for each in sources):
        return True
    return gathered and len(sources) == 1


def _repeated(array: Array) -> tuple[set[str], list[Array]]:
    """The elementwise operations behind it, and the written arrays of its size that they read."""
    found, sources, seen = set(), [], set()
    stack = [array]
    while stack:
        each = stack.pop()
        if each in seen or each.count != array.count:
            continue
        seen.add(each)
        if each.source is None or (each.written and each is not array):
            sources.append(each)
        elif each.source.is_elementwise:
            found.add(each.source.name)
            stack += each.source.inputs
    return found, sources


def read_from_memory(operation: Operation, inputs: set[Array]) -> set[Array]:
    """The written arrays and inputs from which an operation is computed."""
    seen: set[Array] = set()
    found: set[Array] = set()
    stack = [(array, not operation.is_elementwise) for array in operation.inputs]
    while stack:
        array, direct = stack.pop()
        if array in seen:
            continue
        seen.add(array)
        if array.written or array in inputs or (array.operand and direct):
            found.add(array)
        elif array.source is not None:
            repeated = array.source
            stack += [(each, not repeated.is_elementwise) for each in repeated.inputs]
    return found


def buffers(
    program: Program,
    held: list[int],
    results: list[int],
    gathered: bool,
    cut: dict[tuple[int, ...], int],
) -> list[Buffer]:
    """What is in memory from where to where; the arguments are those of `written_bytes`."""
    mark_written(program, gathered)
    inputs = {array for array in program.inputs if array}
    first: dict[Array, int] = {}
    last: dict[Array, int] = {}
    for operation in program.operations:
        if any(array.written or array.operand for array in operation.results):
            for array in read_from_memory(operation, inputs):
                first.setdefault(array, operation.place)
                last[array] = operation.place
    end = len(program.operations)
    kept = dict(zip(program.outputs, results, strict=False))
    found = [
        Buffer(first[array], last[array], size if gathered else array.bytes)
        for array, size in zip(program.inputs, held, strict=True)
        if array in first and size and (gathered or array.row_major)
    ]
    for operation in program.operations:
        for array in operation.results:
            if array in kept:
                found.append(Buffer(operation.place, end, kept[array]))
            elif array.written or array.operand:
                until = last.get(array, operation.place)
                share = min((cut[shape] for shape in array.shapes if shape in cut), default=1)
                found.append(Buffer(operation.place, until, array.bytes // share))
    return found


def heap_height(taken: Iterable[Buffer]) -> int:
    """Bytes from the start of memory to the end of what is ever used of it."""
    height, ends = 0, []
    held: dict[int, tuple[int, int]] = {}
    order = sorted((x for x in taken if x.bytes), key=lambda x: (x.start, -x.bytes))
    for number, buffer in enumerate(order):
        size = -(-buffer.bytes // _ALIGNMENT) * _ALIGNMENT
        while ends and ends[0][0] < buffer.start:
            held.pop(heapq.heappop(ends)[1])
        place = 0
        for start, stop in sorted(held.values()):
            if start - place >= size:
                break
            place = max(place, stop)
        held[number] = place, place + size
        heapq.heappush(ends, (buffer.end, number))
        height = max(height, place + size)
    return height


def written_bytes(
    function: Callable[..., Any],
    moving: Any,
    *rest: Any,
    held: list[int],
    results: list[int],
    gathered: bool,
    cut: dict[tuple[int, ...], int],
) -> tuple[int, int]:
    """(bytes in memory for the gradient of `function(moving, *rest)` by `moving`, operations).

    Shapes are enough as arguments. `held` has the bytes that each of their arrays takes while it is
    used, 0 for one that is in memory anyway; `results` has those of each gradient, which stay.
    `cut` has the number of devices that share arrays of a shape, such as tables, at all times.
    Operations are those that write 16 KiB or more.
    """
    program = Program(jax.make_jaxpr(jax.value_and_grad(function))(moving, *rest))
    taken = buffers(program, held, [0, *results], gathered, cut)
    return heap_height(taken), len({x.start for x in taken if x.bytes >= _ALIGNMENT})
