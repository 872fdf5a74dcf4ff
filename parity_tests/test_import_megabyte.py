"""Checkpoints of the PyTorch MEGABYTE of shjwudp/megabyte load and give the same logits.

The model below is written from the published architecture alone, with that code's module
structure and so its state-dict names. It shares nothing with the two packages.
"""

from __future__ import annotations

import functools
import math
import os
import pickle
import re
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from bytelm.config import ByteVocab, MegabyteConfig
from bytelm.tolerances import LOGITS
from bytelm_jax.cli import main as cli
from bytelm_jax.interop import convert, formats
from bytelm_jax.interop import megabyte as convert_megabyte
from bytelm_jax.models import abstract_params, define_model
from bytelm_jax.training import checkpoint, starting
from bytelm_torch import from_pretrained
from parity_tests.starts import begun_from
from parity_tests.wrong_states import (
    complex_numbers,
    eight_bits,
    gap,
    half_prefixed,
    integer,
    missing,
    no_embedding,
    not_a_matrix,
    not_a_tensor,
    numbered,
    odd_rows,
    one_layer_differs,
    other_head_width,
    pretending,
    sparse,
    spoiled,
    torn_width,
    unknown,
)

PAD = 257
traced = functools.cache(abstract_params)


@pytest.fixture(autouse=True)
def traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes are the same every time, and tracing a model costs more than all the rest here."""
    monkeypatch.setattr(convert, "abstract_params", traced)


# ---- the original, independently ------------------------------------------------------------


class OriginalAttention(nn.Module):
    def __init__(self, dim: int, heads: int, alibi: bool) -> None:
        super().__init__()
        self.heads, self.head, self.alibi = heads, dim // heads, alibi
        self.norm = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, heads * self.head, bias=False)
        self.to_kv = nn.Linear(dim, 2 * self.head, bias=False)
        self.to_out = nn.Linear(heads * self.head, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, _ = x.shape
        x = self.norm(x)
        q = self.to_q(x).view(rows, length, self.heads, self.head).transpose(1, 2)
        k, v = self.to_kv(x).split(self.head, dim=-1)
        scores = torch.matmul(q, k.unsqueeze(1).transpose(2, 3)) / self.head**0.5
        if self.alibi:
            for i in range(self.heads):
                slope = torch.tensor(2.0 ** (-8.0 * (i + 1) / self.heads), dtype=torch.float32)
                places = torch.arange(length, dtype=torch.float32)
                scores[:, i] += (slope * places).to(scores.dtype)
        future = torch.triu(torch.ones(length, length, dtype=torch.bool), diagonal=1)
        weights = scores.masked_fill(future, float("-inf")).softmax(dim=-1)
        mixed = torch.matmul(weights, v.unsqueeze(1))
        return self.to_out(mixed.transpose(1, 2).reshape(rows, length, -1))


class OriginalTransformer(nn.Module):
    def __init__(self, dim: int, layers: int, heads: int, alibi: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for _ in range(layers):
            hidden = 4 * dim
            steps = (nn.LayerNorm(dim), nn.Linear(dim, hidden), nn.GELU(), nn.Dropout(0.0))
            feed = nn.Sequential(*steps, nn.Linear(hidden, dim))
            self.layers.append(nn.ModuleList([OriginalAttention(dim, heads, alibi), feed]))

    def forward(self, x: Tensor) -> Tensor:
        for attention, feed in self.layers:  # pyright: ignore[reportGeneralTypeIssues]
            x = attention(x) + x
            x = feed(x) + x
        return x


class SplitPatches(nn.Module):
    def __init__(self, patch: int) -> None:
        super().__init__()
        self.patch = patch

    def forward(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.patch, x.shape[2] // self.patch)


class OriginalMegabyte(nn.Module):
    def __init__(
        self,
        variant: str = "paper",
        V: int = 512,
        P: int = 8,
        D_G: int = 128,
        D_L: int = 256,
        T_MAX: int = 2048,
        g_nlayers: int = 12,
        g_nheads: int = 16,
        l_nlayers: int = 6,
        l_nheads: int = 4,
    ) -> None:
        super().__init__()
        self.P, self.alibi = P, variant == "in_action"
        if self.alibi:
            self.to_embed = nn.Embedding(V, D_G)
            self.to_l_embed = nn.Linear(D_G, D_L)
        else:
            self.g_embedder = nn.Embedding(V, D_G)
            self.g_pos_embedder = nn.Embedding(T_MAX, D_G)
            self.l_embedder = nn.Embedding(V, D_L)
        self.g_transformer = OriginalTransformer(P * D_G, g_nlayers, g_nheads, self.alibi)
        self.gl_linear = nn.Sequential(SplitPatches(P), nn.Linear(D_G, D_L))
        self.l_transformer = OriginalTransformer(D_L, l_nlayers, l_nheads, self.alibi)
        self.to_logits = nn.Linear(D_L, V)

    def forward(self, ids: Tensor) -> Tensor:
        rows, length = ids.shape
        count = length // self.P
        patch_of_pads = torch.full((rows, self.P), PAD)
        before = torch.cat([patch_of_pads, ids[:, : length - self.P]], dim=1)
        if self.alibi:
            wide = self.to_embed(before)
            shifted = torch.cat([patch_of_pads[:, :1], ids[:, :-1]], dim=1)
            narrow = self.to_l_embed(self.to_embed(shifted))
        else:
            wide = self.g_embedder(before) + self.g_pos_embedder(torch.arange(length))
            patches = ids.view(rows * count, self.P)
            pads = torch.full((rows * count, 1), PAD)
            narrow = self.l_embedder(torch.cat([pads, patches[:, :-1]], dim=1))
        context = self.gl_linear(self.g_transformer(wide.view(rows, count, -1)))
        local = narrow.reshape(rows * count, self.P, -1) + context.flatten(0, 1)
        return self.to_logits(self.l_transformer(local)).view(rows, length, -1)


SMALL: dict[str, Any] = {
    "V": 300,
    "P": 4,
    "D_G": 8,
    "D_L": 16,
    "T_MAX": 24,
    "g_nlayers": 2,
    "g_nheads": 4,
    "l_nlayers": 2,
    "l_nheads": 2,
}


def original(seed: int = 0, dtype: torch.dtype = torch.float64, **fields: Any) -> OriginalMegabyte:
    torch.manual_seed(seed)
    model = OriginalMegabyte(**{**SMALL, **fields}).to(dtype)
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.4)
    return model.eval()


def assert_same_logits(path: Path, model: OriginalMegabyte, length: int) -> MegabyteConfig:
    config, params = convert_megabyte.import_megabyte(path)
    ids = np.random.default_rng(1).integers(0, config.vocab.size, (3, length))
    bind, _ = define_model(config)
    ours = np.asarray(jax.jit(lambda p, i: bind(p)(i))(params, ids))
    with torch.no_grad():
        theirs = model(torch.from_numpy(ids)).numpy()
    assert ours.dtype == theirs.dtype == np.float64
    assert np.linalg.norm(ours - theirs) <= LOGITS["float64"] * np.linalg.norm(theirs)
    assert np.abs(ours - theirs).max() <= LOGITS["float64"] * np.abs(theirs).max()
    return config


def message(call: Callable[..., Any], *arguments: Any, **named: Any) -> str:
    """The one line of the `ValueError` that the call must raise."""
    with pytest.raises(ValueError) as caught:
        call(*arguments, **named)
    text = str(caught.value)
    assert text and "\n" not in text, text
    return text


# ---- the same model -------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["paper", "in_action"])
def test_logits_and_config(variant: str, x64: None, tmp_path: Path) -> None:
    model = original(variant=variant)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    config = assert_same_logits(tmp_path / "model.pt", model, 24)
    assert config == MegabyteConfig(
        variant=variant,  # pyright: ignore[reportArgumentType]
        vocab=ByteVocab(size=300, pad_id=257, bos_id=256, eos_id=258),
        patch_size=4,
        global_dim=8,
        local_dim=16,
        max_length=24 if variant == "paper" else MegabyteConfig.max_length,
        global_layers=2,
        global_heads=4,
        local_layers=2,
        local_heads=2,
    )


@pytest.mark.parametrize("variant", ["paper", "in_action"])
def test_as_many_local_heads_as_layers(variant: str, x64: None, tmp_path: Path) -> None:
    """The original's export to transformers builds so, and its heads need not divide the width."""
    model = original(variant=variant, l_nlayers=3, l_nheads=3, g_nlayers=1, g_nheads=5)
    assert model.l_transformer.layers[0][0].to_q.weight.shape == (15, 16)  # pyright: ignore
    state = {f"inner_model.{name}": value for name, value in model.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    config = assert_same_logits(tmp_path / "model.safetensors", model, 12)
    assert (config.local_heads, config.global_heads) == (3, 5)


def test_the_default_shape_with_six_local_heads() -> None:
    with torch.device("meta"):
        exported = OriginalMegabyte(l_nheads=6)
        plain = OriginalMegabyte()
        action = OriginalMegabyte("in_action")
    assert exported.l_transformer.layers[0][0].to_q.weight.shape == (252, 256)  # pyright: ignore
    for model, heads, count in (
        (exported, 6, 132_198_656),
        (plain, 4, 132_278_528),
        (action, 4, 131_918_336),
    ):
        shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        config = convert_megabyte.megabyte_config(shapes)
        variant = "in_action" if model is action else "paper"
        assert config == MegabyteConfig(variant=variant, local_heads=heads)
        assert config.parameter_count() == count
        assert sum(value.numel() for value in model.state_dict().values()) == count


def test_no_local_layers_and_other_special_ids(x64: None, tmp_path: Path) -> None:
    model = original(l_nlayers=0)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    assert assert_same_logits(tmp_path / "model.pt", model, 4).local_layers == 0
    config, _ = convert_megabyte.import_megabyte(tmp_path / "model.pt", pad_id=256, eos_id=299)
    assert config.vocab == ByteVocab(size=300, pad_id=256, bos_id=257, eos_id=299)
    text = message(convert_megabyte.import_megabyte, tmp_path / "model.pt", eos_id=300)
    assert "model.pt: vocab.eos_id=300: choose an id from 0 to 299" in text


# ---- the forms that a checkpoint comes in ---------------------------------------------------


def save_plain(state: dict[str, Tensor], folder: Path) -> Path:
    torch.save(state, folder / "model.pt")
    return folder / "model.pt"


def save_before_1_6(state: dict[str, Tensor], folder: Path) -> Path:
    torch.save(state, folder / "old.pth", _use_new_zipfile_serialization=False)
    return folder / "old.pth"


def save_wrapped(state: dict[str, Tensor], folder: Path) -> Path:
    moments = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]}
    torch.save({"model_state_dict": state, "optimizer": moments, "step": 3}, folder / "a.ckpt")
    return folder / "a.ckpt"


