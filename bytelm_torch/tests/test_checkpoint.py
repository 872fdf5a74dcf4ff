"""Saving and loading in PyTorch: strict, atomic, and without JAX."""

from __future__ import annotations

import json
import os
import pickle
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import bytelm_torch
from bytelm import export as file_format
from bytelm.config import MegabyteConfig, to_dict
from bytelm_torch.models import build_model

CONFIG = MegabyteConfig(
    patch_size=2,
    global_dim=4,
    local_dim=8,
    max_length=8,
    global_layers=1,
    global_heads=3,
    local_layers=1,
    local_heads=2,
)
NORM, OTHER = "local_transformer.layers.0.attention.norm.weight", "to_logits.weight"


def random_model(seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """A model whose parameters are random bits that make finite numbers, subnormals among them."""
    model = build_model(CONFIG).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        raw = parameter.data.reshape(-1).view(torch.uint8)
        raw.copy_(torch.randint(0, 256, raw.shape, generator=generator, dtype=torch.uint8))
        parameter.data[~parameter.data.isfinite()] = 0.5
    return model


def bits(model: nn.Module) -> dict[str, tuple[torch.dtype, bytes]]:
    """What two models must share to be the same bit for bit."""
    return {name: (value.dtype, raw_bytes(value)) for name, value in model.state_dict().items()}


def raw_bytes(value: Tensor) -> bytes:
    return value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def message(call: Callable[..., Any], *arguments: Any, **named: Any) -> str:
    """The one line of the `ValueError` that the call must raise."""
    with pytest.raises(ValueError) as caught:
        call(*arguments, **named)
    text = str(caught.value)
    assert text and "\n" not in text, text
    return text


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


# ---- load -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_round_trip_keeps_every_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    model = random_model(dtype=dtype)
    bytelm_torch.save_pretrained(model, tmp_path / "new" / "out")
    loaded = bytelm_torch.from_pretrained(tmp_path / "new" / "out")
    assert bits(loaded) == bits(model)
    assert loaded.config == CONFIG
    assert not any(module.training for module in loaded.modules())
    assert all(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.parametrize(
    ("dtype", "norms"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_dtype_is_that_of_all_but_norms(
    dtype: torch.dtype, norms: torch.dtype, tmp_path: Path
) -> None:
    model = build_model(CONFIG)
    bytelm_torch.save_pretrained(model, tmp_path)
    state = bytelm_torch.from_pretrained(tmp_path, dtype=dtype).state_dict()
    for name, value in model.state_dict().items():
        wanted = norms if ".norm." in name else dtype
        assert state[name].dtype is wanted
        assert torch.equal(state[name], value.to(wanted))
    assert (state[NORM].dtype, state[OTHER].dtype) == (norms, dtype)


def test_device(tmp_path: Path) -> None:
    bytelm_torch.save_pretrained(random_model(), tmp_path)
    loaded = bytelm_torch.from_pretrained(tmp_path, device="meta")
    assert {value.device.type for value in loaded.state_dict().values()} == {"meta"}
    for bad in ("cuda:99", "nonsense"):
        text = message(bytelm_torch.from_pretrained, tmp_path, device=bad)
        assert text.startswith(f"device={bad}: cannot be used (")
    text = message(bytelm_torch.from_pretrained, tmp_path, dtype=torch.int32)
    assert text.startswith("dtype=torch.int32: choose one of torch.float16, ")


def test_loading_draws_no_random_number_and_keeps_no_hold_of_the_file(tmp_path: Path) -> None:
    model = random_model()
    bytelm_torch.save_pretrained(model, tmp_path)
    before = torch.get_rng_state()
    loaded = bytelm_torch.from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    file = tmp_path / "model.safetensors"
    with open(file, "r+b") as opened:  # in place: the file that was read, not a new one
        opened.write(b"\0" * file.stat().st_size)
    assert bits(loaded) == bits(model)


def rewrite(folder: Path, damage: Callable[[dict[str, Tensor]], object]) -> None:
    state = {name: value.clone() for name, value in load_file(folder / "model.safetensors").items()}
    damage(state)
    save_file(state, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda state: state.pop(OTHER), f"{OTHER}: missing; expected shape (512, 8), floating "),
        (lambda state: state.update(more=torch.zeros(2)), "more: unexpected; the configuration "),
        (
            lambda state: state.update({OTHER: state[OTHER].T.contiguous()}),
            f"{OTHER}: shape (8, 512); expected (512, 8)",
        ),
        (
            lambda state: state.update({NORM: torch.ones(8, dtype=torch.int32)}),
            f"{NORM}: dtype I32; expected float16, bfloat16, float32, float64",
        ),
    ],
)
def test_a_wrong_tensor_is_named(
    damage: Callable[[dict[str, Tensor]], object], expected: str, tmp_path: Path
) -> None:
    bytelm_torch.save_pretrained(random_model(), tmp_path)
    rewrite(tmp_path, damage)
    text = message(bytelm_torch.from_pretrained, tmp_path)
    assert text.startswith(f"{tmp_path}/model.safetensors: {expected}")


def config_with(**fields: Any) -> str:
    head = {"library": "bytelm", "format_version": 1}
    return json.dumps({**head, **to_dict(CONFIG), **fields})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "config.json: not JSON (Expecting property name"),
        ("[" * 200_000, "config.json: lists or objects are nested too deeply"),
        ("3", "config.json: must hold a JSON object"),
        (config_with(library="other"), "config.json: library='other': must be 'bytelm'"),
        (config_with(format_version=3), "config.json: format_version=3: this release reads 1; "),
        (config_with(surprise=1), "config.json: config.surprise: unknown field of MegabyteConfig"),
        (config_with(extra=[]), "config.json: extra=[]: must be an object"),
        (config_with(global_layers=10**6), "parameters, config.json describes "),
    ],
)
def test_a_config_that_is_damaged_or_foreign(text: str, expected: str, tmp_path: Path) -> None:
    bytelm_torch.save_pretrained(random_model(), tmp_path)
    (tmp_path / "config.json").write_text(text)
    assert expected in message(bytelm_torch.from_pretrained, tmp_path)


