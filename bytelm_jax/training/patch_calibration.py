"""What a run knows of its patches: measured, calibrated, kept, and compared with other data.

A Byte Latent Transformer learns from patches of a certain length. Data that falls into much longer
or shorter ones, because it is other data or because the entropy model or the threshold is another
one, costs bits that no log explains; so a run stores a `PatchingContract`, and whoever opens other
data with it is told. Patches are counted as the metric `patch_length` counts them: in windows as
those of the training, BOS standing for the last byte of each.
"""

import functools
import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, Int

from bytelm import patch_rules, runs
from bytelm.config import BLTConfig, PatchingContract, Recipe, require
from bytelm.config.blt import HISTOGRAM_LIMIT
from bytelm.data import Mixture, Windows, evaluation_batches
from bytelm_jax.layers.transformer import positions_in
from bytelm_jax.models import Params, define_model, patching
from bytelm_jax.models.entropy import entropy, segment_starts_of, shift_right
from bytelm_jax.training import checkpoint

BAND = 2.0
"""A mean patch length this many times longer or shorter than the contract's is told."""

TOLERANCE = 0.02
"""How far, relatively, a calibrated mean may lie from the one asked for."""

OVERFLOW = 0.001
"""The share of windows that may have more patches than there is room for."""

_LONGEST = 32  # bytes; the histogram's last entry counts these and all longer patches
_SAMPLE, _ROWS = 64, 16  # windows that stand for a corpus, and how many run at once
_PREFIX = "patcher."
_FROM_SOURCE = ("entropy", "threshold", "bytes_per_patch")


# ---- measuring --------------------------------------------------------------------------------


def measure(
    config: Any, params: Params, windows: Windows | Mixture, limit: int | None = _SAMPLE
) -> PatchingContract:
    """The contract of `config`, a `BLTConfig`, on at most `limit` windows, evenly spaced."""
    return _contract(config, params, boundary_scores(config, params, windows, limit))


def boundary_scores(
    config: BLTConfig, params: Params, windows: Windows | Mixture, limit: int | None
) -> Float32[np.ndarray, " bytes"]:
    """For every byte the least threshold under which no patch starts at it.

    That is the entropy of its prediction where the patcher `entropy` is free to choose, plus
    infinity where a patch starts in any case (under another patcher, wherever one starts) and minus
    infinity where none may. `params` are those of the whole model.
    """
    if config.patcher == "entropy":
        config = replace(config, threshold=0.0)  # which does not matter: one program for all
    look = _looker(replace(config, bytes_per_patch=1.0))
    own = patcher_params(params)
    found = []
    for batch in evaluation_batches(windows, _ROWS, limit):
        scores, counted = look(own, batch.ids)
        found.append(np.asarray(scores)[np.asarray(counted)])
    scores = np.concatenate(found)
    sane = not np.isnan(scores).any()
    require(sane, "entropies: not a number; this entropy model has diverged, train another")
    return scores


@functools.lru_cache(maxsize=8)
def _looker(config: BLTConfig) -> Callable[[Params, np.ndarray], tuple[Any, Any]]:
    by_entropy = config.patcher == "entropy"
    bind = define_model(config.entropy)[0] if by_entropy else None

    @jax.jit
    def look(params: Params, ids: Any) -> tuple[Any, Any]:
        segment_starts = segment_starts_of(ids, config)
        shifted = shift_right(ids, config.vocab.bos_id, segment_starts)
        scores = never = jnp.full(shifted.shape, -jnp.inf)
        free = forced = patching.patch_starts(config, shifted, never, segment_starts)[:, :-1]
        if bind is not None:
            scores = jnp.roll(entropy(bind(params).predict(shifted, segment_starts)), 1, axis=1)
            free = patching.patch_starts(config, shifted, -never, segment_starts)[:, :-1]
        if segment_starts is not None:
            forced = forced | (segment_starts == jnp.arange(ids.shape[1])[None, :])
        scores = jnp.where(forced, jnp.inf, jnp.where(free, scores, -jnp.inf))
        return scores.astype(jnp.float32), _counted(config, shifted, ids, segment_starts)

    return look


