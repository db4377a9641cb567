"""What an engine is built with: flags, memory, and the ranges of shapes that it serves.

All of it goes into ``engine.json``, which the scripts in the artifact read, and into the `trtexec`
command line that does the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trivium.compiler.errors import BadInput
from trivium.compiler.samples import bound_shape
from trivium.compiler.types import TensorInfo, Workload

MODEL, PLAN, TIMING_CACHE, SETTINGS = "model.onnx", "model.plan", "timing.cache", "engine.json"

_FLAGS = {
    "tf32": ("TF32", "true", "--noTF32"),
    "sparse_weights": ("SPARSE_WEIGHTS", "false", "--sparsity=enable"),
    "version_compatible": ("VERSION_COMPATIBLE", "false", "--versionCompatible"),
    "weight_streaming": ("WEIGHT_STREAMING", "false", "--allowWeightStreaming"),
}
"""Option -> (builder flag, default, what `trtexec` calls it: for TF32 its absence)."""


def settings(
    options: Mapping[str, str], inputs: Sequence[TensorInfo], workload: Workload
) -> dict[str, Any]:
    """Make the content of ``engine.json`` from the backend's options.

    Options: ``tf32``, ``sparse_weights``, ``version_compatible``, ``weight_streaming`` (true or
    false), ``workspace_mib``, ``optimization_level`` (0 to 5), and ``profile.<dimension>``, given
    as ``min:opt:max``, for each symbolic dimension.

    Raises:
        BadInput: An option that there is not, or a value that it cannot have.
    """
    profiles = {
        name.removeprefix("profile."): _range(name, text)
        for name, text in options.items()
        if name.startswith("profile.")
    }
    dimensions = {dim for info in inputs for dim in info.shape if isinstance(dim, str)}
    known = {*_FLAGS, "workspace_mib", "optimization_level"}
    for name in options:
        dimension = name.removeprefix("profile.")
        if name not in known and not (name.startswith("profile.") and dimension in dimensions):
            every = sorted(known | {f"profile.{dim}" for dim in dimensions})
            raise BadInput(
                "the backend has no such option",
                about=f"--option {name}",
                remedy=f"it has: {', '.join(every)}",
            )
    workspace = options.get("workspace_mib")
    return {
        "model": MODEL,
        "plan": PLAN,
        "timing_cache": TIMING_CACHE,
        "flags": [
            flag
            for name, (flag, default, _) in _FLAGS.items()
            if _truth(name, options.get(name, default))
        ],
        "workspace_bytes": _whole("workspace_mib", workspace, 1, 1 << 20) << 20
        if workspace is not None
        else None,
        "optimization_level": _whole(
            "optimization_level", options.get("optimization_level", "3"), 0, 5
        ),
        "profiles": [_profile(inputs, workload, profiles)] if dimensions else [],
    }


def _profile(
    inputs: Sequence[TensorInfo], workload: Workload, ranges: Mapping[str, tuple[int, int, int]]
) -> dict[str, Any]:
    """Ranges for every input with an open dimension; 1 to the workload's size unless given."""
    profile = {}
    for info in inputs:
        if all(isinstance(dim, int) for dim in info.shape):
            continue
        usual = bound_shape(info, workload)
        bounds = [
            (dim, dim, dim) if isinstance(dim, int) else ranges.get(dim, (min(1, size), size, size))
            for dim, size in zip(info.shape, usual, strict=True)
        ]
        profile[info.name] = {
            kind: [bound[index] for bound in bounds]
            for index, kind in enumerate(("min", "opt", "max"))
        }
    return profile


def fix(profiles: Sequence[Mapping[str, Mapping[str, list[int]]]]) -> None:
    """Let each profile serve the sizes alone that it is tuned for."""
    for ranges in profiles:
        for sizes in ranges.values():
            sizes["min"][:] = sizes["max"][:] = sizes["opt"]


def trtexec(engine: Mapping[str, Any]) -> str:
    """Return the `trtexec` command line that builds the same engine."""
    parts = ["trtexec", f"--onnx={engine['model']}", f"--saveEngine={engine['plan']}"]
    for profile in engine["profiles"]:
        for kind in ("min", "opt", "max"):
            shapes = ",".join(
                f"{name}:{'x'.join(map(str, sizes[kind]))}" for name, sizes in profile.items()
            )
            parts.append(f"--{kind}Shapes={shapes}")
    for flag, _, spelled in _FLAGS.values():
        if (flag in engine["flags"]) != (flag == "TF32"):
            parts.append(spelled)
    if engine["workspace_bytes"] is not None:
        parts.append(f"--memPoolSize=workspace:{engine['workspace_bytes'] >> 20}M")
    parts += [
        f"--builderOptimizationLevel={engine['optimization_level']}",
        f"--timingCacheFile={engine['timing_cache']}",
        "--profilingVerbosity=detailed",
        "--exportLayerInfo=layers.json",
    ]
    return " \\\n    ".join(parts)


def _range(name: str, text: str) -> tuple[int, int, int]:
    parts = text.split(":")
    if len(parts) == 3 and all(part.isdigit() for part in parts):
        low, usual, high = map(int, parts)
        if low <= usual <= high:
            return low, usual, high
    raise BadInput(f"{text!r} is no range", about=f"--option {name}", remedy="give min:opt:max")


def _truth(name: str, text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise BadInput(f"{text!r}", about=f"--option {name}", remedy="give true or false")
    return text.lower() == "true"


def _whole(name: str, text: str, low: int, high: int) -> int:
    if not text.isdigit() or not low <= int(text) <= high:
        raise BadInput(f"{text!r}", about=f"--option {name}", remedy=f"give {low} to {high}")
    return int(text)
