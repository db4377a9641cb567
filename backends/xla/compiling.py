"""From an export to an executable, for devices that may exist on paper only; what it holds.

`compile_devices` finds the devices, `compile_export` compiles for a mesh of them. The other
functions read an executable: its text, its memory, its operations, its machine code.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trivium.backends.xla import hlo, partition, platforms, riegeli
from trivium.backends.xla.exporting import Json, avals, in_and_out
from trivium.backends.xla.platforms import Device
from trivium.compiler.errors import Unsupported

_OPTIMIZED = ".after_optimizations.txt"
"""How the names end of what the compiler dumps of its optimized modules."""


def compile_devices(device: Device) -> list[Any]:
    """Return jax's devices to compile for: a topology's, which exist on paper only, or the CPU."""
    import jax
    from jax.experimental import topologies

    if device.platform == "cpu":
        return jax.devices("cpu")[: device.chips]
    if device.platform == "tpu":
        options = {"chip_config_name": device.chip_config} if device.chip_config else {}
        topology = topologies.get_topology_desc(
            platform="tpu", topology_name=device.topology or "", **options
        )
    else:
        topology = topologies.get_topology_desc(
            platform="cuda",
            target_config=platforms.gpu_description(device.gpu_target or ""),
            topology=f"1x{device.chips}x1",
        )
    return list(topology.devices)


def compile_export(
    exported: Any,
    lowered: Any,
    split: partition.Partition,
    devices: Sequence[Any],
    caches: Sequence[str] = (),
    sizes: Mapping[str, int] | None = None,
    dump: Path | None = None,
) -> Any:
    """Compile an export for a mesh of devices, spread as the partition says.

    What it leaves symbolic is compiled at the given sizes. Caches are donated: the new ones are
    written where the old ones were. Into ``dump`` the compiler writes its modules as text.
    """
    import jax

    from trivium.backends.xla.lowering import precise

    mesh = partition.mesh_of(split, devices)
    options = dict(platforms.compiler_options(devices[0].platform) or {})
    if dump is not None:
        options |= {"xla_dump_to": str(dump), "xla_dump_hlo_as_text": True}
    with precise():
        program = jax.jit(
            exported.call,
            donate_argnums=(2,) if caches else (),
            compiler_options=options,
            **in_and_out(split, mesh, lowered, caches),
        )
        return program.lower(*avals(lowered, caches, sizes)).compile()


def text_of(compiled: Any, again: Callable[..., Any]) -> str:
    """Return the optimized HLO of a compiled program.

    Where jaxlib cannot read what the compiler gives it (libtpu's asynchronous updates of several
    operands), the program is compiled a second time and the compiler writes the text itself.

    Args:
        again: Compiles the same program with a folder for `compile_export`'s ``dump``.
    """
    import jax

    try:
        return str(compiled.as_text())
    except jax.errors.JaxRuntimeError:
        with tempfile.TemporaryDirectory() as name:
            again(dump=Path(name))
            written = sorted(Path(name).glob(f"*{_OPTIMIZED}"))
            if not written:
                raise
            return "\n\n".join(file.read_text(encoding="utf-8") for file in written)


def memory_of(compiled: Any) -> dict[str, int]:
    """The compiler's own account of one device's memory, in bytes; the parts add up to all of it.

    What outputs share with donated arguments is counted in both, and so negative once.
    """
    stats = compiled.memory_analysis()
    return {
        "arguments": stats.argument_size_in_bytes,
        "outputs": stats.output_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "code": stats.generated_code_size_in_bytes,
        "aliased": -stats.alias_size_in_bytes,
    }


def flops(compiled: Any, text: str) -> float | None:
    """The compiler's count of floating-point operations on one device.

    The one figure of XLA's own cost analysis that can be relied on, and only without loops, whose
    bodies it counts once. Its seconds and bytes are off by up to a factor of six.
    """
    flops = (compiled.cost_analysis() or {}).get("flops", 0.0)
    return float(flops) if flops > 0 and not hlo.has_loop(text) else None


def machine_code(compiled: Any, folder: Path) -> Json:
    """Write down the cubins of a GPU executable; say how many, how large, for which architecture.

    What it leaves to a library (cuDNN, cuBLAS) has none.
    """
    try:
        images = hlo.cubins(riegeli.values(compiled.runtime_executable().serialize()))
    except ValueError as error:
        return {"cubins": None, "reason": str(error)}
    folder.mkdir()
    for index, image in enumerate(images):
        (folder / f"{index:03}.cubin").write_bytes(image)
    return {
        "cubins": len(images),
        "bytes": sum(map(len, images)),
        "compute_capability": sorted({hlo.compute_capability(image) for image in images}),
    }


def capacity(job: Mapping[str, Any], devices: int) -> float | None:
    """Bytes of one jax device: a chip's memory, shared by the devices that the chip shows as."""
    chip = job.get("memory_bytes")
    return None if chip is None else chip * job["device"]["chips"] / devices


def require_fit(parts: Mapping[str, int], capacity: float | None, target: str) -> None:
    needed = sum(parts.values())
    if capacity is None or needed <= capacity:
        return
    figures = ", ".join(f"{part} {size:,}" for part, size in parts.items() if size)
    raise Unsupported(
        f"it needs {needed:,} bytes on each device ({figures}), and a device has {capacity:,.0f}",
        about=target,
        remedy="use a larger device, a smaller batch, or a recipe with smaller weights",
    )
