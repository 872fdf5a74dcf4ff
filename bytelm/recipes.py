"""Named runs as functions. `bytelm train NAME` looks up a recipe here; any field can be overridden.

Each docstring says what the recipe is and gives the command; measured figures are in
docs/measured.md.
"""

import re
from dataclasses import replace
from difflib import get_close_matches
from typing import NamedTuple

from bytelm.config import (
    AdamWConfig,
    BLTConfig,
    DataConfig,
    EntropyConfig,
    LFByteConfig,
    MegabyteConfig,
    Recipe,
    TrainConfig,
    change_optimizer,
)

_RECIPE = {"return": Recipe}
"""The annotations by which `names` distinguishes recipes from other functions."""

_TINY_DATA = DataConfig(sequence_length=256)
_TINY_OPTIMIZER = AdamWConfig(learning_rate=3e-3, warmup_steps=40)
_TINY_TRAIN = TrainConfig(steps=600, batch_size=16, eval_every=200, checkpoint_every=200)

_ENTROPY_TINY = EntropyConfig(dim=96, layers=2, heads=4, hidden_dim=256, window=128)

_TINY_INIT = 0.05
"""Deviation of the initial weights of narrow MEGABYTEs, which have no norm after the last layer.

0.02, made for widths of a thousand, is so small for widths of a hundred that each of the first
steps changes an embedding by a tenth: at any batch from 8 to 32 they overshot to 55 to 120 bits per
byte on English around step 25.
"""

_LARGE_DATA = DataConfig(sequence_length=2048)
_LARGE_OPTIMIZER = AdamWConfig(learning_rate=1e-3, warmup_steps=500)
_LARGE_TRAIN = TrainConfig(
    steps=20_000, batch_size=32, eval_every=1000, checkpoint_every=1000, eval_windows=512
)


_BYTROPIX = BLTConfig(
    patcher="histogram",
    threshold=9.25,  # six bytes per patch in Python source; English needs 11.8: `bytelm calibrate`
    bytes_per_patch=6.0,
    ngram_sizes=(3, 4, 5),
    ngram_rows=30_000,
    ngram_combine="mean",
    patch_queries=1,
    local_dim=256,
    encoder_heads=8,
    encoder_hidden_dim=1024,
    decoder_layers=1,
    decoder_heads=8,
    decoder_hidden_dim=1024,
    global_dim=256,
    global_layers=4,
    global_heads=8,
    global_hidden_dim=1024,
    feedforward="spline",
    entropy_attention=True,
    positions="sinusoidal",
    dropout=0.1,
)


_MEGABYTE_400M = MegabyteConfig(
    patch_size=8,
    global_dim=192,
    local_dim=768,
    global_layers=14,
    global_heads=12,
    local_layers=12,
    local_heads=6,
)

_LATENT_400M = {
    "local_dim": 768,
    "encoder_heads": 12,
    "encoder_hidden_dim": 2048,
    "decoder_layers": 6,
    "decoder_heads": 12,
    "decoder_hidden_dim": 2048,
    "global_dim": 1536,
    "global_layers": 12,
    "global_heads": 12,
    "global_hidden_dim": 4096,
}
"""Sizes of `blt_400m`, and of `bytropix_400m` but for the hidden widths, whose layers have no gate.
"""


def megabyte_tiny() -> Recipe:
    """MEGABYTE that learns on two CPU cores within minutes: `bytelm train megabyte_tiny`."""
    model = MegabyteConfig(
        patch_size=4,
        global_dim=64,
        local_dim=96,
        max_length=1024,
        global_layers=3,
        global_heads=4,
        local_layers=2,
        local_heads=4,
        init_std=_TINY_INIT,
    )
    return Recipe(
        name="megabyte_tiny",
        model=model,
        data=_TINY_DATA,
        optimizer=_TINY_OPTIMIZER,
        train=_TINY_TRAIN,
    )


