"""``compile`` and ``optimize``."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trivium.compiler import build, model, prepare, verify
from trivium.compiler import targets as target_names
from trivium.compiler.commands import console
from trivium.compiler.errors import BadInput
from trivium.compiler.generator import Generator
from trivium.compiler.rows import unpredicted


def compile(arguments: argparse.Namespace) -> int:
    """Compile a model; print what came of it."""
    if arguments.dry_run:
        return _dry_run(arguments)
    with console.progress() as progress:
        artifact = build.compile(
            arguments.model,
            arguments.target,
            out=arguments.out,
            backend=arguments.backend,
            recipe=arguments.recipe,
            shape=arguments.shape,
            calibration=arguments.calib,
            max_error=arguments.max_error,
            seed=arguments.seed,
            options=_options(arguments.option),
            generator=arguments.generator,
            context=arguments.context,
            prefill=arguments.prefill,
            guesses=arguments.guesses,
            use_cache=not arguments.no_cache,
            progress=progress,
        )
    summary = build.summary(artifact)
    if arguments.json:
        console.print_json(summary)
        return 0
    for note in summary["notes"]:
        print(f"note: {note}", file=sys.stderr)
    console.print_facts(
        {
            "artifact": summary["artifact"],
            "target": f"{summary['target']} by {summary['backend']}, recipe {summary['recipe']}",
            "predicted": _predicted(summary["estimate"]),
            "memory": _memory(summary["memory"]),
            "generator": _generator(artifact.generator),
            "verification": _verified(summary["verification"]),
            "took": f"{summary['seconds']:.2f} s",
        }
    )
    return 0


def _dry_run(arguments: argparse.Namespace) -> int:
    result = build.dry_run(
        arguments.model,
        arguments.target,
        backend=arguments.backend,
        recipe=arguments.recipe,
        shape=arguments.shape,
        calibration=arguments.calib,
        seed=arguments.seed,
        options=_options(arguments.option),
        generator=arguments.generator,
        context=arguments.context,
        prefill=arguments.prefill,
        guesses=arguments.guesses,
    )
    estimate = build.estimate_json(result.estimate)
    if arguments.json:
        console.print_json({**asdict(result), "estimate": estimate, "artifact": None})
        return 3 if result.refusals else 0
    rows = [
        (row.name, "changed" if row.modified else "", "; ".join(row.declined[:3]))
        for row in result.applied
    ]
    console.print_table(("pass", "", "left alone"), rows)
    for refusal in result.refusals:
        print(f"refused: {refusal}")
    if estimate is not None:
        print(f"predicted: {_predicted(estimate)}")
    return 3 if result.refusals else 0


def _options(items: list[str]) -> dict[str, str]:
    pairs = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise BadInput("not of the form KEY=VALUE", about=f"--option {item}")
        pairs[key] = value
    return pairs


def _predicted(estimate: dict[str, Any]) -> str | None:
    if not estimate or estimate.get("seconds") is None:
        why = unpredicted(estimate.get("notes") or ()) if estimate else []
        return f"nothing ({why[0].removeprefix('not predicted: ')})" if why else None
    text = console.si(estimate["seconds"], "s")
    if estimate["lo"] is not None:
        text += f" ({console.si(estimate['lo'], 's')} to {console.si(estimate['hi'], 's')}, 80%)"
    return f"{text}, {estimate['bound']} bound"


def _generator(generator: Generator | None) -> str | None:
    if generator is None:
        return None
    each = console.size(generator.bytes_per_token)
    programs = ", ".join(role.program for role in generator.programs)
    return f"up to {generator.context} tokens, {each} of cache a token ({programs})"


def _memory(memory: dict[str, Any]) -> str:
    rows = ((name.removesuffix("_bytes"), value) for name, value in memory.items())
    return ", ".join(f"{name} {console.size(value)}" for name, value in rows if value is not None)


def _verified(verification: dict[str, Any]) -> str:
    if verification["status"] == "not-run":
        return f"not run: {verification['reason']}"
    where = verification["compared"].get("where", "")
    error = verification["max_rel_error"]
    found = f"{verification['status']}, relative error {error:.2g} against the source ({where})"
    return found + verify.caveat(verification["compared"])


def optimize(arguments: argparse.Namespace) -> int:
    """Run passes on a model and write it as ONNX."""
    out = Path(arguments.out)
    if out.suffix != ".onnx":
        raise BadInput("must end in .onnx", about=f"-o {out}")
    if not out.parent.is_dir():
        raise BadInput("no such folder", about=str(out.parent))
    source = model.load(arguments.model)
    target = target_names.find(arguments.target) if arguments.target else None
    optimized, applied = prepare.optimize(
        source,
        arguments.recipe,
        shape=arguments.shape,
        calibration=arguments.calib or None,
        target=target,
        seed=arguments.seed,
    )
    files = model.save_whole(optimized, out)
    if arguments.json:
        rows = [asdict(row) for row in applied]
        console.print_json({"files": [str(file) for file in files], "applied": rows})
        return 0
    for row in applied:
        for reason in row.declined:
            console.warn(f"{row.name} left alone {reason}")
    print(" ".join(str(file) for file in files))
    return 0
