"""The operations of a compiled program, by the unit that does them.

A TPU's compiler gives one sum of products, which the matrix unit does, and of work by the element,
which the vector unit does; it leaves kernels out, but for those that state their cost. A GPU's
compiler gives nothing. So products and kernels are counted here, from the program's text.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from bytelm_jax.tools.collectives import computations, run_counts


class Work(NamedTuple):
    """Operations of one device in a step; a multiply-add counts as two."""

    products: float
    """Matrix products of the program itself."""
    kernels: float
    """Kernels, in the whole blocks that they compute; on a GPU, whose blocks nobody tells, in the
    positions that a position sees."""
    elementwise: float
    """The rest: norms, softmax, sums over rows, the optimizer. 0 for a GPU: it is not known."""

    @property
    def total(self) -> float:
        """All of them."""
        return sum(self)


def read_work(text: str, counted: float) -> Work:
    """The work of a program's text, of which the compiler counted `counted` operations, or none."""
    products, groups = product_flops(text), grouped_flops(text)
    attention = kernel_flops(text) + cudnn_flops(text)
    # Grouped products state their cost, so that the compiler counts them, without their tiles.
    elementwise = counted - products - groups.stated
    return Work(products, attention + groups.computed, max(elementwise, 0.0))


_SHAPE = re.compile(r"\w+\[([\d,]*)\]")
_RESULT = re.compile(r"^\s+(?:ROOT )?%?[\w.-]+ = \(?\w+\[([\d,]*)\]")
_DEFINED = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = \w+\[([\d,]*)\]")
_PRODUCT = re.compile(r" (?:convolution|dot|custom-call)\(%?([\w.-]+), %?([\w.-]+)")
_CONTRACTED = re.compile(
    r'(?:lhs_contracting_dims=\{|__cublas\$.*"lhs_contracting_dimensions":\[)(["\d,]*)'
)
_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
_WINDOW = re.compile(r"window=\{([^}]*)\}")


def product_flops(text: str) -> float:
    """Operations of the products of a program; a TPU's compiler writes them as convolutions."""
    bodies, entry = computations(text)
    times, total = run_counts(bodies, entry), 0.0
    for name, lines in bodies.items():
        if not times[name]:
            continue
        shapes = {found[1]: _sizes(found[2]) for found in map(_DEFINED.match, lines) if found}
        total += times[name] * sum(_one_product(line, shapes) for line in lines)
    return total


def _one_product(line: str, shapes: dict[str, list[int]]) -> float:
    product, labels, defined = _PRODUCT.search(line), _LABELS.search(line), _RESULT.match(line)
    if product is None or defined is None:
        return 0.0
    if contracted := _CONTRACTED.search(line):
        along = [int(axis) for axis in contracted[1].replace('"', "").split(",") if axis]
        inner = math.prod(shapes[product[1]][axis] for axis in along)
        return 2.0 * math.prod(_sizes(defined[1])) * inner
    if labels is None:
        return 0.0
    left, right = (dict(zip(labels[i], shapes[product[i]], strict=True)) for i in (1, 2))
    out = dict(zip(labels[3], _sizes(defined[1]), strict=True))
    window = _WINDOW.search(line)
    fields = dict(each.split("=") for each in window[1].split()) if window else {}
    total = 2.0 * out["b"] * out["f"] * right["i"]
    for axis in filter(str.isdigit, labels[3]):
        place = {key: value.split("x")[int(axis)] for key, value in fields.items()}
        total *= _pairs(left[axis], right[axis], out[axis], place)
    return total


def _pairs(length: int, size: int, outputs: int, place: dict[str, str]) -> int:
    """Pairs of an output and a place of its window at which there is an input, and no padding."""
    stride, dilated = int(place.get("stride", 1)), int(place.get("lhs_dilate", 1))
    apart, before = int(place.get("rhs_dilate", 1)), int(place.get("pad", "0_0").split("_")[0])
    found = 0
    for at in range(size):
        for output in range(outputs):
            spot = output * stride + at * apart - before
            found += spot % dilated == 0 and 0 <= spot < length * dilated
    return found


