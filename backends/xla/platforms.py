"""Which XLA compiler a target needs, how that compiler is told of the device, and what of it is
missing here.

Everything is read off a `Target`; nothing in this module imports jax. These keys of
``Target.options`` are understood, all of them optional:

- ``xla_platform``: ``tpu``, ``cuda`` or ``cpu``; by default what the target's family says.
- ``generation``: a TPU's, as libtpu spells it in front of the colon of a topology name (``v4``,
  ``v5e``, ``v5p``, ``v6e``, ``TPU7x``). The slice is then ``Target.topology``.
- ``topology``: a whole libtpu topology name (``v5e:2x2``), instead of ``generation``.
- ``accelerator_type``: libtpu's ``TPU_ACCELERATOR_TYPE``; by default made from the generation and
  ``Target.chips``.
- ``gpu_target``: which description in ``gpu_targets/`` is the GPU (``h100_sxm``); by default the
  target's own name, without the vendor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from importlib.resources import files
from importlib.util import find_spec
from math import prod
from typing import Any, Literal, cast, get_args

from trivium.compiler.errors import BadInput, ToolchainMissing, Unsupported
from trivium.compiler.types import Target

Platform = Literal["cpu", "tpu", "cuda"]

_PLATFORM_OF_FAMILY: Mapping[str, Platform] = {"cpu": "cpu", "tpu": "tpu", "gpu": "cuda"}


@dataclass(frozen=True)
class Generation:
    """How libtpu and Cloud TPU speak of one generation of TPU.

    Attributes:
        accelerator: Prefix of the accelerator type; its number counts chips or TensorCores.
        counts_cores: Whether that number counts TensorCores (two a chip).
        chip_config: How the cores of a chip make up jax devices, where the default of a real
            host differs from that of a topology description.
        smallest: The slice when the target names none.
    """

    accelerator: str
    counts_cores: bool
    smallest: str
    chip_config: str | None = None


GENERATIONS: Mapping[str, Generation] = {
    # A v4 host fuses the two cores of a chip into one device unless told otherwise.
    "v4": Generation("v4", True, "1x1x1", chip_config="megacore"),
    "v5e": Generation("v5litepod", False, "1x1"),
    "v5p": Generation("v5p", True, "1x1x1"),
    "v6e": Generation("v6e", False, "1x1"),
    "TPU7x": Generation("tpu7x", True, "1x1x1"),
}


@dataclass(frozen=True)
class Device:
    """What XLA has to be told of a target; JSON-serializable with ``dataclasses.asdict``.

    Attributes:
        chips: How many; a chip may show as several jax devices (TPU7x has two).
        topology: libtpu's name of a TPU slice.
        gpu_target: Stem of the GPU's description.
    """

    platform: Platform
    chips: int = 1
    topology: str | None = None
    accelerator_type: str | None = None
    chip_config: str | None = None
    gpu_target: str | None = None


def device_of(target: Target) -> Device:
    """Return the device that a target stands for.

    Raises:
        Unsupported: XLA has no compiler for the family, or no description of the device.
        BadInput: A slice that does not match the target's number of chips.
    """
    platform = target.options.get("xla_platform") or _PLATFORM_OF_FAMILY.get(target.family)
    if platform not in get_args(Platform):
        raise Unsupported(
            f"XLA has no compiler for {platform or target.family}",
            about=target.name,
            remedy=f"use another backend: {', '.join(target.backends)}",
        )
    if platform == "tpu":
        return _tpu(target)
    if platform == "cuda":
        return _gpu(target)
    return Device(cast(Platform, platform), target.chips)


def _tpu(target: Target) -> Device:
    topology = target.options.get("topology")
    name, _, shape = (topology or target.options.get("generation", "")).partition(":")
    generation = GENERATIONS.get(name)
    if generation is None:
        raise Unsupported(
            f"the TPU generation {name!r} is not known to the XLA backend",
            about=target.name,
            remedy=f"known: {', '.join(GENERATIONS)}",
        )
    shape = shape or target.topology or generation.smallest
    chips = _chips(shape, target.name)
    if target.topology and chips != target.chips:
        raise BadInput(
            f"a slice of {shape} has {chips} chips, the target says {target.chips}",
            about=target.name,
        )
    number = chips * 2 if generation.counts_cores else chips
    return Device(
        "tpu",
        chips,
        f"{name}:{shape}",
        target.options.get("accelerator_type", f"{generation.accelerator}-{number}"),
        generation.chip_config,
    )


def _chips(shape: str, about: str) -> int:
    try:
        return prod(int(axis) for axis in shape.split("x"))
    except ValueError:
        raise BadInput(f"{shape!r} is no slice", about=about, remedy="e.g. 2x2") from None


def _gpu(target: Target) -> Device:
    device, _, _ = target.name.partition(":")
    own_name = device.removeprefix("nvidia-").replace("-", "_")
    name = target.options.get("gpu_target", own_name)
    known = gpu_targets()
    if name not in known:
        raise Unsupported(
            f"XLA has no description {name!r} of a GPU to compile for it without one",
            about=target.name,
            remedy=f"described are {', '.join(known)}",
        )
    return Device("cuda", target.chips, gpu_target=name)


def gpu_targets() -> list[str]:
    """Return the names of the described GPUs."""
    folder = files("trivium.backends.xla") / "gpu_targets"
    return sorted(
        file.name.removesuffix(".txtpb")
        for file in folder.iterdir()
        if file.name.endswith(".txtpb")
    )


def gpu_description(name: str) -> str:
    """Return XLA's ``GpuTargetConfigProto`` of a GPU, as text."""
    folder = files("trivium.backends.xla") / "gpu_targets"
    return (folder / f"{name}.txtpb").read_text(encoding="utf-8")


