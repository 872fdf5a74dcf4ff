"""`bytelm doctor`: its command line."""

from pathlib import Path
from typing import TYPE_CHECKING

from bytelm.arguments import UsageError
from bytelm.config import DataConfig
from bytelm_jax.cli.train import Joining

if TYPE_CHECKING:
    from bytelm_jax.tools.doctor import Finding


def doctor_command(
    run_dir: Path = Path("runs"),
    data: tuple[str, ...] = (),
    valid: tuple[str, ...] = (),
    devices: int = 0,
    fsdp: int = 1,
    tensor: int = 1,
    distributed: bool = False,
    coordinator: str = "",
    num_processes: int = 0,
    process_id: int | None = None,
    limit: float = 300.0,
    text_field: str = "text",
    prompt_field: str = "",
    completion_field: str = "",
    chat_field: str = "",
    raw: bool = False,
    cache_dir: str = "",
) -> int:
    """Checks before a run that devices, arithmetic, gradients, checkpoints and data work here.

    Prints one line per check, ok or FAIL and what to do; exit code 1 if one fails. Several
    processes take the options of `bytelm train` and check together.

    Example: bytelm doctor --run-dir runs/first --fsdp 1

    Args:
        run_dir: a folder for checkpoints, as for `bytelm train`; it is left unchanged.
        data: files and folders of any form that should be readable, or NAME=PATH.
        valid: the same of validation sets.
        devices: how many to use; 0 means all.
        fsdp: as for `bytelm train`; must divide the number of devices.
        tensor: as for `bytelm train`; must divide the number of devices, and heads.
        distributed: join the processes of a SLURM or MPI job or a TPU pod.
        coordinator: HOST:PORT of process 0, outside such jobs.
        num_processes: number of processes, with --coordinator.
        process_id: index of this process, from 0, with --coordinator.
        limit: seconds that each check may take.
        text_field: the field of records (JSON, Parquet, Arrow, tar) that holds the text.
        prompt_field: the field of records that is read and not counted, before COMPLETION_FIELD.
        completion_field: the field of records that is counted, after PROMPT_FIELD.
        chat_field: the field of records that holds messages; the assistant's are counted.
        raw: take the bytes of files as they are, whatever their form.
        cache_dir: where compressed files and records are kept in prepared form.
    """
    counts = (("devices", devices, 0), ("fsdp", fsdp, 1), ("tensor", tensor, 1))
    for name, value, least in (*counts, ("limit", limit, 1)):
        if value < least:
            raise UsageError(f"--{name} {value}: must be at least {least}")
    if (num_processes or process_id is not None) and not coordinator:
        raise UsageError("--num-processes, --process-id: need --coordinator HOST:PORT")
    fields = text_field, prompt_field, completion_field, chat_field
    reading = _reading(data, valid, fields, raw, cache_dir)
    joining = Joining(distributed or bool(coordinator), coordinator, num_processes, process_id)
    return _doctor(run_dir, (devices, fsdp, tensor), reading, limit, joining)


def _reading(
    data: tuple[str, ...],
    valid: tuple[str, ...],
    fields: tuple[str, str, str, str],
    raw: bool,
    cache_dir: str,
) -> DataConfig:
    """What is read, and how."""
    names = ("text_field", "prompt_field", "completion_field", "chat_field")
    named = dict(zip(names, fields, strict=True))
    return DataConfig(paths=data, valid=valid, raw=raw, cache_dir=cache_dir, **named)


def _doctor(
    run_dir: Path, sizes: tuple[int, int, int], reading: DataConfig, limit: float, joining: Joining
) -> int:
    """Checks and prints; the exit code."""
    from bytelm_jax.tools import doctor
    from bytelm_jax.training import processes

    findings = [_reach(joining)] if joining.coordinator else []
    if all(finding.ok for finding in findings):
        findings += _join(joining)
    for finding in findings:
        doctor.report(finding)
    if not all(finding.ok for finding in findings):
        return 1  # checks of one process would say nothing about the run
    well = True
    for finding in doctor.examine(run_dir, sizes, reading, limit):
        doctor.report(finding)
        well = well and finding.ok
    return 0 if processes.all_agree(well) else 1


def _reach(joining: Joining) -> "Finding":
    """Whether the coordinator can be reached; raises `UsageError` for an invalid address."""
    from bytelm_jax.tools import doctor
    from bytelm_jax.training import processes

    address = processes.address(joining.coordinator)
    if address is None:
        raise UsageError(f"--coordinator {joining.coordinator}: must be HOST:PORT")
    if joining.process_id is None or not 0 <= joining.process_id < joining.processes:
        raise UsageError("--coordinator: needs --num-processes N and --process-id I below it")
    try:
        message = doctor.check_coordinator(*address, joining.process_id == 0)
    except doctor.SickError as error:
        return doctor.Finding("coordinator", False, str(error))
    return doctor.Finding("coordinator", True, message)


def _join(joining: Joining) -> "list[Finding]":
    """Joins the other processes; returns a failed check if they do not come."""
    from bytelm_jax.cli.run import join_processes
    from bytelm_jax.tools.doctor import Finding

    try:
        join_processes(joining, "doctor")
    except ValueError as error:
        if not isinstance(error.__cause__, RuntimeError):
            raise
        return [Finding("processes", False, str(error))]
    return []