def _counted(config: BLTConfig, shifted: Any, ids: Any, segment_starts: Any) -> Any:
    """Which positions belong to a text: a last batch ends in empty rows, where BOS is no patch."""
    return patching.present(shifted, config.vocab, segment_starts) & (
        ids[:, :1] != config.vocab.pad_id
    )


def _contract(config: BLTConfig, params: Params, scores: np.ndarray) -> PatchingContract:
    # A window begins with a patch, so that cutting all of them at once mixes no two.
    starts = np.flatnonzero(scores > config.threshold)
    lengths = np.minimum(np.diff(starts, append=scores.size), _LONGEST)
    counts = np.bincount(lengths, minlength=_LONGEST + 1)[1:]
    by_entropy = config.patcher == "entropy"
    return PatchingContract(
        patcher=config.patcher,
        threshold=config.threshold,
        entropy_model=entropy_model_hash(patcher_params(params)) if by_entropy else "",
        sampled_bytes=scores.size,
        histogram=tuple(counts.tolist()),
    )


def patcher_params(params: Params) -> Params:
    """The entropy model's own parameters out of those of a BLT."""
    return {k.removeprefix(_PREFIX): v for k, v in params.items() if k.startswith(_PREFIX)}


def entropy_model_hash(params: Params) -> str:
    """SHA-256 of an entropy model: names, shapes and values in float32, in order."""
    digest = hashlib.sha256()
    for name, value in sorted(params.items()):
        digest.update(f"{name} {value.shape} ".encode())
        digest.update(np.ascontiguousarray(np.asarray(value).astype("<f4")).data)
    return digest.hexdigest()


def outside(contract: PatchingContract, found: PatchingContract) -> str | None:
    """What is wrong, in a few words, where `found` is not what `contract` promises."""
    ratio = found.mean_length / contract.mean_length
    if 1 / BAND <= ratio <= BAND:
        return None
    cut = f", threshold={found.threshold:.6g}" if found.patcher in ("entropy", "histogram") else ""
    return (
        f"mean patch length {found.mean_length:.2f} bytes where {contract.mean_length:.2f} are "
        f"expected (patcher={found.patcher}{cut}); expect worse predictions on this data"
    )


# ---- calibration ------------------------------------------------------------------------------


def calibrate(
    recipe: Recipe,
    params: Params,
    windows: Windows,
    bytes_per_patch: float,
    limit: int | None,
) -> Recipe:
    """`recipe` with the threshold at which patches have `bytes_per_patch` bytes on average.

    As `calibrate_and_count`.
    """
    return calibrate_and_count(recipe, params, windows, bytes_per_patch, limit)[0]


def calibrate_and_count(
    recipe: Recipe,
    params: Params,
    windows: Windows,
    bytes_per_patch: float,
    limit: int | None,
) -> tuple[Recipe, Int[np.ndarray, " windows"]]:
    """The calibrated recipe, and how many patches each window has (`patch_counts`).

    Of an entropy model's run only the contract changes, which a BLT run then takes over; of a BLT
    run the threshold of its model as well. Raises `ValueError` for a model without a threshold and
    for a mean that the data cannot give within `TOLERANCE`.
    """
    config, params = as_blt(recipe, params)
    require(bytes_per_patch >= 1, f"bytes_per_patch={bytes_per_patch}: must be at least 1")
    if config.patcher == "histogram":
        threshold = _histogram_threshold(config, windows, bytes_per_patch, limit)
        config = replace(config, threshold=threshold)
        scores = boundary_scores(config, params, windows, limit)
    else:
        scores = boundary_scores(config, params, windows, limit)
        config = replace(config, threshold=_threshold(scores, bytes_per_patch))
    contract = _contract(config, params, scores)
    error = abs(contract.mean_length / bytes_per_patch - 1)
    require(
        error <= TOLERANCE,
        f"bytes_per_patch={bytes_per_patch}: the nearest that these data allow is "
        f"{contract.mean_length:.3f}; give that, or more and other data",
    )
    counts = patch_counts(scores, config.threshold, recipe.data.sequence_length)
    if recipe.model.has_patching_contract:
        config = replace(config, bytes_per_patch=round(contract.mean_length, 3))
        return replace(recipe, model=config, patching=contract), counts
    return replace(recipe, patching=contract), counts