def environment(device: Device) -> dict[str, str]:
    """Return the variables that must be set before jax is imported to compile for a device.

    The compiler never touches an accelerator: all compiles are ahead of time, on the host.
    """
    variables = {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "2", "GRPC_VERBOSITY": "ERROR"}
    if device.platform == "tpu":
        variables |= {
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "TPU_ACCELERATOR_TYPE": device.accelerator_type or "",
            # libtpu locks itself to one process, for the sake of the hardware that a compile
            # ahead of time does not open.
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            "TPU_STDERR_LOG_LEVEL": "3",
            "TPU_MIN_LOG_LEVEL": "3",
            "TPU_LOG_DIR": "disabled",
        }
    if device.platform == "cpu":
        variables["JAX_NUM_CPU_DEVICES"] = str(device.chips)
    if device.platform == "cuda":
        variables["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    return variables


def compiler_options(platform: str) -> dict[str, Any]:
    """Return what XLA's compiler is told beside its defaults, by the name of jax's platform.

    On a CPU they were measured against the defaults (`benchmarks/xla_cpu.py`). The YNNPACK kernels
    that jaxlib 0.10 prefers pack the weights in every call, which costs more than they gain over
    Eigen's: a 512-to-512 convolution over 7x7 ran at 57 GFLOP/s instead of 120. And LLVM keeps to
    half of AVX-512's width unless told.
    """
    if platform != "cpu":
        return {}
    return {"xla_cpu_experimental_ynn_fusion_type": "", "xla_cpu_prefer_vector_width": 512}


_PACKAGES: Mapping[Platform, Mapping[str, str]] = {
    "cpu": {},
    "tpu": {"libtpu": "libtpu"},
    "cuda": {"jax_cuda13_plugin": "jax-cuda13-plugin", "jax_plugins.xla_cuda13": "jax-cuda13-pjrt"},
}
_EXTRA: Mapping[Platform, str] = {"cpu": "tpu", "tpu": "tpu", "cuda": "gpu"}


def missing(platform: Platform = "cpu") -> str | None:
    """Return what has to be installed to compile for a platform, or None."""
    wanted = {"jax": "jax", "jaxlib": "jaxlib", **_PACKAGES[platform]}
    absent = [package for module, package in wanted.items() if not _importable(module)]
    if not absent:
        return None
    return (
        f"{' and '.join(absent)} {'is' if len(absent) == 1 else 'are'} not installed; "
        f"pip install 'trivium[{_EXTRA[platform]}]'"
    )


def require(platform: Platform, about: str) -> None:
    """Raise ``ToolchainMissing`` unless a platform's compiler is installed."""
    reason = missing(platform)
    if reason is not None:
        cause, _, remedy = reason.partition("; ")
        raise ToolchainMissing(cause, about=about, remedy=remedy)


def _importable(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def versions() -> dict[str, str]:
    """Return the installed versions of jax and its compilers, by package."""
    found: dict[str, Any] = {}
    for package in ("jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "jax-cuda13-pjrt"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
