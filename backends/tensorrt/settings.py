"""What an engine is built with: flags, memory, and the ranges of shapes that it serves.

All of it goes into ``engine.json``, which the scripts in the artifact read, and into the `trtexec`
command line that does the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trivium.compiler.errors import BadInput
from trivium.compiler.options import Option, Truth, Whole
from trivium.compiler.samples import bound_shape
from trivium.compiler.types import TensorInfo, Workload

MODEL, PLAN, TIMING_CACHE, SETTINGS = "model.onnx", "model.plan", "timing.cache", "engine.json"

_FLAGS = {
    "tf32": ("TF32", True, "--noTF32"),
    "sparse_weights": ("SPARSE_WEIGHTS", False, "--sparsity=enable"),
    "version_compatible": ("VERSION_COMPATIBLE", False, "--versionCompatible"),
    "weight_streaming": ("WEIGHT_STREAMING", False, "--allowWeightStreaming"),
}
"""Option -> (builder flag, default, what `trtexec` calls it: for TF32 its absence)."""

PROFILE = "profile."
"""How the options begin that give the sizes of a symbolic dimension."""


@dataclass(frozen=True)
class Range:
    """The least, the usual and the largest size of a dimension."""

    wanted: str = "min:opt:max"

    def read(self, text: str) -> tuple[int, int, int]:
        low, usual, high = map(int, text.split(":"))
        if not 0 <= low <= usual <= high:
            raise ValueError(text)
        return low, usual, high


OPTIONS = (
    *(
        Option(name, Truth(), f"the builder's flag {flag}", default)
        for name, (flag, default, _) in _FLAGS.items()
    ),
    Option("workspace_mib", Whole(1, 1 << 20), "memory that a kernel may use for itself"),
    Option("optimization_level", Whole(0, 5), "how long the builder searches", 3),
    Option(PROFILE, Range(), "sizes of a symbolic dimension"),
)


def settings(
    chosen: Mapping[str, Any], inputs: Sequence[TensorInfo], workload: Workload
) -> dict[str, Any]:
    """Make the content of ``engine.json`` from the values of the backend's options.

    Raises:
        BadInput: A profile of a dimension that is not symbolic.
    """
    profiles = {
        name.removeprefix(PROFILE): sizes
        for name, sizes in chosen.items()
        if name.startswith(PROFILE)
    }
    dimensions = {dim for info in inputs for dim in info.shape if isinstance(dim, str)}
    unknown = sorted(set(profiles) - dimensions)
    if unknown:
        raise BadInput(
            "no such dimension is symbolic",
            about=f"--option {PROFILE}{unknown[0]}",
            remedy=f"symbolic are: {', '.join(sorted(dimensions)) or 'none'}",
        )
    workspace = chosen["workspace_mib"]
    return {
        "model": MODEL,
        "plan": PLAN,
        "timing_cache": TIMING_CACHE,
        "flags": [flag for name, (flag, _, _) in _FLAGS.items() if chosen[name]],
        "workspace_bytes": workspace << 20 if workspace is not None else None,
        "optimization_level": chosen["optimization_level"],
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
