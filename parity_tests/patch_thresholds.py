"""A threshold for random models whose patches the tests compare."""

from torch import Tensor


def splitting_threshold(entropies: Tensor) -> float:
    """A threshold that about half of these entropies exceed, by far more than rounding.

    It lies in the middle of the widest gap of the middle third. The median itself may have an equal
    neighbour, since a text that repeats itself repeats its entropies; which numbers a seed gives
    depends on PyTorch's version.
    """
    ranked = entropies.flatten().sort().values
    low, high = len(ranked) // 3, len(ranked) - len(ranked) // 3
    gaps = ranked[low:high].diff()
    widest = int(gaps.argmax())
    assert gaps[widest] > 1e-4, "rounding could move a boundary"
    return float(ranked[low + widest : low + widest + 2].mean())