def test_files_that_are_missing_or_damaged(tmp_path: Path) -> None:
    assert "config.json: cannot be read (No such file" in message(
        bytelm_torch.from_pretrained, tmp_path / "none"
    )
    bytelm_torch.save_pretrained(random_model(), tmp_path)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for damaged in (b"", whole[:100], whole[: header + 9], whole[:-1], b"\xff" + whole[1:]):
        file.write_bytes(damaged)
        text = message(bytelm_torch.from_pretrained, tmp_path)
        assert text.startswith(f"{file}: cannot be read (")


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    bytelm_torch.save_pretrained(random_model(), tmp_path)
    fired = tmp_path / "fired"
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(fired)))
    (tmp_path / "model.safetensors").unlink()
    assert "model.safetensors: cannot be read (" in message(bytelm_torch.from_pretrained, tmp_path)
    (tmp_path / "pytorch_model.bin").rename(tmp_path / "model.safetensors")
    assert "model.safetensors: cannot be read (" in message(bytelm_torch.from_pretrained, tmp_path)
    assert not fired.exists()


def test_neither_import_nor_use_needs_jax(tmp_path: Path) -> None:
    bytelm_torch.save_pretrained(build_model(CONFIG), tmp_path)
    script = """if True:
        import sys
        import bytelm_torch
        assert not {name.partition(".")[0] for name in sys.modules} & {"jax", "flax", "bytelm_jax"}
        sys.modules["jax"] = None  # importing it from now on raises
        import torch
        model = bytelm_torch.from_pretrained(sys.argv[1])
        print(tuple(model(torch.tensor([[72, 105, 33]])).shape))
        bytelm_torch.save_pretrained(model, sys.argv[1])
    """
    command = [sys.executable, "-c", script, str(tmp_path)]
    root = Path(bytelm_torch.__file__).parent.parent
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("(1, 3, 512)\n", "")


# ---- save -----------------------------------------------------------------------------------


