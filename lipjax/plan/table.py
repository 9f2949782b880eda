"""Plans as a Markdown table, and what to change where a step does not fit."""

import collections

from lipjax.plan.flops import KINDS
from lipjax.plan.plan import Plan

GIB, MIB = 2**30, 2**20
_KERNELS = ("library", "triton", "collective", "other")
# How many times what was traced all chips together may compute before a plan warns.
_REPEATED = 1.1


def table(plans: list[Plan]) -> str:
    """A Markdown table with a column for each plan, and what it does not say below."""
    rows = [_rows(plan) for plan in plans]
    names = list(dict.fromkeys(name for found in sorted(rows, key=len, reverse=True) for name in found))
    lines = [
        "| | " + " | ".join(plan.topology.name for plan in plans) + " |",
        "|---|" + "---|" * len(plans),
        *("| " + " | ".join([name, *(found.get(name, "") for found in rows)]) + " |" for name in names),
    ]
    return "\n".join([*lines, "", *_notes(plans)])


def _rows(plan: Plan) -> dict[str, str]:
    chip, count = plan.topology.chip, plan.topology.count
    rows = {
        "chips, hosts": f"{count}, {plan.hosts}",
        "images per step, per chip": f"{plan.batch}, {plan.batch / count:g}",
        "parameters": f"{plan.parameters / 1e6:.2f} M",
        "memory per chip": _memory(plan),
    }
    if plan.memory is not None:
        memory = plan.memory
        rows |= {
            "… arguments": _bytes(memory.arguments),
            "… outputs in no argument's place": _bytes(memory.outputs - memory.aliased),
            "… temporaries, code": f"{_bytes(memory.temporaries)}, {_bytes(memory.code)}",
        }
    rows |= {
        "operations per step, all chips, traced": f"{_flop(sum(plan.traced.values()))} ({_kinds(plan.traced)})",
        "… per image": _flop(sum(plan.traced.values()) / plan.batch),
    }
    if plan.memory is not None:
        rows |= {
            "operations per step and chip, compiled": f"{_flop(sum(plan.flops.values()))} ({_kinds(plan.flops)})",
            "… times chips, over those traced": f"{plan.repeated:.3f}",
        }
        if plan.xla_flops:
            rows["… by XLA's own count"] = _flop(plan.xla_flops)
            rows["bytes accessed per step and chip, XLA's count"] = _bytes(plan.xla_bytes)
        if plan.kernels:
            kinds = ", ".join(f"{kind} {plan.kernels[kind]:,}" for kind in _KERNELS if kind in plan.kernels)
            rows["kernels per step and chip, at least"] = f"{sum(plan.kernels.values()):,} ({kinds})"
        rows |= {
            **{f"{kind} per step": _bytes(size) for kind, size in _by_kind(plan).items()},
            "bytes over a chip's links, at least": _bytes(plan.link_bytes),
        }
        if plan.link_bytes:
            rows["operations per byte over the links"] = f"{sum(plan.work.values()) / plan.link_bytes:,.0f}"
    names = {"compute": "compute", "memory": "HBM traffic", "links": "interconnect"}
    rows |= {f"{names[name]}, at least": _seconds(seconds) for name, seconds in plan.seconds.items()}
    if chip is not None:
        rows |= {
            "step, at least": _seconds(plan.bound),
            "run, at least": f"{plan.num_steps:,} steps, {plan.num_steps * plan.bound / 3600:.3g} h, "
            f"{plan.chip_hours:.4g} chip-hours",
            "images per second and host then": f"{plan.images_per_host:,.0f}",
        }
    if plan.memory is not None:
        rows["compiled in"] = f"{plan.compile_seconds:.0f} s"
    return rows


def _memory(plan: Plan) -> str:
    chip, rough = plan.topology.chip, "roughly " if plan.stand_in else ""
    if plan.memory is None:
        return f"does not fit: {plan.overflow}"
    used = f"{rough}{_bytes(plan.memory.total)}"
    if chip is None:
        return used
    fits = "" if plan.fits else "does not fit: "
    return f"{fits}{used} of {_bytes(chip.memory)} ({plan.memory.total / chip.memory:.1%})"


def _by_kind(plan: Plan) -> dict[str, float]:
    totals: dict[str, float] = collections.defaultdict(float)
    for collective in plan.collectives:
        totals[collective.kind] += collective.times * collective.bytes
    return dict(totals)


