"""What a dry run found, as text and as JSON."""

from dataclasses import asdict
from typing import Any

from bytelm.chips import find_chip
from bytelm_jax.tools.dry_run import Estimate

_COMPILERS = {"tpu": ("libtpu", "aot"), "gpu": ("CUDA's plugin", "cuda")}
"""Platform → its compiler, and the extra that installs it."""


def describe(name: str, estimate: Estimate) -> str:
    """The estimate as text."""
    gib = {k: f"{v / 2**30:9.3f} GiB" for k, v in estimate.memory._asdict().items()}
    machine = estimate.machine
    lines = [
        f"{name} on {estimate.devices} devices, {_shape(estimate)}, {estimate.form}, "
        f"{estimate.compute_dtype}: "
        f"{estimate.bytes_per_step:,} bytes per step, {estimate.rows} rows at a time on each "
        "device",
        *_about_frozen(estimate),
        "memory of a device",
        f"  parameters       {gib['parameters']}",
        f"  working copies   {gib['copies']}   of the parameters, as products read them",
        f"  gradients        {gib['gradients']}",
        f"  optimizer state  {gib['optimizer_state']}",
        f"  activations      {gib['activations']}",
        f"  logits           {gib['logits']}   including the loss's copies and their gradient",
        f"  sum              {sum(estimate.memory[:6]) / 2**30:9.3f} GiB",
        f"  at once          {gib['peak']}   {_about_peak(estimate)}",
        *_about_compiled(estimate),
        *_about_work(estimate),
        "collectives of a step",
    ]
    for each in estimate.collectives:
        many = f"{each.count} x {each.kind} over {each.group}"
        milliseconds = 1e3 * each.seconds(1e9 * machine.link_gbytes)
        lines.append(f"  {many:32} {each.bytes:>15,} bytes {milliseconds:9.2f} ms")
    lines += [] if estimate.collectives else ["  none"]
    lines.append(
        f"a step: {1e3 * estimate.compute_seconds:.1f} ms of computing at {100 * machine.mfu:g} "
        f"% of {machine.chip}, {1e3 * estimate.collective_seconds:.1f} ms of collectives at "
        f"{machine.link_gbytes:g} GB/s: {100 * estimate.collective_share:.1f} % of it, if "
        "nothing overlaps"
    )
    return "\n".join(lines)


def _shape(estimate: Estimate) -> str:
    groups = estimate.devices // (estimate.fsdp * estimate.tensor)
    tensor = f" x tensor {estimate.tensor}" if estimate.tensor > 1 else ""
    return f"data {groups} x fsdp {estimate.fsdp}{tensor}"


def _about_peak(estimate: Estimate) -> str:
    """How sure the estimate of the peak is."""
    if estimate.memory.least == estimate.memory.peak:
        return "at most"
    seen = estimate.seen
    least = f"{estimate.memory.least / 2**30:.3f} if the compiler has to save memory"
    if seen is None:
        return f"estimated; {least}"
    took = f"the compiler took {_more(seen.low)} to {_more(seen.high)} for {seen.steps} steps"
    return f"estimated; {took} of such models; {least}"


def _more(fraction: float) -> str:
    return f"{100 * abs(fraction):.0f} % {'less' if fraction < 0 else 'more'}"


def _about_compiled(estimate: Estimate) -> list[str]:
    """What the target's compiler says, or that it was not asked."""
    compiled, chip = estimate.compiled, find_chip(estimate.machine.chip)
    if not estimate.target:
        return []
    if compiled is None:
        library, extra = _COMPILERS[chip.platform]
        why = f"install {library} (pip install 'bytelm[{extra}]') for the compiler's own figures"
        return [f"an estimate for {estimate.target}, of {estimate.devices} simulated CPUs: {why}"]
    peak, work = compiled.peak / 2**30, compiled.work
    by_element = f"{work.elementwise / 1e9:,.1f} by the element"
    if not work.elementwise:  # a GPU's compiler does not say
        by_element = "what is done by the element is not counted"
    return [
        f"compiled for {estimate.target}",
        f"  needs            {peak:9.3f} GiB of {chip.memory / 2**30:g}: "
        f"{compiled.arguments / 2**30:.3f} of state, {compiled.temporaries / 2**30:.3f} of "
        f"temporaries, {compiled.program / 2**30:.3f} of program; in use at once "
        f"{compiled.in_use / 2**30:.3f}",
        f"  work             {work.total / 1e9:9,.1f} GFLOP, {work.total / estimate.flops:.2f} x "
        f"the model's own {estimate.flops / 1e9:,.1f}: {work.products / 1e9:,.1f} in products, "
        f"{work.kernels / 1e9:,.1f} in kernels, {by_element}",
        f"  padding          {100 * compiled.padding / max(compiled.written, 1):9.1f} % of the "
        f"{compiled.written / 1e9:,.2f} GB that are written, added by layouts",
    ]


def _about_work(estimate: Estimate) -> list[str]:
    """The model's own work and what is executed, where these differ."""
    ratio = estimate.executed_flops / estimate.flops
    if ratio < 1.005:
        return []
    return [
        f"work of a step on each device: {estimate.flops / 1e9:,.1f} GFLOP by the model's own "
        f"count, {estimate.executed_flops / 1e9:,.1f} executed ({ratio:.2f} x): the patch budget "
        "has room for more patches than the mean"
    ]


def _about_frozen(estimate: Estimate) -> list[str]:
    """What is frozen, and what the rest takes on each device, if anything is."""
    if not estimate.frozen:
        return []
    memory = estimate.memory
    return [
        f"{estimate.frozen:,} of {estimate.trained + estimate.frozen:,} parameters frozen: of the "
        f"others, gradients take {memory.gradients:,} bytes and the optimizer state "
        f"{memory.optimizer_state:,} on each device"
    ]


def as_json(name: str, estimate: Estimate) -> dict[str, Any]:
    """The estimate as one object; memory in bytes, times in seconds."""
    fields = estimate._asdict() | {"memory": estimate.memory._asdict()}
    fields |= {"machine": estimate.machine._asdict()}
    if estimate.compiled is not None:
        whole = estimate.compiled._asdict() | {"peak": estimate.compiled.peak}
        whole |= {"flops": estimate.compiled.work.total, "work": estimate.compiled.work._asdict()}
        fields["compiled"] = {k: v for k, v in whole.items() if k != "collectives"}
    speed = 1e9 * estimate.machine.link_gbytes
    fields["collectives"] = [
        asdict(each) | {"seconds": each.seconds(speed)} for each in estimate.collectives
    ]
    return {"recipe": name} | fields | {"collective_share": estimate.collective_share}