def transformer_tiny() -> Recipe:
    """The baseline for tiny models, a plain byte transformer: patch size 1, no local stack."""
    model = MegabyteConfig(
        patch_size=1,
        global_dim=176,
        local_dim=176,
        max_length=1024,
        global_layers=6,
        global_heads=4,
        local_layers=0,
        local_heads=1,
        init_std=_TINY_INIT,
    )
    return replace(megabyte_tiny(), name="transformer_tiny", model=model)


def megabyte_132m() -> Recipe:
    """MEGABYTE with 132,278,528 parameters, for one or more GPUs: `bytelm train megabyte_132m`."""
    return Recipe(
        name="megabyte_132m",
        model=MegabyteConfig(),
        data=_LARGE_DATA,
        optimizer=_LARGE_OPTIMIZER,
        train=_LARGE_TRAIN,
    )


def megabyte_in_action_132m() -> Recipe:
    """The "in action" variant with 131,918,336 parameters: ALiBi, local input across patches."""
    model = MegabyteConfig(variant="in_action")
    return replace(megabyte_132m(), name="megabyte_in_action_132m", model=model)


def transformer_132m() -> Recipe:
    """The baseline for large models: a plain byte transformer with 132,232,704 parameters."""
    model = MegabyteConfig(
        patch_size=1,
        global_dim=1024,
        local_dim=1024,
        global_layers=12,
        global_heads=16,
        local_layers=0,
        local_heads=1,
    )
    return replace(megabyte_132m(), name="transformer_132m", model=model)


def megabyte_400m() -> Recipe:
    """MEGABYTE with 410,647,808 parameters, 73,221,120 in local layers, for GPUs.

    `bytelm train megabyte_400m`. The recipes of 400M differ in size by less than 1 % outside of
    n-gram tables.
    """
    return replace(megabyte_132m(), name="megabyte_400m", model=_MEGABYTE_400M)


def megabyte_400m_p4() -> Recipe:
    """`megabyte_400m` with patches of 4 bytes: 411,286,784 parameters, twice the global steps."""
    model = replace(_MEGABYTE_400M, patch_size=4, global_dim=384)
    return replace(megabyte_132m(), name="megabyte_400m_p4", model=model)


def transformer_400m() -> Recipe:
    """The baseline of the 400M models: a plain byte transformer with 407,584,512 parameters."""
    model = MegabyteConfig(
        patch_size=1,
        global_dim=1280,
        local_dim=1280,
        global_layers=24,
        global_heads=10,
        local_layers=0,
        local_heads=1,
    )
    return replace(megabyte_132m(), name="transformer_400m", model=model)


def entropy_tiny() -> Recipe:
    """The entropy model of `blt_tiny`: `bytelm train entropy_tiny`, then `bytelm calibrate`."""
    train = replace(_TINY_TRAIN, steps=300, eval_every=150, checkpoint_every=150)
    return replace(megabyte_tiny(), name="entropy_tiny", model=_ENTROPY_TINY, train=train)


def entropy_100m() -> Recipe:
    """The entropy model of the public weights, 99,512,064 parameters: `bytelm train entropy_100m`.

    `--dim 512 --layers 4 --heads 8 --hidden-dim 1408` turns it into that of `blt_767m`.
    """
    return replace(megabyte_132m(), name="entropy_100m", model=EntropyConfig())


def blt_tiny() -> Recipe:
    """BLT for two CPU cores: `bytelm train blt_tiny --entropy-from runs/entropy_tiny`.

    271,584 of its parameters belong to the entropy model.
    """
    model = BLTConfig(
        entropy=_ENTROPY_TINY,
        ngram_rows=2003,
        local_dim=64,
        local_window=128,
        encoder_heads=4,
        encoder_hidden_dim=176,
        decoder_layers=3,
        decoder_heads=4,
        decoder_hidden_dim=176,
        global_dim=192,
        global_layers=3,
        global_heads=4,
        global_hidden_dim=512,
    )
    return replace(megabyte_tiny(), name="blt_tiny", model=model)