_ATTENTION = re.compile(
    r"%splash_\w*?_(fwd|dq|dkv)_[\w.]* = .*operand_layout_constraints=\{(.*?\})\}"
)
_PRODUCTS = {"fwd": (1, 1), "dq": (2, 1), "dkv": (2, 2)}
"""Attention kernel → its products of a block over the width of keys, and over that of values."""


def kernel_flops(text: str) -> float:
    """Operations of the attention kernels in a program's text, which the compiler does not count.

    A kernel computes whole blocks: of queries in block i, those of keys up to i, or in a window the
    last few of them. Their number stands in the shape of its first operand, [1, blocks, blocks].
    """
    total = 0.0
    for times, match in _calls(text, _ATTENTION):
        shapes = [_sizes(x) for x in _SHAPE.findall(match[2]) if x]
        blocks, seen = max(shapes[0]), min(shapes[0][1:])
        *rows, length, wide = shapes[2]  # [B, H, T, K]; a batch of one row has no axis
        width = shapes[4][-1]
        computed = sum(min(i + 1, seen) for i in range(blocks))
        over_keys, over_values = _PRODUCTS[match[1]]
        area = computed * (length // blocks) ** 2
        total += times * 2.0 * math.prod(rows) * area * (
            over_keys * wide + over_values * width
        )  # fmt: skip
    return total


_CUDNN = re.compile(
    r'custom_call_target="__cudnn\$fmhaSoftmax(Backward)?".*?operand_layout_constraints=\{(.*?\})\}'
    r'.*"sliding_window_length": ?"?(\d+)'
)


def cudnn_flops(text: str) -> float:
    """Operations of cuDNN's causal attention: two products forward and five backward."""
    total = 0.0
    for times, match in _calls(text, _CUDNN):
        query, _, value, *_ = [_sizes(x) for x in _SHAPE.findall(match[2]) if x]
        rows, length, heads, wide = query
        window = int(match[3]) or length
        seen = sum(min(i + 1, window) for i in range(length))
        over_keys, over_values = (3, 2) if match[1] else (1, 1)
        features = over_keys * wide + over_values * value[-1]
        total += times * 2.0 * rows * heads * seen * features
    return total


class Grouped(NamedTuple):
    """Operations of grouped products (`kernels.megablox`)."""

    stated: float
    """Those of the rows, which the kernels state and the compiler counts."""
    computed: float
    """Those of whole tiles, at most: a tile in which a group ends is computed once more."""


_GROUPED = re.compile(r"%t?gmm[\w.]* = .*operand_layout_constraints=\{(.*?\})\}")


def grouped_flops(text: str) -> Grouped:
    """Operations of the grouped products in a program's text.

    Their first operands say where groups start, [groups + 1], and which group and which rows each
    tile has, [tiles + groups - 1]; the last two are rows [M, I] and kernels [groups, I, O], or for
    the gradient of kernels rows [M, I] and [M, O].
    """
    stated = computed = 0.0
    for times, match in _calls(text, _GROUPED):
        *numbers, rows, other = [_sizes(x) for x in _SHAPE.findall(match[1]) if x]
        most, groups = numbers[1][0], numbers[0][0] - 1
        own = times * 2.0 * math.prod(rows) * other[-1]
        if len(other) == 3:
            own = times * 2.0 * rows[0] * math.prod(other[1:])
        stated += own
        computed += own * most / (most - groups + 1)
    return Grouped(stated, computed)


def _calls(text: str, kernel: re.Pattern[str]) -> Iterator[tuple[int, re.Match[str]]]:
    """How often each call of a kernel runs, and its match."""
    bodies, entry = computations(text)
    times = run_counts(bodies, entry)
    for name, lines in bodies.items():
        for match in (kernel.search(line) for line in lines if times[name]):
            if match is not None:
                yield times[name], match


def _sizes(shape: str) -> list[int]:
    return [int(size) for size in shape.split(",") if size]