def test_what_is_written(tmp_path: Path) -> None:
    model = random_model()
    bytelm_torch.save_pretrained(model, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert {name: (v.dtype, raw_bytes(v)) for name, v in stored.items()} == bits(model)
    assert (tmp_path / "config.json").read_text() == json.dumps(
        {"library": "bytelm", "format_version": 1, **to_dict(CONFIG)}, indent=2
    ) + "\n"
    mask = os.umask(0)
    os.umask(mask)
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()}
    assert modes == dict.fromkeys(("model.safetensors", "config.json"), 0o666 & ~mask)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile imports such
def test_of_a_compiled_model_what_is_inside_is_saved(tmp_path: Path) -> None:
    model = random_model()
    bytelm_torch.save_pretrained(torch.compile(model), tmp_path)  # pyright: ignore[reportArgumentType]
    assert bits(bytelm_torch.from_pretrained(tmp_path)) == bits(model)


def test_only_a_bare_model_is_saved(tmp_path: Path) -> None:
    text = message(bytelm_torch.save_pretrained, nn.Linear(2, 2), tmp_path / "out")
    assert text == "model=Linear: must be a model of build_model, without wrappers"
    wrapped: Any = nn.Sequential(random_model())
    wrapped.config = CONFIG
    text = message(bytelm_torch.save_pretrained, wrapped, tmp_path / "out")
    assert text.startswith("global_embed.weight: missing; ")
    model = random_model()
    model.to_logits.bias = nn.Parameter(torch.zeros(512, dtype=torch.complex64))
    text = message(bytelm_torch.save_pretrained, model, tmp_path / "out")
    assert text == "to_logits.bias: dtype complex64; expected float16, bfloat16, float32, float64"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_what_is_not_finite_is_neither_saved_nor_loaded(value: float, tmp_path: Path) -> None:
    bytelm_torch.save_pretrained(random_model(), tmp_path)
    rewrite(tmp_path, lambda state: state[OTHER][511].fill_(value))
    error = f"{OTHER}: holds NaN or infinity; take the weights of an earlier checkpoint"
    text = message(bytelm_torch.from_pretrained, tmp_path)
    assert text == f"{tmp_path}/model.safetensors: {error}"
    model = random_model()
    model.to_logits.weight.data[511].fill_(value)
    assert message(bytelm_torch.save_pretrained, model, tmp_path / "out") == error
    assert not (tmp_path / "out").exists()


def test_tensors_that_are_not_contiguous(tmp_path: Path) -> None:
    model = random_model()
    expected = bits(model)
    model.to_logits.weight = nn.Parameter(model.to_logits.weight.data.T.contiguous().T)
    assert not model.to_logits.weight.is_contiguous()
    bytelm_torch.save_pretrained(model, tmp_path)
    assert bits(bytelm_torch.from_pretrained(tmp_path)) == expected


def test_the_path_must_be_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    text = message(bytelm_torch.save_pretrained, random_model(), tmp_path / "file")
    assert text.endswith("file: is a file; name a folder")
    text = message(bytelm_torch.save_pretrained, random_model(), tmp_path / "file" / "below")
    assert "below: cannot be written (Not a directory); " in text
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("previous", [True, False])
def test_saving_that_fails_anywhere_changes_nothing(
    previous: bool, failure: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails at every call that touches the disk in turn, until saving comes through."""
    out = tmp_path / "out"
    out.mkdir()
    if previous:
        bytelm_torch.save_pretrained(random_model(), out)
    before = contents(out)
    calls = failing = 0

    def breaking(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == failing:
                raise failure
            return real(*arguments)

        return call

    for name in ("fsync", "replace"):
        monkeypatch.setattr(file_format.os, name, breaking(getattr(os, name)))
    new = random_model(seed=1)
    after = 5 if previous else 4  # syncs and renames until both files stand in their places
    for each in range(1, after + 1):
        calls, failing = 0, each
        with pytest.raises((ValueError, KeyboardInterrupt)) as caught:
            bytelm_torch.save_pretrained(new, out)
        if isinstance(failure, OSError):
            assert "cannot be written (No space left on device)" in str(caught.value)
        assert contents(out) == before
    calls, failing = 0, 0
    bytelm_torch.save_pretrained(new, out)
    assert calls == after + 1, "the last call syncs the folder"
    assert bits(bytelm_torch.from_pretrained(out)) == bits(new)
    assert len(os.listdir(out)) == 2