def patch_counts(
    scores: Float32[np.ndarray, " bytes"], threshold: float, length: int
) -> Int[np.ndarray, " windows"]:
    """The patches of each window of `length` bytes that a budget needs room for, by their scores.

    Those that end before the byte after the window, which may start another.
    """
    whole = scores[: scores.size // length * length].reshape(-1, length)
    return np.maximum((whole > threshold).sum(axis=1), min(2, length))


def room_for(counts: Int[np.ndarray, " windows"], overflow: float = OVERFLOW) -> int:
    """The smallest budget that at most the share `overflow` of windows exceeds.

    A multiple of 8, as matrix products like it.
    """
    allowed = int(overflow * len(counts))
    return -(-int(np.sort(counts)[len(counts) - 1 - allowed]) // 8) * 8


def measure_again(
    calibrated: Recipe, params: Params, windows: Windows, limit: int | None
) -> PatchingContract:
    """`measure` on other data, at the threshold that `calibrate` found."""
    model, params = as_blt(calibrated, params)
    assert calibrated.patching is not None
    model = replace(model, threshold=calibrated.patching.threshold)
    return measure(model, params, windows, limit)


def as_blt(recipe: Recipe, params: Params) -> tuple[BLTConfig, Params]:
    """The patcher of a run: an entropy model alone stands for that of a BLT to come."""
    prefix = recipe.model.patcher_prefix
    return recipe.model.patcher_config(), {prefix + name: v for name, v in params.items()}


def _threshold(scores: np.ndarray, bytes_per_patch: float) -> float:
    """Between the two scores of which the first starts a patch and the second does not."""
    rank = scores.size - min(max(1, round(scores.size / bytes_per_patch)), scores.size)
    ranked = np.partition(scores, (max(0, rank - 1), rank))
    above, below = ranked[rank], ranked[rank - 1] if rank else np.float32(-np.inf)
    finite = scores[np.isfinite(scores)]
    require(finite.size > 0, "data: too short to cut patches from; give more")
    if np.isinf(above) and above > 0:  # fewer patches than start in any case
        return float(finite.max())
    if np.isinf(below):  # all that may start
        return float(np.nextafter(finite.min(), np.float32(-np.inf)))
    middle = np.float32((float(above) + float(below)) / 2)
    return float(middle if middle < above else below)


def _histogram_threshold(
    config: BLTConfig, windows: Windows, bytes_per_patch: float, limit: int | None
) -> float:
    """The threshold in bits whose mean is nearest, by halving: a higher one cuts no more often."""
    batches = []
    for ids in (batch.ids for batch in evaluation_batches(windows, _ROWS, limit)):
        segment_starts = segment_starts_of(jnp.asarray(ids), config)
        shifted = shift_right(jnp.asarray(ids), config.vocab.bos_id, segment_starts)
        found = patching.histogram_entropy(
            patching.recent_bytes(shifted, config.vocab, patch_rules.WINDOWS[-1], segment_starts)
        )
        held = patching.held_back(config, shifted, segment_starts)
        batches.append(
            (found, held, _counted(config, shifted, ids, segment_starts), segment_starts)
        )

    @jax.jit
    def count(
        found: Any, held: Any, counted: Any, segment_starts: Any, cut: Any
    ) -> tuple[Any, Any]:
        after = (patching.sums_since_start(found, held, cut, segment_starts) > cut) & ~held
        after = after | (positions_in(found.shape[1], segment_starts) == 0)
        starts = patching.shifted(
            after.astype(jnp.int32), 1, 1, segment_starts
        )  # 1 where a text begins
        return counted.sum(), (starts * counted).sum()

    def mean_length(cut: int) -> float:
        total = np.sum([jax.device_get(count(*batch, cut)) for batch in batches], axis=0)
        return float(total[0] / total[1])

    low, high = 0, int(HISTOGRAM_LIMIT * patch_rules.BIT)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if mean_length(middle) <= bytes_per_patch else (low, middle)
    best = min((low, high), key=lambda cut: abs(mean_length(cut) - bytes_per_patch))
    return best / patch_rules.BIT


# ---- the entropy model of a new run -------------------------------------------------------------


def adopt(recipe: Recipe, run_dir: Path) -> Recipe:
    """`recipe` with what its entropy model decides: sizes, threshold, mean length, contract.

    A run that exists keeps its own; a new one takes them from the run `train.entropy_from`.
    Raises `ValueError` for a BLT by entropy without such a source, since an untrained entropy
    model finds no boundaries, for a source that was not calibrated, and for a field of the recipe
    that was overridden with something else.
    """
    model: Any = recipe.model
    named = recipe.train.entropy_from
    if recipe.train.init_from:  # the whole model comes from there
        return recipe
    if not model.needs_entropy_model:
        require(
            not named,
            f"train.entropy_from={named}: this model has no use for an entropy model; leave it out",
        )
        return recipe
    if (saved := runs.saved_recipe(run_dir)) is not None:
        if type(saved.model) is not type(model):
            return recipe  # another run's folder, and `prepare_run_dir` says so
        source, theirs = saved, saved.model
        origin = saved.train.entropy_from
        same = not named or Path(named) == Path(origin)
        hint = "leave it out or choose another run_dir"
        require(same, f"train.entropy_from={named}: {run_dir} took {origin}; {hint}")
        recipe = replace(recipe, train=replace(recipe.train, entropy_from=origin))
    else:
        require(
            bool(named),
            "train.entropy_from: patcher='entropy' needs a trained entropy model; `bytelm train "
            "entropy_tiny`, `bytelm calibrate` it and give its run folder as --entropy-from, or "
            "take --patcher space",
        )
        source = runs.load_recipe(Path(named))
        theirs = _calibrated(source, named)
    known = _defaults(recipe).with_resets(model.entropy.reset_on)  # not left to the source
    for field in _FROM_SOURCE:
        asked, given = getattr(model, field), getattr(theirs, field)
        free = asked in (given, getattr(known, field))
        where = named or str(run_dir)
        require(free, f"model.{field}={asked}: {where} says {given}; leave it out or calibrate")
    changed = {field: getattr(theirs, field) for field in _FROM_SOURCE}
    return replace(recipe, model=replace(model, **changed), patching=source.patching)


def _defaults(recipe: Recipe) -> Any:
    from bytelm import recipes

    return recipes.get(recipe.name).model if recipe.name in recipes.names() else recipe.model


def _calibrated(source: Recipe, named: str) -> BLTConfig:
    """What a calibrated run says about patches, as the configuration of a BLT."""
    hint = "name a calibrated run of an entropy model, such as entropy_tiny"
    try:
        model, _ = as_blt(source, {})
        require(model.patcher == "entropy", f"patcher={model.patcher!r}")
    except ValueError as error:
        what = f"train.entropy_from={named}: holds no entropy model ({error})"
        raise ValueError(f"{what}; {hint}") from None
    contract = source.patching
    if contract is None:
        command = f"bytelm calibrate {named} --data PATH --bytes-per-patch 4.5"
        raise ValueError(f"train.entropy_from={named}: has no threshold yet; run `{command}`")
    mean = round(contract.mean_length, 3)
    return replace(model, threshold=contract.threshold, bytes_per_patch=mean)


def load_entropy_model(recipe: Recipe) -> Params:
    """The parameters, by their names in BLT and in float32, of the run `train.entropy_from`.

    Raises `ValueError` when they are not those that were calibrated.
    """
    named = recipe.train.entropy_from
    source, params, _ = checkpoint.load_run(Path(named))
    _, params = as_blt(source, params)
    own = patcher_params(params)
    expected = recipe.patching.entropy_model if recipe.patching else ""
    require(
        entropy_model_hash(own) == expected,
        f"train.entropy_from={named}: was trained on since it was calibrated; calibrate it again",
    )
    return {_PREFIX + name: value.astype(jnp.float32) for name, value in own.items()}