def blt_132m() -> Recipe:
    """BLT with 131,732,352 parameters, 62,208,000 of them in n-gram tables; splits after words.

    `bytelm train blt_132m`. Words in English prose have 5.4 bytes, including the separator.
    """
    model = BLTConfig(
        patcher="space",
        bytes_per_patch=5.4,
        ngram_rows=27_000,
        local_dim=384,
        encoder_heads=6,
        encoder_hidden_dim=1024,
        decoder_layers=4,
        decoder_heads=6,
        decoder_hidden_dim=1024,
        global_dim=768,
        global_layers=8,
        global_heads=12,
        global_hidden_dim=2048,
    )
    return replace(megabyte_132m(), name="blt_132m", model=model)


def blt_400m() -> Recipe:
    """BLT with 640,205,568 parameters, 230,409,216 of them in n-gram tables; splits after words.

    `bytelm train blt_400m`. The other 409,796,352 are as many as in the other recipes of 400M.
    """
    model = replace(blt_132m().model, ngram_rows=50_002, **_LATENT_400M)
    return replace(megabyte_132m(), name="blt_400m", model=model)


def blt_767m() -> Recipe:
    """BLT with 766,579,968 parameters, 230,409,216 of them in n-gram tables, for one or more GPUs.

    `bytelm train blt_767m --entropy-from DIR`, where DIR is a calibrated run of `entropy_100m` or
    smaller.
    """
    entropy = EntropyConfig(dim=512, layers=4, heads=8, hidden_dim=1408)
    model = BLTConfig(
        entropy=entropy,
        ngram_rows=50_002,
        local_dim=768,
        encoder_heads=12,
        encoder_hidden_dim=2048,
        decoder_layers=6,
        decoder_heads=12,
        decoder_hidden_dim=2048,
        global_dim=1536,
        global_layers=16,
        global_heads=16,
        global_hidden_dim=4096,
    )
    return replace(megabyte_132m(), name="blt_767m", model=model)


def blt_1b() -> Recipe:
    """BLT in the shape of the public 1B weights, 4,633,127,680 parameters, most of them tables."""
    return replace(megabyte_132m(), name="blt_1b", model=BLTConfig())


def bytropix_tiny() -> Recipe:
    """Bytropix for two CPU cores: `bytelm train bytropix_tiny`.

    Patches by the entropy of byte histograms, six bytes on average, so it needs no entropy model.
    """
    model = replace(
        _BYTROPIX,
        dropout=0.0,
        patch_queries=2,
        ngram_rows=2003,
        local_dim=64,
        local_window=128,
        encoder_heads=4,
        encoder_hidden_dim=256,
        decoder_layers=3,
        decoder_heads=4,
        decoder_hidden_dim=256,
        global_dim=192,
        global_layers=3,
        global_heads=4,
        global_hidden_dim=768,
    )
    return replace(megabyte_tiny(), name="bytropix_tiny", model=model)


def bytropix() -> Recipe:
    """Bytropix in its original sizes, 28,625,216 parameters: width 256, 4 layers, 8 heads.

    `bytelm train bytropix`. 23,040,000 of the parameters are n-gram tables.
    """
    return replace(megabyte_132m(), name="bytropix", model=_BYTROPIX)


def bytropix_400m() -> Recipe:
    """Bytropix with 480,059,424 parameters, 69,120,000 of them in n-gram tables, without dropout.

    `bytelm train bytropix_400m`. The other 410,939,424 are as many as in the other recipes of 400M.
    """
    hidden = {"encoder_hidden_dim": 3072, "decoder_hidden_dim": 3072, "global_hidden_dim": 6144}
    sizes = _LATENT_400M | hidden | {"patch_queries": 2}
    return replace(
        megabyte_132m(), name="bytropix_400m", model=replace(_BYTROPIX, dropout=0.0, **sizes)
    )


