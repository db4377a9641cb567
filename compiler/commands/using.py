"""``run``, ``bench``, ``eval``, ``inspect`` and ``verify``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from trivium.compiler import evaluate, files, model, samples, track
from trivium.compiler import verify as verification
from trivium.compiler.artifact import Artifact, is_artifact
from trivium.compiler.commands import console
from trivium.compiler.errors import AccuracyFailed, ToolchainMissing
from trivium.compiler.generation.measuring import time_decoder
from trivium.compiler.timing import time_calls


def run(arguments: argparse.Namespace) -> int:
    """Run an artifact on the user's inputs, or on those that it carries."""
    import numpy as np

    artifact = Artifact.open(arguments.artifact)
    executable = artifact.load()
    if arguments.input:
        feeds = samples.read_npz(arguments.input, executable.inputs)
    else:
        feeds = verification.carried_feeds(artifact)[:1]
    results = [executable.run(feed) for feed in feeds]
    outputs = {
        name: np.concatenate([np.atleast_1d(result[name]) for result in results])
        for name in results[0]
    }
    if arguments.output:
        _write_npz(Path(arguments.output), outputs)
    rows = {
        name: {"shape": list(array.shape), "dtype": str(array.dtype)}
        for name, array in outputs.items()
    }
    if arguments.json:
        console.print_json({"outputs": rows, "where": executable.where, "file": arguments.output})
        return 0
    for name, array in outputs.items():
        flat = array.reshape(-1)
        shown = " ".join(f"{x:.6g}" if array.dtype.kind == "f" else str(x) for x in flat[:8])
        print(f"{name} {array.dtype}{list(array.shape)}: {shown}{' ...' if flat.size > 8 else ''}")
    return 0


def _write_npz(path: Path, arrays: dict[str, Any]) -> None:
    import numpy as np

    with files.replacing(path) as folder, (folder / path.name).open("wb") as stream:
        np.savez(stream, **arrays)


def bench(arguments: argparse.Namespace) -> int:
    """Time an artifact where it really runs."""
    artifact = Artifact.open(arguments.artifact)
    executable = artifact.load()
    extra: dict[str, Any] = {}
    if artifact.generator is None:
        feed = verification.carried_feeds(artifact)[0]
        timing = time_calls(
            lambda: executable.run(feed), budget_s=arguments.seconds, least=5, most=arguments.runs
        )
    else:
        decoder = executable.generator()  # type: ignore[attr-defined]
        length, reading, timing = time_decoder(
            decoder, budget_s=arguments.seconds, most=arguments.runs
        )
        extra = {
            "tokens": length,
            "prefill_tokens_per_s": (length - 1) / reading.median_s,
            "decode_tokens_per_s": 1 / timing.median_s,
        }
    target = artifact.manifest["target"]
    predicted = (artifact.manifest["estimate"] or {}).get("seconds")
    document = {
        "target": target,
        "where": executable.where,
        "measures_target": executable.measures_target,
        **timing.to_json(),
        "predicted_s": predicted,
        **extra,
    }
    if arguments.track:
        _track(arguments.track, artifact, timing.median_s, executable.measures_target)
    if arguments.json:
        console.print_json(document)
        return 0
    if not executable.measures_target:
        console.warn(f"this is not {target}: timed {executable.where}")
    interval = " to ".join(console.si(bound, "s") for bound in timing.ci_s)
    console.print_facts(
        {
            "median": f"{console.si(timing.median_s, 's')} (95%: {interval}, {timing.calls} runs)",
            "where": executable.where,
            "predicted": console.si(predicted, "s") if predicted else None,
            **{name.replace("_", " "): f"{value:.4g}" for name, value in extra.items()},
        }
    )
    return 0


def _track(path: str, artifact: Artifact, seconds: float, measures: bool) -> None:
    """Add a run to the user's record, if it says anything of the prediction."""
    run = track.of_bench(artifact.manifest, seconds) if measures else None
    if run is None:
        console.warn(f"not added to {path}: not run on its target, or never predicted")
    else:
        track.add(Path(path), run)


def eval(arguments: argparse.Namespace) -> int:
    """Measure quality on data."""
    with console.counting(f"evaluating {Path(arguments.path).name}") as count:
        result = evaluate.evaluate(
            arguments.path,
            arguments.data,
            metric=arguments.metric,
            window=arguments.window,
            against=arguments.against,
            count=count,
        )
    if arguments.json:
        console.print_json(
            {
                "metric": result.metric,
                "value": result.value,
                "samples": result.samples,
                "against": arguments.against,
            }
        )
    else:
        against = f", against {arguments.against}" if arguments.against else ""
        unit = "tokens" if result.metric == "perplexity" else "samples"
        print(f"{result.metric} {result.value:.6g} on {result.samples} {unit}{against}")
    return 0


def inspect(arguments: argparse.Namespace) -> int:
    """Say what a model or an artifact is."""
    path = Path(arguments.path)
    if is_artifact(path):
        manifest = dict(Artifact.open(path).manifest)
        if arguments.json:
            console.print_json(manifest)
            return 0
        console.print_facts(
            {
                "model": f"{manifest['model']['name']} {manifest['model']['sha256'][:12]}",
                "target": f"{manifest['target']} by {manifest['backend']}",
                "recipe": manifest["recipe"]["name"],
                "toolchain": ", ".join(f"{k} {v}" for k, v in manifest["toolchain"].items()),
                "inputs": _signature(manifest["inputs"]),
                "outputs": _signature(manifest["outputs"]),
                "verification": manifest["verification"]["status"],
                "files": ", ".join(manifest["files"]),
                "notes": "; ".join(manifest["notes"]),
            }
        )
        return 0
    facts = model.describe(model.load(path))
    if arguments.json:
        console.print_json(facts)
        return 0
    operators = ", ".join(f"{name} {count}" for name, count in facts["operators"].items())
    console.print_facts(
        {
            "opset": ", ".join(f"{d or 'ai.onnx'} {v}" for d, v in facts["opsets"].items()),
            "inputs": _signature(facts["inputs"]),
            "outputs": _signature(facts["outputs"]),
            "parameters": f"{facts['parameters']:,} in {console.size(facts['weights_bytes'])}",
            "operators": operators,
        }
    )
    return 0


def _signature(infos: list[dict[str, Any]]) -> str:
    return ", ".join(f"{i['name']} {i['dtype']}{list(i['shape'])}" for i in infos)


def verify(arguments: argparse.Namespace) -> int:
    """Compare an artifact with its reference again; the exit code is the answer."""
    artifact = Artifact.open(arguments.artifact, afresh=True)
    result = verification.verify(artifact, max_error=arguments.max_error)
    if arguments.json:
        console.print_json({"artifact": str(artifact.path), "verification": result.to_json()})
    if result.status == "not-run":
        raise ToolchainMissing(f"not verified: {result.reason}", about=str(artifact.path))
    if result.status == "failed":
        raise AccuracyFailed(result.reason, about=str(artifact.path))
    if not arguments.json:
        error = result.accuracy.max_rel_error if result.accuracy else 0.0
        compared = result.compared or {}
        where, caveat = compared.get("where", ""), verification.caveat(compared)
        print(f"passed: relative error {error:.2g} against the source ({where}){caveat}")
    return 0