def _kinds(operations: dict[str, float]) -> str:
    total = sum(operations.values()) or 1.0
    shares = [(kind, operations.get(kind, 0.0) / total) for kind in (*KINDS, "library")]
    return ", ".join(f"{kind} {share:.1%}" for kind, share in shares if share)


def _notes(plans: list[Plan]) -> list[str]:
    notes = [
        f"Compiled by {', '.join(dict.fromkeys(plan.compiler for plan in plans))}. Operations are those of products, "
        "convolutions, Fourier transforms and factorisations, by the precision of their operands; an addition and a "
        "multiplication are two. All-reduce: the arrays that are added up, of a chip."
    ]
    chips = {plan.topology.chip.name: plan.topology.chip for plan in plans if plan.topology.chip is not None}
    for chip in chips.values():
        notes.append(
            f"{chip.name}: {chip.flops['bfloat16'] / 1e12:g} TFLOP/s in bfloat16, {chip.flops['default'] / 1e12:g} "
            f"and {chip.flops['highest'] / 1e12:.3g} in float32 at the default and the highest precision, "
            f"{chip.bandwidth / 1e9:,.0f} GB/s of HBM, {chip.links / 1e9:g} GB/s sent over all links ({chip.source})."
        )
    if any(plan.stand_in for plan in plans):
        notes.append(
            "A stand-in compiled for the host's processor: memory, collectives and bytes accessed on the chips named "
            "will differ, and its temporaries count in no bound."
        )
    if any(plan.kernels for plan in plans):
        notes.append(
            "XLA compiled for GPUs that are not here, so nothing was timed: its choice of algorithms may differ, and "
            "what cuDNN and cuBLAS need besides is not in the temporaries. Library: calls of them, whose operations "
            "are counted at the precision that was traced."
        )
    uncounted = sorted({what for plan in plans for what in plan.uncounted})
    if uncounted:
        notes.append(f"Not counted among the operations traced, or only once: {', '.join(uncounted)}.")
    if any(plan.unknown_loops for plan in plans):
        notes.append("Some loops of the compiled program have no known length; they count once.")
    return notes


def advice(plan: Plan, config) -> str:
    """Sentences about what does not fit, and the settings that would change it, those that help most first."""
    chip = plan.topology.chip
    capacity = f" of {chip.memory / GIB:.1f}" if chip is not None else ""
    need = plan.overflow if plan.memory is None else f"{plan.memory.total / GIB:.2f} GiB{capacity}"
    per_chip = plan.batch // plan.topology.count // config.accumulation
    images = [
        f"config.accumulation (now {config.accumulation}: {per_chip} images of a chip are in memory at a time)",
        f"config.remat (now {config.remat})",
        *(['config.precision = "bfloat16"'] if config.precision == "float32" else []),
        f"a smaller config.batch_size (now {plan.batch}) or more chips",
    ]
    state = [f"config.mesh.model (now {config.mesh.model}), which divides parameters and optimizer state"]
    # State: parameters, and what the optimizer keeps of them; the rest grows with the images of a chip.
    mostly_state = plan.memory is not None and plan.memory.arguments > plan.memory.temporaries
    settings = [*state, *images] if mostly_state else [*images, *state]
    return f"The step does not fit {plan.topology.name} ({need}). Change, in this order: {'; '.join(settings)}."


def warning(plan: Plan) -> str:
    """A sentence about work that chips repeat instead of dividing it; "" where that is at most a tenth."""
    if plan.memory is None or plan.repeated <= _REPEATED:
        return ""
    return (
        f"Warning: on {plan.topology.name} all chips together compute {plan.repeated:.2f} times what was traced: they "
        "repeat work that is too small, or made of too few or too narrow matrices, to be divided over so many "
        "(docs/scale.md, sharded parametrisation). Take fewer chips, or more images for each."
    )


def _bytes(size: int | float) -> str:
    if size >= GIB:
        return f"{size / GIB:.2f} GiB"
    return f"{size / MIB:.3g} MiB" if size >= MIB else f"{size / 1024:.3g} KiB"


def _flop(count: int | float) -> str:
    for unit, name in ((1e15, "P"), (1e12, "T"), (1e9, "G")):
        if count >= unit:
            return f"{count / unit:.4g} {name}FLOP"
    return f"{count / 1e6:.4g} MFLOP"


def _seconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-4 else f"{seconds * 1e6:.3g} µs"
