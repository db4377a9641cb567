"""Times every artifact of a folder on the device that it is for, beside PyTorch in the same run.

    python -m benchmarks.gpu FOLDER -o measured.json
    trivium compare MODEL --target nvidia-h100-sxm --backend xla --measured measured.json

FOLDER holds artifacts (or is one), such as those that ``trivium compile --backend xla`` made for a
GPU on a machine without one. Each is loaded (its export is then compiled for the GPU at hand),
verified against the samples that it carries, and timed; so are two peers: the same ONNX graph as
plain PyTorch calls (`torch_peer`), eager and under ``torch.compile``. Calls are taken in turn and
run from numpy to numpy, so the copies to the device and back are in all of them. An artifact whose
device is not here is left out, and so is a peer whose outputs differ.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from trivium.compiler import artifact as artifacts
from trivium.compiler import files, measurements, timing
from trivium.compiler.artifact import Artifact
from trivium.compiler.errors import TriviumError
from trivium.compiler.types import Workload
from trivium.compiler.verify import carried_feeds, verify

Outputs = Mapping[str, Any]
Call = Callable[[], Outputs]

AGREES = 1e-2
"""Error of a peer relative to the output's magnitude: tensor cores may round float32 to TF32."""


@dataclass(frozen=True)
class Peer:
    """Something to time beside an artifact, or why it could not be."""

    name: str
    call: Call | None
    note: str = ""


def main() -> int:
    """Time what is asked for and write the file; 1 if nothing could be timed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("folder", type=Path, help="an artifact, or a folder of them")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE.json")
    parser.add_argument("--calls", type=int, default=50, help="timed calls of each (default 50)")
    parser.add_argument("--no-peers", action="store_true", help="leave PyTorch out")
    given = parser.parse_args()
    rows, left_out = [], []
    for path in _artifacts(given.folder):
        try:
            row = measure(Artifact.open(path), given.calls, peers=not given.no_peers)
        except TriviumError as error:
            left_out.append({"artifact": path.name, "reason": str(error)})
            print(f"{path.name}: left out: {error}", file=sys.stderr)
            continue
        rows.append(row)
        print(_line(path.name, row))
    document = {"schema": measurements.SCHEMA, "rows": rows, "left_out": left_out}
    files.write_text(given.output, json.dumps(document, indent=1) + "\n")
    return 0 if rows else 1


def _artifacts(folder: Path) -> list[Path]:
    if artifacts.is_artifact(folder):
        return [folder]
    return sorted(path for path in folder.iterdir() if artifacts.is_artifact(path))


def measure(artifact: Artifact, calls: int = 50, *, peers: bool = True) -> dict[str, Any]:
    """Verify and time one artifact and its peers; return a row of the file.

    Raises:
        TriviumError: It does not load or verify, or what runs here is not its target.
    """
    executable = artifact.load()
    if not executable.measures_target:
        raise TriviumError(
            f"it would run as {executable.where}, which says nothing of its target",
            about=str(artifact.path),
        )
    verdict = verify(artifact)
    if verdict.status != "passed":
        raise TriviumError(f"not verified: {verdict.reason}", about=str(artifact.path))
    feed = carried_feeds(artifact)[0]
    device = _device(artifact)
    beside = _peers(artifact, feed, device) if peers else []
    own: Outputs = executable.run(feed)
    notes, timed = [], []
    for peer in beside:
        note = peer.note or _disagreement(own, peer)
        if note:
            notes.append(f"{peer.name}: {note}")
        else:
            timed.append(peer)
    first, *others = _in_turn(
        [lambda: executable.run(feed), *(p.call for p in timed if p.call)], calls
    )
    return {
        **measurements.described(artifact),
        **first.to_json(),
        "where": executable.where,
        "device": _device_name(device),
        "date": datetime.now(UTC).date().isoformat(),
        "verification": {
            "status": verdict.status,
            "max_rel_error": verdict.accuracy.max_rel_error if verdict.accuracy else None,
        },
        "peers": [
            {"name": peer.name, **one.to_json(), "ratio": first.median_s / one.median_s}
            for peer, one in zip(timed, others, strict=True)
        ],
        "notes": notes,
    }


def _in_turn(each: list[Call], calls: int) -> list[timing.Timing]:
    """Time several calls alternately, after three of each, so that drift hits all."""
    seconds: list[list[float]] = [[] for _ in each]
    for index in range(calls + 3):
        for call, kept in zip(each, seconds, strict=True):
            begin = time.perf_counter()
            call()
            if index >= 3:
                kept.append(time.perf_counter() - begin)
    return [timing.summarize(one) for one in seconds]


def _device(artifact: Artifact) -> str:
    """PyTorch's name of the device that an artifact runs on."""
    details = artifact.manifest["details"].get("xla", {})
    return "cuda" if details.get("device", {}).get("platform") == "cuda" else "cpu"


