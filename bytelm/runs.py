"""Folders that hold a model: an export, or a run folder of either framework.

An export is `config.json` and `model.safetensors`. A run folder has `checkpoints/STEP`, which are
exports in PyTorch and Orbax checkpoints in JAX.
"""

from pathlib import Path

from bytelm.config import require
from bytelm.export import MODEL_FILE
from bytelm.metrics import METRIC, read_metrics, score


def is_run(folder: Path) -> bool:
    """Whether `folder` is a run folder, of JAX or of PyTorch, and not an export."""
    return (folder / "checkpoints").is_dir() and not (folder / MODEL_FILE).exists()


def saved_steps(run_dir: Path) -> list[int]:
    """The steps of which `run_dir` holds a checkpoint, in increasing order."""
    folder = run_dir / "checkpoints"
    names = [each.name for each in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isdecimal())


def find_export(folder: Path, checkpoint: str | int = "latest") -> Path | None:
    """The export that `folder` is, or that it contains if PyTorch trained in it; otherwise None.

    None means a run folder of JAX. `checkpoint` is "latest", "best" (the lowest validation loss in
    `metrics.jsonl`) or a step. Raises `ValueError` for a checkpoint that does not exist, and if one
    is chosen in an export.
    """
    if not is_run(folder):
        known = checkpoint == "latest"
        require(known, f"checkpoint={checkpoint}: {folder} is not a run folder; leave it out")
        return folder
    steps = saved_steps(folder)
    require(bool(steps), f"{folder}/checkpoints: no checkpoint there; train first")
    places = {step: folder / "checkpoints" / str(step) for step in steps}
    if not any((place / MODEL_FILE).exists() for place in places.values()):
        return None
    if checkpoint == "latest":
        return places[steps[-1]]
    if checkpoint == "best":
        return places[_best(folder, steps)]
    wanted = int(checkpoint) if str(checkpoint).isdecimal() else None
    if wanted not in places:
        raise ValueError(f"checkpoint={checkpoint}: choose latest, best or one of {steps}")
    return places[wanted]


def _best(run_dir: Path, steps: list[int]) -> int:
    file = run_dir / "metrics.jsonl"
    records = read_metrics(file) if file.is_file() else []
    scores = {record.get("step"): score(record) for record in records if METRIC in record}
    ranked = [(bits, step) for step in steps if (bits := scores.get(step)) is not None]
    require(bool(ranked), "checkpoint=best: no checkpoint was evaluated; choose latest")
    return min(ranked)[1]
