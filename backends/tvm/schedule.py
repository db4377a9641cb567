"""A schedule for loops on a CPU: parallel outside, vectors inside.

TVM's default CPU pipeline leaves every loop nest as it was written, scalar and on one core. Its
tuner would find better nests than these two rules, at minutes for each operator; the rules cost
milliseconds and are worth a factor of 2 to 13 on convolutional networks.
"""

from __future__ import annotations

from typing import Any

LANES = 16
"""Elements in a vector loop: one AVX-512 register of float32, two AVX2 or four NEON ones."""

PARALLEL = 65536
"""Scalar operations below which waking another core costs more than it saves."""


def schedule_for_cpu(module: Any) -> Any:
    """Schedule every loop nest of an ``IRModule``; one that resists is left as it was."""
    from tvm import s_tir, tirx

    scheduled = {}
    for name, function in module.functions_items():
        if not isinstance(function, tirx.PrimFunc):
            continue
        if "tirx.is_scheduled" in (function.attrs or {}):
            continue
        schedule = s_tir.Schedule(function)
        try:
            _schedule(schedule)
        except s_tir.ScheduleError:
            continue
        scheduled[name] = schedule.mod["main"].with_attr("tirx.is_scheduled", True)
    for name, function in scheduled.items():
        module[name] = function
    return module


def _schedule(schedule: Any) -> None:
    from tvm.s_tir.dlight.analysis import normalize_prim_func

    blocks = normalize_prim_func(schedule)
    for info in blocks or ():
        loops = schedule.get_loops(info.block_rv)
        kinds = info.dom_kind()
        if len(kinds) != len(loops) or set(kinds) - set("SR"):
            continue
        if _touches_booleans(schedule.get(info.block_rv)):
            continue
        extents = [_extent(schedule, loop) for loop in loops]
        if not loops or None in extents:
            continue
        spatial = [loop for loop, kind in zip(loops, kinds, strict=True) if kind == "S"]
        reduction = [loop for loop, kind in zip(loops, kinds, strict=True) if kind == "R"]
        work = 1
        for extent in extents:
            work *= extent or 1
        if not spatial:
            continue
        if reduction:
            _schedule_reduction(schedule, info.block_rv, spatial, reduction, work)
        else:
            _schedule_elementwise(schedule, spatial, work)


def _touches_booleans(block: Any) -> bool:
    """TVM stores booleans as bytes and gets the two mixed up in vectors."""
    return any(str(region.source.dtype) == "bool" for region in (*block.reads, *block.writes))


def _schedule_elementwise(schedule: Any, spatial: list[Any], work: int) -> None:
    # Fusing the innermost loop too would turn its indices into divisions.
    outer, inner = _split_lanes(schedule, spatial[-1])
    outside = [*spatial[:-1], *([outer] if outer is not None else [])]
    if inner is not None:
        schedule.vectorize(inner)
    if outside and work >= PARALLEL:
        schedule.parallel(schedule.fuse(*outside))


def _schedule_reduction(
    schedule: Any, block: Any, spatial: list[Any], reduction: list[Any], work: int
) -> None:
    """Keep a vector of sums in registers over the whole reduction."""
    outer, inner = _split_lanes(schedule, spatial[-1])
    outside = [*spatial[:-1], *([outer] if outer is not None else [])]
    inside = [inner] if inner is not None else []
    schedule.reorder(*outside, *reduction, *inside)
    if outside and work >= PARALLEL:
        schedule.parallel(schedule.fuse(*outside))
    if inner is not None:
        # Before the split into start and update: the update alone is no whole reduction any more.
        schedule.vectorize(inner)
    schedule.decompose_reduction(block, reduction[0])


def _split_lanes(schedule: Any, loop: Any) -> tuple[Any, Any]:
    """Split off a loop of `LANES`, only where it divides: a guarded tail does not vectorize."""
    extent = _extent(schedule, loop)
    if extent is None or extent < 4:
        return loop, None
    lanes = next((n for n in (LANES, LANES // 2, LANES // 4) if extent % n == 0), None)
    if lanes is None:
        return (None, loop) if extent <= LANES else (loop, None)
    if extent == lanes:
        return None, loop
    outer, inner = schedule.split(loop, factors=[None, lanes])
    return outer, inner


def _extent(schedule: Any, loop: Any) -> int | None:
    from tvm import tirx

    extent = schedule.get(loop).extent
    return int(extent) if isinstance(extent, tirx.IntImm) else None
