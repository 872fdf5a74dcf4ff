"""Another id map, the same model: bits per byte, greedy text, and the way back."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import bytelm_torch
from bytelm.config import BLTConfig, ByteVocab, EntropyConfig, LFByteConfig, MegabyteConfig
from bytelm.sampling import SamplerConfig
from bytelm.tolerances import LOGITS
from bytelm_jax.interop import convert
from bytelm_jax.interop.vocab import remap_vocab
from bytelm_jax.models import abstract_params, define_model
from bytelm_jax.training.loss import cross_entropy
from bytelm_torch.inference.generate import generate
from parity_tests.cases import quick

_SIZES: Any = {
    "patch_size": 4,
    "global_dim": 4,
    "local_dim": 8,
    "max_length": 32,
    "global_layers": 1,
}
_SIZES |= {"global_heads": 2, "local_layers": 1, "local_heads": 2}
_BLT: Any = {
    "local_dim": 4,
    "encoder_heads": 2,
    "encoder_hidden_dim": 2,
    "decoder_layers": 1,
}
_BLT |= {"decoder_heads": 2, "decoder_hidden_dim": 2, "global_dim": 8, "global_layers": 1}
_BLT |= {"global_heads": 2, "global_hidden_dim": 2, "patch_budget": 1.0}
_ENTROPY = EntropyConfig(dim=4, layers=1, heads=2, hidden_dim=2)
WIDE = ByteVocab(size=600, offset=3, pad_id=0, bos_id=1, eos_id=2)
HIGH = ByteVocab(size=512, offset=255, pad_id=7, bos_id=0, eos_id=511)
MODELS = {
    "megabyte": (MegabyteConfig(**_SIZES), [WIDE, HIGH]),
    "lfbyte": (
        LFByteConfig(embed_dim=8, num_layers=1, adapt_dim=4, rank=2, kernel_length=8),
        [WIDE, ByteVocab(size=259, offset=3, pad_id=0, bos_id=1, eos_id=2)],
    ),
    "blt": (
        BLTConfig(patcher="entropy", threshold=4.5, entropy=_ENTROPY, ngram_sizes=(), **_BLT),
        [ByteVocab(size=260, offset=0, pad_id=256, bos_id=257, eos_id=258)],
    ),
}
TEXT = ["Fünf alte Löwe".encode(), bytes(range(240, 256))]


def random_params(config):
    source = np.random.default_rng(0)
    leaves = abstract_params(config).items()
    return {k: jnp.asarray(0.5 * source.standard_normal(v.shape)) for k, v in leaves}


def row_nats(config, params):
    """Nats of each text, the second one cut short by padding."""
    vocab, bind = config.vocab, define_model(config)[0]
    ids = np.array([[byte + vocab.offset for byte in text] for text in TEXT], np.int32)
    ids[1, 11:] = vocab.pad_id

    @jax.jit
    def nats(params, ids):
        rows = bind(params)(ids)[:, None], ids[:, None]
        return [cross_entropy(*row, vocab.pad_id)[0] for row in zip(*rows, strict=True)]

    return nats(params, ids)


@pytest.mark.parametrize("name", quick(MODELS, "blt"))
def test_each_byte_costs_the_same_under_every_map(name, x64, tmp_path):
    config, vocabs = MODELS[name]
    params = random_params(config)
    before = np.array(row_nats(config, params))
    convert.export_model(config, params, tmp_path / "before")
    options = ([text[:8] for text in TEXT], 12, SamplerConfig(sampler="greedy"))
    texts = generate(bytelm_torch.from_pretrained(tmp_path / "before"), *options)
    assert all(len(text) == 12 for text in texts)
    for vocab in vocabs:
        remapped, moved = remap_vocab(config, params, vocab)
        assert remapped.vocab == vocab
        assert {k: v.shape for k, v in moved.items()} == {
            k: v.shape for k, v in abstract_params(remapped).items()
        }
        after = np.array(row_nats(remapped, moved))
        assert np.abs(after / before - 1).max() <= LOGITS["float64"]
        convert.export_model(remapped, moved, tmp_path / "after")
        twin = bytelm_torch.from_pretrained(tmp_path / "after")
        assert generate(twin, *options) == texts
        back, restored = remap_vocab(remapped, moved, config.vocab)
        assert back == config
        for key, value in restored.items():
            rows = config.vocab.size if key.startswith("to_logits") else value.shape[-1]
            same = np.asarray(value) == np.asarray(params[key])
            assert same[..., :rows].all(), key


def test_the_map_is_that_of_the_config_in_torch_too(x64, tmp_path):
    config, _ = MODELS["megabyte"]
    remapped, moved = remap_vocab(config, random_params(config), WIDE)
    convert.export_model(remapped, moved, tmp_path)
    twin = bytelm_torch.from_pretrained(tmp_path)
    assert vars(twin.config.vocab) == vars(WIDE)
    with torch.no_grad():
        shares = twin(torch.tensor([[ord("a") + 3, 2, 259]])).softmax(dim=-1)
    added = shares[..., 512:].sum()
    assert added == 0 and shares.sum() == pytest.approx(3)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_an_id_without_probability_stays_so_in_every_dtype(dtype):
    config, _ = MODELS["megabyte"]
    remapped, moved = remap_vocab(config, random_params(config), WIDE)
    narrow = {name: value.astype(dtype).astype("float32") for name, value in moved.items()}
    back, _ = remap_vocab(remapped, narrow, config.vocab)  # leaves out the ids that were added
    assert back == config


def test_what_has_no_equal_is_refused(x64):
    config = replace(MODELS["blt"][0], ngram_sizes=(3,), ngram_rows=5)
    shifted = ByteVocab(size=260, offset=0, pad_id=256, bos_id=257, eos_id=258)
    with pytest.raises(ValueError, match=r"ngram_sizes=\(3,\) hashes ids, .* keep its vocabulary"):
        remap_vocab(config, random_params(config), shifted)
    with pytest.raises(
        ValueError, match=r"size=600: the output layer has no bias .* keep size=260"
    ):
        remap_vocab(_ENTROPY, random_params(_ENTROPY), WIDE)
    config, _ = MODELS["megabyte"]
    with pytest.raises(ValueError, match=r"size=300: too small for the 512 ids .* at least 512"):
        remap_vocab(config, random_params(config), ByteVocab(size=300))
