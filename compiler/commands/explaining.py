"""``explain``."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from trivium.compiler import files, report
from trivium.compiler.commands import console
from trivium.compiler.errors import BadInput, ConstraintUnmet
from trivium.compiler.explain.blame import Explanation
from trivium.compiler.explain.budget import parse_budget
from trivium.compiler.explain.prompt import explain_prompt
from trivium.compiler.explain.run import explain as run


def explain(arguments: argparse.Namespace) -> int:
    """Say what a recipe costs where; with a budget, write the recipe that keeps it."""
    if arguments.prompt is not None or arguments.prompt_ids is not None:
        return _explain_prompt(arguments)
    if not arguments.recipe or not arguments.data:
        raise BadInput(
            "there is nothing to explain",
            about="explain",
            remedy="give --recipe NAME and --data FILE, or --prompt TEXT for a language model",
        )
    limit = parse_budget(arguments.budget) if arguments.budget else None
    if arguments.out and limit is None:
        raise BadInput(
            "there is no recipe to write", about="-o", remedy="give --budget max-drop=1%"
        )
    if arguments.out and Path(arguments.out).suffix != ".toml":
        raise BadInput("must end in .toml", about=f"-o {arguments.out}")
    for file in filter(None, (arguments.out, arguments.html)):
        if not Path(file).parent.is_dir():
            raise BadInput("no such folder", about=str(Path(file).parent))
    with console.progress() as progress:
        result = run(
            arguments.path,
            arguments.recipe,
            arguments.data,
            metric=arguments.metric,
            shape=arguments.shape,
            calibration=arguments.calib,
            target=arguments.target,
            backend=arguments.backend,
            samples=arguments.samples,
            window=arguments.window,
            max_drop=limit,
            objective=arguments.objective,
            seed=arguments.seed,
            progress=progress,
        )
    document = result.to_json()
    if arguments.html:
        files.write_text(Path(arguments.html), report.explanation_html(document))
    text = (document["budget"] or {}).get("recipe")
    if arguments.out and text:
        files.write_text(Path(arguments.out), text)
    if arguments.json:
        console.print_json(document)
    else:
        _print(result, document, arguments.top)
        if arguments.out and text:
            print(f"recipe written to {arguments.out}")
    if limit is not None and not text:
        raise ConstraintUnmet(
            f"no mix of {', '.join(arguments.recipe)} is better than float within the limit",
            about="--budget",
            remedy="; ".join(document["budget"]["notes"]) or "allow a larger drop",
        )
    return 0


def _explain_prompt(arguments: argparse.Namespace) -> int:
    """Attention maps and gradients for a prompt; both where neither is asked for."""
    if arguments.html and not Path(arguments.html).parent.is_dir():
        raise BadInput("no such folder", about=str(Path(arguments.html).parent))
    # An accelerator would be slower for one prompt, and its plugins talk on standard error.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    both = not (arguments.attention or arguments.gradients)
    with console.progress() as progress:
        result = explain_prompt(
            arguments.path,
            arguments.prompt if arguments.prompt is not None else _ids(arguments.prompt_ids),
            attention=arguments.attention or both,
            gradients=arguments.gradients or both,
            progress=progress,
        )
    document = result.to_json()
    if arguments.html:
        files.write_text(Path(arguments.html), report.explanation_html(document))
    if arguments.json:
        console.print_json(document)
        return 0
    print(f"next: {result.predicted_text!r} (probability {result.probability:.3f})")
    if result.attribution is not None:
        rows = [
            (repr(token), f"{by_input:+.4f}", f"{integrated:+.4f}")
            for token, by_input, integrated in zip(
                result.tokens,
                result.attribution.gradient_x_input,
                result.attribution.integrated,
                strict=True,
            )
        ]
        console.print_table(("token", "gradient x input", "integrated"), rows)
        print(f"integrated gradients miss {result.attribution.missing:.1%} of the difference")
    rows = []
    for one in result.attention:
        for head, weights in enumerate(one.weights):
            most = int(weights[-1].argmax())
            rows.append((one.layer, str(head), f"{result.tokens[most]!r} {weights[-1][most]:.2f}"))
    if rows:
        console.print_table(("layer", "head", "the last token looks most at"), rows)
    return 0


def _ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise BadInput("not token ids", about=f"--prompt-ids {text}", remedy="5,17") from error


def _print(result: Explanation, document: dict[str, Any], top: int) -> None:
    for note in result.notes:
        print(f"note: {note}", file=sys.stderr)
    base = result.baseline
    print(f"{result.metric} of the source {base.value:.6g} on {base.samples}")
    for blame in document["recipes"]:
        print()
        noise = _db(blame["output_noise"])
        print(
            f"{blame['recipe']}: {result.metric} {blame['value']:.6g} "
            f"(drop {blame['drop']:.4g}), signal to noise at the output {noise}"
        )
        for note in blame["notes"]:
            print(f"note: {note}", file=sys.stderr)
        if len(blame["passes"]) > 1:
            steps = [
                (one["name"], _db(one["output_noise"]), f"{one['value']:.6g}", f"{one['drop']:.4g}")
                for one in blame["passes"]
            ]
            console.print_table(("after the pass", "output SNR", result.metric, "drop"), steps)
        layers = sorted(blame["layers"], key=lambda layer: -(layer["output_noise"] or 0.0))
        rows = [
            (
                layer["name"],
                layer["op_type"],
                _db(layer["output_noise"]),
                _db(layer["local_noise"]),
                _db(layer["cumulative_noise"]),
                f"{layer['drop']:.4g}",
                _worst(layer),
            )
            for layer in layers[:top]
        ]
        console.print_table(
            (
                "layer alone",
                "operator",
                "output SNR",
                "own SNR",
                "with all",
                "drop",
                "worst tensor",
            ),
            rows,
        )
        if len(layers) > top:
            print(f"and {len(layers) - top} layers that cost less (--top, --json)")
    if document["budget"]:
        _print_budget(document["budget"], result.metric)


def _worst(layer: dict[str, Any]) -> str:
    tensors = [tensor for tensor in layer["tensors"] if tensor["noise"]]
    worst = max(tensors, key=lambda tensor: float(tensor["noise"]), default=None)
    return "" if worst is None else f"{worst['name']} {worst['stored']} {_db(worst['noise'])}"


def _db(noise: float | None) -> str:
    from math import log10

    if noise is None:
        return "unknown"
    return "exact" if noise == 0.0 else f"{-10 * log10(noise):.1f} dB"


def _print_budget(budget: dict[str, Any], metric: str) -> None:
    print()
    print(
        f"mixes for {budget['target']} by {budget['backend']}, drop at most {budget['max_drop']:g}"
    )
    rows = []
    for point in [*budget["front"]]:
        layers = ", ".join(f"{count} {name}" for name, count in point["layers"].items())
        rows.append(
            (
                console.si(point["seconds"], "s"),
                console.size(point["weights_bytes"]),
                layers or "all float",
                f"{point['value']:.6g}",
                f"{point['drop']:.4g}",
                "chosen" if point["best"] else "",
            )
        )
    console.print_table(("predicted", "weights", "lossy layers", metric, "drop", ""), rows)
    for note in budget["notes"]:
        print(f"note: {note}", file=sys.stderr)
    verified = budget["verified"]
    if verified:
        print(
            f"verified: {metric} {verified['value']:.6g} on {verified['samples']}, "
            f"drop {verified['drop']:.4g}"
        )
