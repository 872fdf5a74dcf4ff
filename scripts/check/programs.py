"""Every architecture as a program of other runtimes, compared with the model; what has none.

    python scripts/check/programs.py [--only NAME …]

Needs the extras onnx, int8 and stablehlo. For each model with random weights: the program of
`torch.export` saved and loaded, its ONNX run by onnxruntime, and the StableHLO of `jax.export`
serialised and read back, each at several numbers of rows (and lengths, for those of torch), by the
relative error of the logits, at most 1e-5; and int8, by the mean KL divergence and the share of
positions whose most likely byte is the same. A refusal is printed with its reason. One line a model
and form; exit code 1 if a number is out of bounds, or if the refusals are not those expected.
"""

import argparse
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).parents[2]
BOUND, MOST_KL, LENGTH = 1e-5, 0.02, 30
ONE_LENGTH = {"torch-export", "onnx"}
REFUSED = {
    "in_action": ONE_LENGTH, "megabyte_newline": ONE_LENGTH, "bytropix": ONE_LENGTH,
    "lfbyte": {*ONE_LENGTH, "int8"}, "blt_entropy": {"torch-export"}, "blt_space": {"torch-export"},
}  # fmt: skip
"""Model → the forms that it has not."""


class Case(NamedTuple):
    """A model in both packages."""

    config: Any
    params: Any
    twin: Any
    place: Path

    def ids(self, rows: int, length: int) -> np.ndarray:
        from parity_tests.twins import random_ids

        return random_ids(self.config, rows, length)

    def sizes(self) -> list[tuple[int, int]]:
        patch = self.twin.round_length
        whole = LENGTH // patch * patch
        return [(1, whole - patch), (3, whole), (5, whole)]


def models() -> dict[str, Any]:
    from bytelm import recipes
    from parity_tests.tiny_models import CONFIGS

    megabyte, blt = CONFIGS["megabyte"], CONFIGS["blt"]
    return {
        "megabyte": megabyte,
        "in_action": replace(megabyte, variant="in_action"),
        "megabyte_newline": megabyte.with_resets("newline"),
        "entropy": CONFIGS["entropy"],
        "transformer": recipes.get("transformer_tiny").model,
        "lfbyte": CONFIGS["lfbyte"],
        "blt_entropy": replace(blt, patcher="entropy"),
        "blt_space": replace(blt, patcher="space"),
        "bytropix": recipes.get("bytropix_tiny").model,
    }


def error_of(found: np.ndarray, case: Case, ids: np.ndarray) -> float:
    import torch

    with torch.no_grad():
        expected = case.twin(torch.from_numpy(ids).long()).numpy()
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def torch_export(case: Case) -> str:
    import torch

    from bytelm_torch.interop.programs import save_program

    file = case.place / "model.pt2"
    save_program(case.twin, file, LENGTH)
    run = torch.export.load(file).module()
    return compared(case, lambda ids: run(torch.from_numpy(ids).long()).detach().numpy())


def onnx(case: Case) -> str:
    import onnxruntime  # pyright: ignore

    from bytelm_torch.interop.programs import export_onnx

    file = case.place / "model.onnx"
    export_onnx(case.twin, file, LENGTH)
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return compared(case, lambda ids: session.run(None, {"ids": ids.astype(np.int64)})[0])


def stablehlo(case: Case) -> str:
    import jax.export

    from bytelm_jax.interop.stablehlo import export_stablehlo

    file = case.place / "model.stablehlo"
    try:
        export_stablehlo(case.config, case.params, file, LENGTH)
        rows, told = (1, 3, 5), ""
    except ValueError as error:
        export_stablehlo(case.config, case.params, file, LENGTH, 3)
        rows, told = (3,), f" (with --batch; without: {error})"
    program = jax.export.deserialize(bytearray(file.read_bytes()))
    sizes = [(count, LENGTH) for count in rows]
    return compared(case, lambda ids: np.asarray(program.call(ids)), sizes) + told


def compared(case: Case, run: Callable[[np.ndarray], np.ndarray], sizes: Any = None) -> str:
    errors = []
    for rows, length in sizes or case.sizes():
        ids = case.ids(rows, length)
        errors.append(error_of(run(ids), case, ids))
    assert max(errors) <= BOUND, f"relative error {max(errors):.1e}"
    return f"relative error {max(errors):.1e}"


def int8(case: Case) -> str:
    import torch

    from bytelm_torch.interop.programs import quantize_int8

    made = quantize_int8(case.twin)
    ids = torch.from_numpy(case.ids(8, LENGTH // case.twin.round_length * case.twin.round_length))
    with torch.inference_mode():
        ours, theirs = (model(ids.long()).log_softmax(dim=-1) for model in (case.twin, made))
    kl = float((ours.exp() * (ours - theirs)).sum(dim=-1).mean())
    same = float((ours.argmax(dim=-1) == theirs.argmax(dim=-1)).double().mean())
    assert kl <= MOST_KL, f"mean KL {kl:.1e}"
    return f"mean KL {kl:.1e} nats, {same:.1%} of the most likely bytes the same"


FORMS = {"torch-export": torch_export, "onnx": onnx, "stablehlo": stablehlo, "int8": int8}


def check(name: str, case: Case) -> int:
    """A line for each form; how many are bad."""
    bad = 0
    for form, run in FORMS.items():
        expected = form in REFUSED.get(name, set())
        try:
            line, wrong = f"good: {run(case)}", expected
        except ValueError as error:
            line, wrong = f"refused: {error}", not expected
        except Exception as error:
            line, wrong = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", True
        bad += wrong
        print(f"{name}, {form}: {'BAD: ' if wrong else ''}{line}", flush=True)
    return bad


def main() -> int:
    parser = argparse.ArgumentParser(description="Runs models as programs of other runtimes.")
    parser.add_argument("--only", nargs="*", default=[], help="names of models")
    asked = parser.parse_args()
    sys.path[:1] = [str(ROOT)]  # not this folder
    warnings.simplefilter("ignore")
    from bytelm_jax.parity.twins import make_twin
    from parity_tests.twins import random_params

    bad = 0
    for name, config in models().items():
        if asked.only and name not in asked.only:
            continue
        params = random_params(config, "float32")
        with tempfile.TemporaryDirectory(prefix="bytelm-programs-") as place:
            bad += check(name, Case(config, params, make_twin(config, params), Path(place)))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