def _device_name(device: str) -> str:
    if device == "cpu":
        model = platform.processor() or platform.machine()
        return f"{model}, {len(os.sched_getaffinity(0))} cores"
    import torch

    return str(torch.cuda.get_device_name())


def _peers(artifact: Artifact, feed: Mapping[str, Any], device: str) -> list[Peer]:
    """The artifact's graph in PyTorch, eager and compiled."""
    names = ("torch eager", "torch.compile")
    try:
        import torch

        from benchmarks.torch_peer import peer_of
        from trivium.backends.xla.backend import MODEL
    except ImportError as error:
        return [Peer(name, None, f"not here ({error})") for name in names]
    if not (artifact.path / MODEL).is_file() or len(artifact.programs) != 1:
        return [Peer(name, None, "the artifact holds no single graph") for name in names]
    if device == "cpu":
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    program = artifact.programs[0]
    workload = Workload(dims=artifact.manifest["workload"]["dims"])
    try:
        module, weights = peer_of(artifact.path, workload, program.inputs, device)
    except (TriviumError, RuntimeError, TypeError, ValueError, KeyError) as error:
        return [Peer(name, None, str(error).splitlines()[0]) for name in names]
    outputs = [info.name for info in program.outputs]

    def calling(function: Callable[..., Any]) -> Call:
        def call() -> Outputs:
            given = [torch.from_numpy(feed[info.name]).to(device) for info in program.inputs]
            with torch.inference_mode():
                results = function(weights, *given)
            return {n: r.cpu().numpy() for n, r in zip(outputs, results, strict=True)}

        return call

    compiled = torch.compile(module, mode="max-autotune" if device == "cuda" else "default")
    return [Peer(names[0], calling(module)), Peer(names[1], calling(compiled))]


def _disagreement(own: Outputs, peer: Peer) -> str:
    """Why a peer is not to be timed: it fails, or it computes something else."""
    assert peer.call is not None
    try:
        theirs = peer.call()
    except Exception as error:  # whatever a compiler raises
        return f"failed: {str(error).strip().splitlines()[0][:200]}"
    for name, ours in own.items():
        want, have = np.asarray(ours, np.float64), np.asarray(theirs[name], np.float64)
        if want.shape != have.shape:
            return f"its {name!r} has the shape {have.shape}, not {want.shape}"
        scale = max(float(np.abs(want).max(initial=0.0)), 1e-30)
        error_ = float(np.abs(want - have).max(initial=0.0)) / scale
        if not error_ <= AGREES:
            return f"its {name!r} is off by {error_:.2g}"
    return ""


def _line(name: str, row: Mapping[str, Any]) -> str:
    parts = [f"{name}: {row['latency_s'] * 1e3:.3f} ms"]
    parts += [f"{p['name']} {p['latency_s'] * 1e3:.3f} ms ({p['ratio']:.2f})" for p in row["peers"]]
    return ", ".join([*parts, *row["notes"]])


if __name__ == "__main__":
    sys.exit(main())
