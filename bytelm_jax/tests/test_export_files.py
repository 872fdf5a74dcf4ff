"""Export files that are damaged, cut short or foreign."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bytelm import export as file_format
from bytelm.config import MegabyteConfig
from bytelm.export import config_text, describe
from bytelm_jax.interop import convert
from bytelm_jax.tests.exports import (
    PAPER,
    any_bits,
    bits,
    export,
    message,
    traced_once,  # noqa: F401, a fixture for every test
)


def test_a_full_disk_is_one_line_and_keeps_the_old_export(tmp_path: Path) -> None:
    export(tmp_path)
    before = contents(tmp_path)
    arguments = (PAPER, any_bits(PAPER, np.float32, seed=1), tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        text = message(convert.export_model, *arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "cannot be written (File too large); choose another place or free space" in text
    assert contents(tmp_path) == before


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("previous", [True, False])
def test_an_export_that_fails_anywhere_changes_nothing(
    previous: bool, failure: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails at every call that touches the disk in turn, until the export comes through."""
    out = tmp_path / "out"
    out.mkdir()
    if previous:
        export(out)
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
    params = any_bits(PAPER, np.float32, seed=1)
    after = 5 if previous else 4  # syncs and renames until both files stand in their places
    for each in range(1, after + 1):
        calls, failing = 0, each
        with pytest.raises((ValueError, KeyboardInterrupt)) as caught:
            convert.export_model(PAPER, params, out)
        if isinstance(failure, OSError):
            assert "cannot be written (No space left on device)" in str(caught.value)
        assert contents(out) == before
    calls, failing = 0, 0
    convert.export_model(PAPER, params, out)
    assert calls == after + 1, "the last call syncs the folder"
    assert bits(convert.load_export(out)[1]) == bits(params)
    assert len(os.listdir(out)) == 2


def test_a_kill_at_any_moment_leaves_a_loadable_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What stands on the disk around every sync and rename is the old export or the new one."""
    export(tmp_path)
    old, new = (bits(any_bits(PAPER, np.float32, seed)) for seed in (0, 1))
    seen = []

    def watched(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> None:
            seen.append(bits(convert.load_export(tmp_path)[1]))
            real(*arguments)
            seen.append(bits(convert.load_export(tmp_path)[1]))

        return call

    for name in ("fsync", "replace"):
        monkeypatch.setattr(file_format.os, name, watched(getattr(os, name)))
    export(tmp_path, seed=1)
    kinds = [state == new for state in seen]
    assert all(state in (old, new) for state in seen)
    assert kinds == sorted(kinds) and not kinds[0] and kinds[-1]


@pytest.mark.parametrize("size", [0, 4, 8, 100, 9_000, -1])
def test_truncated_safetensors(size: int, tmp_path: Path) -> None:
    file = export(tmp_path) / "model.safetensors"
    os.truncate(file, size % file.stat().st_size)
    assert message(convert.load_export, tmp_path).startswith(f"{file}: cannot be read (")


def test_no_flipped_bit_of_the_header_goes_unnoticed(tmp_path: Path) -> None:
    file = export(tmp_path) / "model.safetensors"
    whole = file.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    expected, free = bits(convert.load_export(tmp_path)[1]), whole.index(b'},"')
    for place in (*range(9), *range(9, free, 5), *range(free, header, 11)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        file.write_bytes(damaged)
        try:
            actual = bits(convert.load_export(tmp_path)[1])
        except ValueError as error:
            assert "\n" not in str(error)
            assert str(error).startswith(str(file))
        else:  # the free text of the metadata says nothing about the tensors
            assert place < free and actual == expected


def test_a_missing_or_alien_model_file(tmp_path: Path) -> None:
    text = message(convert.load_export, tmp_path / "none")
    assert text.endswith(
        "config.json: cannot be read (No such file or directory); "
        "give a folder that `bytelm export` or `save_pretrained` wrote"
    )
    file = export(tmp_path) / "model.safetensors"
    file.write_bytes(b"\x80\x04 a pickle, say" * 20)
    assert message(convert.load_export, tmp_path).startswith(f"{file}: cannot be read (")
    file.unlink()
    assert message(convert.load_export, tmp_path).startswith(f"{file}: cannot be read (")
    file.mkdir()
    assert message(convert.load_export, tmp_path).startswith(f"{file}: cannot be read (")


def test_tensors_in_the_file_are_checked_like_those_in_memory(tmp_path: Path) -> None:
    export(tmp_path)
    config = MegabyteConfig(**{**vars(PAPER), "local_layers": 2})
    (tmp_path / "config.json").write_bytes(config_text(describe(config)))
    text = message(convert.load_export, tmp_path)
    assert "model.safetensors: local_transformer.layers.1.attention.norm.bias: missing; " in text


def changed(**fields: Any) -> str:
    return json.dumps({**json.loads(config_text(describe(PAPER))), **fields})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "Expecting value"),
        ('{"library": "bytelm"', "Expecting ',' delimiter"),
        ("[" * 200_000, "nested too deeply"),
        ("[]", "must hold a JSON object"),
        ("{}", "library=None: must be 'bytelm'"),
        (changed(library=["bytelm"]), "library=['bytelm']: must be 'bytelm'"),
        (changed(format_version=3), "format_version=3: this release reads 1; update bytelm"),
        (changed(surprise=1), "config.surprise: unknown field of MegabyteConfig"),
        (changed(vocab={"sise": 1}), "config.vocab.sise: unknown field of ByteVocab"),
        (changed(architecture="gpt"), "config.architecture='gpt': choose one of"),
        (changed(patch_size="2"), "config.patch_size='2': must be of type int"),
        (changed(patch_size=0), "patch_size=0: must be at least 1"),
        (changed(init_std=float("nan")), "init_std=nan: must be a finite value"),
        (changed(extra=3), "extra=3: must be an object"),
    ],
)
def test_a_config_that_is_damaged_or_foreign(text: str, expected: str, tmp_path: Path) -> None:
    file = export(tmp_path) / "config.json"
    file.write_text(text)
    error = message(convert.load_export, tmp_path)
    assert error.startswith(f"{file}: ") and expected in error
    file.write_bytes(b"\xff\xfe{}")
    assert message(convert.load_export, tmp_path).startswith(f"{file}: 'utf-8' codec can't decode")


def test_a_config_of_a_million_layers_is_refused_before_it_is_built(tmp_path: Path) -> None:
    file = export(tmp_path) / "config.json"
    file.write_text(changed(global_layers=10**6))
    assert "parameters, config.json describes " in message(convert.load_export, tmp_path)
