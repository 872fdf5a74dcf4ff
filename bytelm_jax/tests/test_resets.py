"""Where texts start over, as literal matrices; every function in both packages."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from bytelm import tolerances
from bytelm.config import ByteVocab, MegabyteConfig
from bytelm.config import ByteVocab as TorchByteVocab
from bytelm_jax.layers import resets
from bytelm_torch.layers import resets as torch_resets

VOCAB = ByteVocab(size=264, offset=3, pad_id=0, bos_id=1, eos_id=2)
TORCH_VOCAB = TorchByteVocab(size=264, offset=3, pad_id=0, bos_id=1, eos_id=2)
a, n, e = 100, 10 + 3, 2  # a byte, a newline, an end of document


def both(name, ids, *rest):
    """The function `name` of both packages, which must agree; JAX's answer."""
    run = jax.jit(getattr(resets, name), static_argnums=range(1, 2 + len(rest)))
    ours = run(jnp.asarray(ids, jnp.int32), VOCAB, *rest)
    theirs = getattr(torch_resets, name)(torch.tensor(ids, dtype=torch.int64), TORCH_VOCAB, *rest)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y), tuple(ours), tuple(theirs))
    return ours


def test_the_id_that_ends_a_segment_belongs_to_it():
    ids = [[n, a, n, n, e, a], [a, a, e, a, a, n]]
    newline = [[1, 0, 1, 1, 0, 0], [0, 0, 0, 0, 0, 1]]
    document = [[0, 0, 0, 0, 1, 0], [0, 0, 1, 0, 0, 0]]
    np.testing.assert_array_equal(both("ends_segment", ids, "newline"), newline)
    np.testing.assert_array_equal(both("ends_segment", ids, "document"), document)
    assert not both("ends_segment", ids, "none").any()
    segment_starts = both("find_segment_starts", ids, "newline")
    np.testing.assert_array_equal(segment_starts, [[0, 1, 1, 3, 4, 4], [0, 0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(
        resets.position_in_segment(segment_starts), [[0, 0, 1, 0, 0, 1], [0, 1, 2, 3, 4, 5]]
    )
    segment_starts = both("find_segment_starts", ids, "document")
    np.testing.assert_array_equal(segment_starts, [[0, 0, 0, 0, 0, 5], [0, 0, 0, 3, 3, 3]])
    assert both("find_segment_starts", np.zeros((2, 0), int).tolist(), "newline").shape == (2, 0)
    before = resets.pad_segment_starts(
        jnp.full((2, 6), a), resets.position_in_segment(segment_starts), VOCAB.pad_id
    )
    np.testing.assert_array_equal(before, [[0, a, a, a, a, 0], [0, a, a, 0, a, a]])


def test_lines_become_patches_filled_with_pads():
    # Lines of 1, 3 and 2 bytes, one of 1 and one that the row's end leaves open.
    ids = [[n, 50, 51, n, 52, n, n, 53]]
    layout = both("lay_out", ids, "newline", 2, 8)
    patches = [[n, 0], [50, 51], [n, 0], [52, n], [n, 0], [53, 0], [0, 0], [0, 0]]
    np.testing.assert_array_equal(layout.patches[0], patches)
    np.testing.assert_array_equal(layout.slots[0], [0, 2, 3, 4, 6, 7, 8, 10])
    np.testing.assert_array_equal(layout.bytes[0], [0, 8, 1, 2, 3, 8, 4, 5, 6, 8, 7, 8, 8, 8, 8, 8])
    np.testing.assert_array_equal(layout.segment_starts[0], [0, 1, 1, 4, 6, 7, 8, 8])
    np.testing.assert_array_equal(layout.segment_positions[0], [0, 0, 1, 0, 0, 0, 0, 0])
    assert layout.overflow[0] == 0


def test_a_reset_without_room_is_not_made_and_no_byte_is_lost():
    # Undivided the row fills 4 patches of 2. With 5, the reset at 1 still fits (1 + 4); those at 4
    # and 5 (3 + 2 and 4 + 2 …) do while what is left fits behind them.
    ids = [[n, 50, 51, n, n, 52, n, 53]]
    layout = both("lay_out", ids, "newline", 2, 5)
    patches = [[n, 0], [50, 51], [n, 0], [n, 52], [n, 53]]
    np.testing.assert_array_equal(layout.patches[0], patches)
    np.testing.assert_array_equal(layout.segment_starts[0], [0, 1, 1, 4, 4])
    assert layout.overflow[0] == 2
    least = both("lay_out", ids, "newline", 2, 4)  # no room beyond the bytes: one text
    np.testing.assert_array_equal(least.slots[0], range(8))
    assert least.overflow[0] == 4
    whole = both("lay_out", [[n] * 6], "newline", 3, 6)  # the worst case of T patches
    np.testing.assert_array_equal(whole.slots[0], range(0, 18, 3))
    assert whole.overflow[0] == 0


lay_out = jax.jit(resets.lay_out, static_argnums=(1, 2, 3, 4))


@pytest.mark.parametrize("patch", [1, 2, 3, 8])
def test_layouts_of_any_text_and_room(patch):
    source = np.random.default_rng(patch)
    for length in (0, 1, patch, 3 * patch + 2, 29):
        ids = np.where(source.random((8, length)) < source.random((8, 1)), n, a)
        least = max(1, -(-length // patch))
        for capacity in sorted({least, max(least, length // 2), max(1, length)}):

            def arrange(ids, capacity=capacity):
                tensor = torch.from_numpy(np.array(ids))
                return torch_resets.lay_out(tensor, TORCH_VOCAB, "newline", patch, capacity)

            layout = arrange(ids)
            slots = layout.slots.numpy()
            assert (np.diff(slots, axis=1) > 0).all() and (slots < capacity * patch).all()
            flat = layout.patches.reshape(8, -1).numpy()
            np.testing.assert_array_equal(np.take_along_axis(flat, slots, axis=1), ids)
            assert capacity < length or not layout.overflow.any()
            # Decided from the past: another end of the row moves nothing before it.
            changed, prefix = ids.copy(), length // 2 + 1
            changed[:, length // 2 :] = n
            np.testing.assert_array_equal(arrange(changed).slots[:, :prefix], slots[:, :prefix])
            if patch == 3 and length == 29:
                ours = lay_out(ids.astype(np.int32), VOCAB, "newline", patch, capacity)
                for one, other in zip(ours, layout, strict=True):
                    np.testing.assert_array_equal(one, other)


def test_reads_whose_gradient_is_a_read():
    x = jnp.arange(12.0).reshape(2, 3, 2)
    index, inverse = jnp.array([[2, 0], [1, 2]]), jnp.array([[1, 2, 0], [2, 0, 1]])
    weights = jnp.array([[[1.0, 2], [3, 4]], [[5, 6], [7, 8]]])
    taken, back = jax.vjp(lambda x: resets.take_once(x, index, inverse), x)
    np.testing.assert_array_equal(taken, torch_resets.take_once(*torch_pair(x, index)))
    np.testing.assert_array_equal(taken[0], x[0, jnp.array([2, 0])])
    (gradient,) = back(weights)
    np.testing.assert_array_equal(gradient[0], [[3, 4], [0, 0], [1, 2]])
    np.testing.assert_array_equal(gradient[1], [[0, 0], [5, 6], [7, 8]])


def torch_pair(x, index):
    return torch.from_numpy(np.array(x)), torch.from_numpy(np.array(index)).long()


def test_sums_within_segments_are_those_of_the_segment_alone():
    source = np.random.default_rng(0)
    x = source.standard_normal((2, 21, 3)).astype(np.float32)
    ids = np.where(source.random((2, 21)) < 0.2, n, a)
    segment_positions = np.array(
        resets.position_in_segment(resets.find_segment_starts(jnp.asarray(ids), VOCAB, "newline"))
    )
    actual = np.asarray(jax.jit(resets.segmented_sums)(x, segment_positions))
    theirs = torch_resets.segmented_sums(torch.from_numpy(x), torch.from_numpy(segment_positions))
    np.testing.assert_array_equal(actual, theirs)
    for row, t in np.ndindex(2, 21):
        segment_start = t - segment_positions[row, t]
        exact = x[row, segment_start : t + 1].astype(float).sum(axis=0)
        np.testing.assert_allclose(actual[row, t], exact, rtol=0, atol=tolerances.LOGITS["float32"])
        alone = torch_resets.segmented_sums(
            torch.from_numpy(x[row : row + 1, segment_start : t + 1]),
            torch.arange(t + 1 - segment_start)[None],
        )
        np.testing.assert_array_equal(actual[row, t], alone[0, -1])  # not one bit from outside


def test_room_in_training():
    config = MegabyteConfig(patch_size=4, max_length=64, reset_on="newline")
    assert [config.reset_patches(length) for length in (0, 1, 4, 5, 64)] == [2, 2, 2, 3, 24]
    for bad in (0.5, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="reset_room="):
            MegabyteConfig(reset_room=bad)