def lfbyte_tiny() -> Recipe:
    """LFByteTransformer that learns on two CPU cores within minutes: `bytelm train lfbyte_tiny`."""
    model = LFByteConfig(
        embed_dim=128, num_layers=4, adapt_dim=64, rank=8, kernel_length=64, dropout=0.0
    )
    return replace(megabyte_tiny(), name="lfbyte_tiny", model=model)


def lfbyte() -> Recipe:
    """LFByteTransformer in its usual size, 32,534,184 parameters: `bytelm train lfbyte`."""
    return Recipe(
        name="lfbyte",
        model=LFByteConfig(),
        data=DataConfig(sequence_length=256),
        optimizer=AdamWConfig(learning_rate=3e-4, warmup_steps=500),
        train=replace(_LARGE_TRAIN, accumulation_steps=4),
    )


def lfbyte_130m() -> Recipe:
    """LFByteTransformer with 48 experts, 2 of them active: 133,826,056 parameters, for GPUs."""
    model = LFByteConfig(num_experts=48, dropout=0.0)
    return replace(megabyte_132m(), name="lfbyte_130m", model=model)


def lfbyte_400m() -> Recipe:
    """LFByteTransformer with 28 experts, 2 of them active: 410,619,264 parameters, for GPUs."""
    model = LFByteConfig(embed_dim=1024, num_layers=10, num_experts=28, dropout=0.0)
    return replace(megabyte_132m(), name="lfbyte_400m", model=model)


_RATES = {
    "sgd": {"blt_tiny": 300, "bytropix_tiny": 300},
    "q_learning_sgd": {"blt_tiny": 300, "lfbyte_tiny": 300},
    "lion": dict.fromkeys(
        ("transformer_tiny", "entropy_tiny", "blt_tiny", "bytropix_tiny", "lfbyte_tiny"), 0.3
    ),
    "muon": dict.fromkeys(
        (
            "megabyte_tiny",
            "transformer_tiny",
            "entropy_tiny",
            "blt_tiny",
            "bytropix_tiny",
            "lfbyte_tiny",
        ),
        3,
    ),
}
"""Learning rates by optimizer and recipe, as multiples of the recipe's own for AdamW.

Of three that were measured, each three times the one before, the best where that is not the usual
one of the optimizer: docs/optimizers.md.
"""


def with_optimizer(recipe: Recipe, name: str) -> Recipe:
    """A recipe of this file under the optimizer `name`, at the learning rate measured for it.

    The weight decay is divided by what the rate is multiplied by. Raises `ValueError` as
    `change_optimizer` does.
    """
    factor = _RATES.get(name, {}).get(recipe.name)
    measured = None if factor is None else 1 / factor
    return replace(recipe, optimizer=change_optimizer(recipe.optimizer, name, measured))


def names() -> list[str]:
    """The names of all recipes, in the order of this file."""
    return [n for n, f in globals().items() if getattr(f, "__annotations__", 0) == _RECIPE]


def get(name: str) -> Recipe:
    """The recipe called `name`; hyphens count as underscores. Raises `ValueError` if unknown."""
    known, wanted = names(), name.replace("-", "_")
    if wanted not in known:
        near = get_close_matches(wanted, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(known)}"
        raise ValueError(f"recipe={name}: unknown; {hint}")
    return globals()[wanted]()


class Summary(NamedTuple):
    """A recipe in a line: parameters, and bytes of these and AdamW's state in float32."""

    name: str
    purpose: str
    architecture: str
    parameters: int

    @property
    def state_bytes(self) -> int:
        """Parameters and two moments, four bytes each."""
        return 12 * self.parameters


def summaries() -> list[Summary]:
    """Every recipe in a line, in the order of this file."""
    found = []
    for name in names():
        model = get(name).model
        text = " ".join((globals()[name].__doc__ or "").replace("`", "").split())
        purpose = re.split(r"[:;.] |\.$", text, maxsplit=1)[0]
        found.append(Summary(name, purpose, model.architecture, model.parameter_count()))
    return found