def save_parameters(state: dict[str, Tensor], folder: Path) -> Path:
    parameters = {f"inner_model.{name}": nn.Parameter(value) for name, value in state.items()}
    torch.save({"state_dict": parameters}, folder / "b.pt")
    return folder / "b.pt"


def save_transformers(state: dict[str, Tensor], folder: Path) -> Path:
    (folder / "config.json").write_text('{"model_type": "megabyte", "l_nheads": 999}')
    named = {f"inner_model.{name}": value for name, value in state.items()}
    torch.save(named, folder / "pytorch_model.bin")
    return folder


def save_safe(state: dict[str, Tensor], folder: Path) -> Path:
    save_file(state, folder / "weights.safetensors")
    return folder / "weights.safetensors"


def save_views(state: dict[str, Tensor], folder: Path) -> Path:
    views = {name: value.t().contiguous().t() for name, value in state.items() if value.ndim == 2}
    torch.save({**state, **views}, folder / "views.pt")
    return folder / "views.pt"


FORMS = (
    save_plain,
    save_before_1_6,
    save_wrapped,
    save_parameters,
    save_transformers,
    save_safe,
    save_views,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("save", FORMS)
def test_every_form_gives_every_bit(
    save: Callable[..., Path], dtype: torch.dtype, tmp_path: Path
) -> None:
    state = original(dtype=dtype).state_dict()
    config, params = formats.import_any(save(state, tmp_path), cast=lambda _, array: array)
    assert config.parameter_count() == sum(value.numel() for value in state.values())
    raw = sorted(value.contiguous().view(torch.uint8).numpy().tobytes() for value in state.values())
    assert sorted(array.tobytes() for array in convert.to_torch(params).values()) == raw
    query = params["local_transformer.layers.1.attention.to_q.kernel"]
    expected = state["l_transformer.layers.1.0.to_q.weight"]
    assert torch.equal(torch.from_numpy(np.array(query.astype(np.float32)).T), expected.float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_what_is_not_float32_becomes_it_and_opens(
    dtype: torch.dtype, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = original(dtype=torch.float64).to(dtype).state_dict()
    command = ["import", str(save_plain(state, tmp_path)), "--out", str(tmp_path / "run")]
    assert cli.main(command) == 0
    rounded = r"bytelm import: float64 was rounded to float32, .* at most [1-6]\.\de-08 \(in .*\)\n"
    error = capsys.readouterr().err
    assert re.fullmatch(rounded, error) if dtype is torch.float64 else not error
    recipe, params, _ = checkpoint.load_run(tmp_path / "run")  # as every command opens it
    begun = starting.load_start(begun_from(command[1], recipe.model))[1]  # without the import
    assert all((params[name] == value).all() for name, value in begun.items())
    assert {array.dtype.name for array in params.values()} == {"float32"}
    _, expected = convert_megabyte.import_megabyte(
        save_safe({name: value.float() for name, value in state.items()}, tmp_path)
    )
    assert all((params[name] == value).all() for name, value in expected.items())
    assert cli.main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    assert vars(from_pretrained(tmp_path / "out").config.vocab) == vars(recipe.model.vocab)


@pytest.mark.parametrize(
    ("dtype", "number", "why"),
    [
        (torch.bfloat16, math.nan, "NaN or infinity; take the weights of an earlier checkpoint"),
        (torch.float16, -math.inf, "NaN or infinity; take the weights of an earlier checkpoint"),
        (torch.float64, math.inf, "NaN or infinity; take the weights of an earlier checkpoint"),
        (torch.float64, 1e39, "1e+39, too large for float32"),
    ],
)
def test_what_float32_cannot_hold_makes_no_run(
    dtype: torch.dtype,
    number: float,
    why: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    state = original(dtype=dtype).state_dict()
    state["to_logits.weight"][2, 5] = number
    file = save_plain(state, tmp_path)
    assert cli.main(["import", str(file), "--out", str(tmp_path / "run")]) == 2
    expected = f"bytelm import: {file}: to_logits.weight: holds {why}\n"
    assert capsys.readouterr().err == expected
    assert not (tmp_path / "run").exists()


# ---- refused --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (missing, "l_transformer.layers.1.1.4.bias: missing; expected shape (16,)"),
        (unknown, "l_transformer.layers.1.0.rotary.freqs: unexpected; "),
        (gap, "g_transformer.layers.1.0.norm.bias: missing; "),
        (half_prefixed, "to_logits.bias: missing; "),
        (one_layer_differs, "g_transformer.layers.1.0.to_kv.weight: shape (8, 32); expected (16,"),
        (other_head_width, "to_kv.weight: head width 4; 3 heads on width 16 need 5"),
        (odd_rows, "to_kv.weight: 15 rows; expected twice a head width that divides to_q's 16"),
        (torn_width, "g_transformer.layers.0.0.to_q.weight: width 32; expected a multiple of 7"),
        (not_a_matrix, "gl_linear.1.weight: shape (16,); expected a matrix"),
        (no_embedding, "g_embedder.weight: missing; expected in a MEGABYTE state dict"),
        (integer, "to_logits.bias: dtype int64; expected float16, "),
        (eight_bits, "to_logits.bias: dtype float8_e4m3fn; expected float16, "),
        (complex_numbers, "to_logits.bias: dtype complex64; expected float16, "),
        (not_a_tensor, "to_logits.bias: list; expected a dense tensor stored in full"),
        (pretending, "to_logits.bias: Tensor; expected a dense tensor stored in full"),
        (sparse, "to_logits.bias: Tensor; expected a dense tensor stored in full"),
        (spoiled, "to_logits.bias: holds NaN or infinity; take the weights of an earlier "),
        (numbered, "7: the name of a state dict entry must be a string"),
    ],
)
def test_a_wrong_state_dict_is_named(
    damage: Callable[..., None], expected: str, tmp_path: Path
) -> None:
    state = dict(original(dtype=torch.float32).state_dict())
    damage(state)
    torch.save(state, tmp_path / "model.pt")
    text = message(formats.import_any, tmp_path / "model.pt")
    assert text.startswith(f"{tmp_path}/model.pt: ") and expected in text


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_a_pickle_with_code_is_refused_and_never_run(tmp_path: Path) -> None:
    fired, file = tmp_path / "fired", tmp_path / "bomb.pt"
    state = dict(original(dtype=torch.float32).state_dict())
    for form in ({"zip": True}, {"zip": False}):
        torch.save({**state, "x": Bomb(fired)}, file, _use_new_zipfile_serialization=form["zip"])
        assert "not a plain state dict of torch.save (" in message(formats.import_any, file)
    file.write_bytes(pickle.dumps(Bomb(fired)))
    assert "not a plain state dict of torch.save (" in message(formats.import_any, file)
    file.rename(tmp_path / "bomb.safetensors")
    assert "cannot be read (" in message(formats.import_any, tmp_path / "bomb.safetensors")
    assert not fired.exists()
    torch.save(original(), file)  # a whole model needs its class, which is code
    assert "not a plain state dict of torch.save (" in message(formats.import_any, file)


def test_files_that_are_damaged_or_something_else(tmp_path: Path) -> None:
    file = tmp_path / "model.pt"
    assert "cannot be read (No such file or directory)" in message(formats.import_any, file)
    whole = save_plain(original(dtype=torch.float32).state_dict(), tmp_path).read_bytes()
    for damaged in (b"", whole[:1000], whole[:-100], b"text\n" * 100):
        file.write_bytes(damaged)
        assert "not a plain state dict of torch.save (" in message(formats.import_any, file)
    torch.save([torch.zeros(3)], file)
    assert "holds a list; expected a state dict" in message(formats.import_any, file)
    torch.save({}, file)
    assert "g_embedder.weight: missing; " in message(formats.import_any, file)


def test_a_compressed_archive_is_not_read_as_numbers(tmp_path: Path) -> None:
    stored = save_plain(original(dtype=torch.float32).state_dict(), tmp_path)
    squeezed = tmp_path / "squeezed.pt"
    with zipfile.ZipFile(stored) as source, zipfile.ZipFile(squeezed, "w") as sink:
        for entry in source.namelist():
            sink.writestr(entry, source.read(entry), zipfile.ZIP_DEFLATED)
    assert "the archive is compressed" in message(formats.import_any, squeezed)


def test_without_torch_only_safetensors_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = original(dtype=torch.float32).state_dict()
    stored, safe = save_plain(state, tmp_path), save_safe(state, tmp_path)
    monkeypatch.setitem(sys.modules, "torch", None)
    text = message(formats.import_any, stored)
    assert "reading a file of torch.save needs PyTorch; install it" in text
    assert convert_megabyte.import_megabyte(safe)[0].local_layers == 2
