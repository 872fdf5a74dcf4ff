"""The same model with another id map: bytes, pad, begin and end of sequence get other ids.

The rows of every byte embedding and of the output projection move with their ids, so that each byte
keeps its cost: bits per byte and greedy generation do not change.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from bytelm.config import ByteVocab, ModelConfig, require
from bytelm.leaves import is_output_head
from bytelm.memory import host_memory
from bytelm_jax.models import Params, abstract_params

_COPIES = 4
"""How often memory must hold the rows of a larger vocabulary: old, new, and between them."""

SILENT = -(2.0**13)
"""Bias of an id that is never predicted: its probability is 0 in every dtype, and casts keep it."""


def remap_vocab(
    config: ModelConfig, params: Params, vocab: ByteVocab
) -> tuple[ModelConfig, Params]:
    """Configuration and parameters of the same model with the id map `vocab`.

    Unused ids keep their rows, in order, since the softmax counts them. A larger vocabulary adds
    ids whose bias gives them no probability; a smaller one may drop only such ids. Raises
    `ValueError` if no such model exists: for n-gram embeddings, whose hashes depend on ids, for a
    larger vocabulary without a bias to silence new ids, and for a smaller one that would drop an id
    with a probability.
    """
    if vocab == config.vocab:
        return config, params
    remapped = config.with_vocab(vocab)
    added = vocab.size > config.vocab.size
    biased = "to_logits.bias" in params
    require(
        biased or not added,
        f"vocab.size={vocab.size}: the output layer has no bias with which to silence ids above "
        f"{config.vocab.size - 1}; keep size={config.vocab.size}",
    )
    if added:
        new = remapped.parameter_count() - config.parameter_count()
        most = host_memory() * (vocab.size - config.vocab.size) // (_COPIES * 4 * new)
        fits = vocab.size <= most
        require(fits, f"vocab.size={vocab.size}: does not fit into memory; choose at most {most}")
    source = _sources(config.vocab, vocab, _silent_ids(params, config.vocab.size))
    shapes = {name: leaf.shape for name, leaf in abstract_params(remapped).items()}
    return remapped, {
        name: _moved(name, value, shapes[name], source, config.vocab.size)
        for name, value in params.items()
    }


def _sources(old: ByteVocab, new: ByteVocab, silent: set[int]) -> np.ndarray:
    """The old id of each new one, −1 for an added one."""
    source = np.full(new.size, -1)
    source[new.offset : new.offset + 256] = np.arange(old.offset, old.offset + 256)
    for name in ("pad_id", "bos_id", "eos_id"):
        source[getattr(new, name)] = getattr(old, name)
    # Ids with a probability first: those that do not fit must be silent.
    used = set(source.tolist())
    unused = [i for i in range(old.size) if i not in used]
    unused = [i for i in unused if i not in silent] + [i for i in unused if i in silent]
    added = np.flatnonzero(source < 0)
    lost = [i for i in unused[len(added) :] if i not in silent]
    require(
        not lost,
        f"vocab.size={new.size}: too small for the {old.size} ids of this model, whose unused "
        f"ids have a probability, too; choose at least {new.size + len(lost)}",
    )
    count = min(len(added), len(unused))
    source[added[:count]] = unused[:count]
    return source


def _silent_ids(params: Params, size: int) -> set[int]:
    bias = params.get("to_logits.bias")
    if bias is None:
        return set()
    return set(np.flatnonzero(np.asarray(bias, np.float64)[:size] <= SILENT).tolist())


def _moved(name: str, value: Array, shape: tuple[int, ...], source: np.ndarray, size: int) -> Array:
    """A leaf with its rows or columns in the new order if they belong to ids, else unchanged."""
    module, _, leaf = name.rpartition(".")
    last = module.rpartition(".")[2]
    if leaf == "embedding" and last.endswith("embed"):
        return _taken(value, source, 0.0)
    if not is_output_head(name):
        return value
    # Columns that only pad the product belong to no id.
    spare = np.arange(size, size + shape[-1] - len(source))
    fill = SILENT if leaf == "bias" else 0.0
    columns = np.where(spare < value.shape[-1], spare, -1)
    return _taken(value.T, np.concatenate([source, columns]), fill).T


def _taken(value: Array, rows: np.ndarray, fill: float) -> Array:
    taken = value[np.maximum(rows, 0)]
    missing = (rows < 0).reshape(-1, *[1] * (value.ndim - 1))
    return jnp.where(missing, jnp.asarray(fill, value.dtype), taken)
