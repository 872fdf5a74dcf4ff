"""Parts of layers that the compiler would not divide well between devices that share them.

Where the layers of one copy are cut over several devices (`--tensor`), the compiler finds most of
the work of each by itself from where the parameters lie. Two parts it would compute on arrays that
it gathers first; a partition, which `training/mesh.py` makes, has them computed where they lie. So
are tables of n-grams, of which a step reads few rows, where the state is cut (`--fsdp`). Everywhere
else they are the plain functions: on one device nothing is added to a program.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, Float, Integer


@runtime_checkable
class Partition(Protocol):
    """How the two are computed over devices that share layers."""

    def by_rows(
        self, find: Callable[[Array, Array], Array], table: Array, ids: Array, fill: float
    ) -> Array:
        """`find(table, ids)`, with the table cut by rows."""
        ...

    def by_heads(self, attend: Callable[..., Array], shared: Any, *arrays: Array) -> Array:
        """`attend(shared, *arrays)`, with each of the arrays and the result cut by heads."""
        ...


Find = Callable[[Array, Array], Array]
"""Sums of rows of a table: (table [V, D], ids [B, T, E]) → [B, T, D]."""

Columns = Callable[[Find, Array, Array, int], Array]
"""`by_columns` on a mesh."""

_partition: ContextVar[Partition | None] = ContextVar("_partition", default=None)
_columns: ContextVar[Columns | None] = ContextVar("_columns", default=None)


def is_partitioned() -> bool:
    """Whether layers are traced for several devices that share them."""
    return _partition.get() is not None


@contextmanager
def partitioned(partition: Partition | None, columns: Columns | None = None) -> Iterator[None]:
    """Within this context layers are traced for `partition`, and large tables for `columns`."""
    before, whole = _partition.set(partition), _columns.set(columns)
    try:
        yield
    finally:
        _partition.reset(before)
        _columns.reset(whole)


def by_rows(
    find: Callable[[Array, Array], Array],
    table: Float[Array, "V D"],
    ids: Integer[Array, "*batch"],
    fill: float,
) -> Float[Array, "..."]:
    """`find(table, ids)`, a sum of rows of the table or one of them, on the last axis.

    An id that a device's part of the table does not hold adds nothing, so that one sum over the
    devices, of results and not of rows, makes the whole. `fill` is what `find` gives for an id
    outside the table.
    """
    partition = _partition.get()
    return find(table, ids) if partition is None else partition.by_rows(find, table, ids, fill)


def by_columns(
    find: Find, table: Float[Array, "V C"], ids: Integer[Array, "*batch"], width: int
) -> Float[Array, "..."]:
    """`find(table, ids)` for a table of `width` columns that is too large to be gathered.

    Each device keeps some of its columns, finds these for the ids of all devices that share the
    table, and sends every device what belongs to its own ids. Inside `shard_map`, `table` holds a
    device's columns alone. An id outside the table adds nothing.
    """
    columns = _columns.get()
    if columns is None:
        return by_rows(find, table, ids, 0.0)
    return columns(find, table, ids, width)


def by_heads(
    attend: Callable[..., Array], shared: Any, *arrays: Float[Array, "..."]
) -> Float[Array, "..."]:
    """`attend(shared, *arrays)`, which computes each head, of the axis before the last, alone.

    The arrays are [B, …, H, K]; those of `shared`, [B, …], are the same for all heads. Flattening
    patches' vectors with their heads, as reading by segments does, would otherwise gather the heads
    of all devices; and the compiler does not divide a kernel of Pallas.
    """
    partition = _partition.get()
    if partition is None:
        return attend(shared, *arrays)
    return partition.by_heads(attend, shared, *arrays)
