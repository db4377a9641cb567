"""``tune``."""

from __future__ import annotations

import argparse
import importlib.util
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import trivium
from trivium.compiler import files, model
from trivium.compiler import targets as target_names
from trivium.compiler.commands import console
from trivium.compiler.errors import BadInput

_OPTIONS = (
    "steps", "epochs", "batch", "rate", "optimizer", "schedule", "warmup", "clip", "alpha",
    "temperature", "match", "hidden_weight", "attention_weight", "gradual", "validation",
    "evaluations", "patience", "window", "seed",
)  # fmt: skip


def tune(arguments: argparse.Namespace) -> int:
    """Run a recipe on a model, train back what it cost, and write the result as ONNX."""
    # Devices that jax finds and cannot use fill the screen; whoever has one sets this.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    out = Path(arguments.out)
    if out.suffix != ".onnx":
        raise BadInput("must end in .onnx", about=f"-o {out}")
    if not out.parent.is_dir():
        raise BadInput("no such folder", about=str(out.parent))
    given = {name: getattr(arguments, name) for name in _OPTIONS}
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    for name in ("hidden", "attention", "freeze", "augment"):
        options[name] = tuple(getattr(arguments, name))
    if arguments.loss is not None:
        options["loss"] = _function(arguments.loss)
    checkpoint = Path(arguments.checkpoint or f"{out}.tuning")
    with console.bar() as watch:
        tuned = trivium.tune(
            arguments.model,
            arguments.data,
            recipe=arguments.recipe,
            teacher=arguments.teacher,
            checkpoint=checkpoint,
            shape=arguments.shape,
            target=target_names.find(arguments.target) if arguments.target else None,
            scales=not arguments.freeze_scales,
            refit=arguments.refit,
            watch=watch,
            **options,
        )
    written = model.save_whole(tuned.model, out)
    tuned.forget()
    if arguments.json:
        console.print_json(_document(tuned, written))
        return 0
    for row in tuned.applied:
        for reason in row.declined:
            console.warn(f"{row.name} left alone {reason}")
    if arguments.refit and not tuned.refitted:
        console.warn("--refit fitted nothing: no product has float weights and a teacher's like it")
    if tuned.stopped == "diverged":
        console.warn(f"it diverged: {tuned.reason}; this is the best state before that")
    improved = f" ({tuned.measure} {tuned.before.score:.4g} -> {tuned.after.score:.4g})"
    console.print_facts(
        {
            "model": " ".join(str(file) for file in written),
            "recipe": tuned.recipe,
            "held-out loss": f"{tuned.before.loss:.4g} -> {tuned.after.loss:.4g}"
            f"{improved if tuned.measure else ''}",
            "best": f"update {tuned.after.step} of {tuned.history[-1].step}",
            "refitted": f"{tuned.refitted} products" if tuned.refitted else "",
            "stopped": tuned.reason,
            "resumed": f"from update {tuned.resumed}" if tuned.resumed else "",
            "zeros": f"{tuned.sparsity:.1%} of the products' weights" if tuned.sparsity else "",
            "matched": ", ".join(f"{name} by {kind}" for name, kind in tuned.matched.items()),
        }
    )
    return 0


def _function(text: str) -> Any:
    """A loss by name, or ``FILE.py:FUNCTION``, which is run."""
    path, colon, name = text.rpartition(":")
    if not colon or not path.endswith(".py"):
        return text
    files.require_file(Path(path))
    spec = importlib.util.spec_from_file_location("trivium_loss", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's file raises
        raise BadInput(f"{type(error).__name__}: {error}", about=path) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise BadInput(f"holds no function {name!r}", about=path)
    return function


def _document(tuned: Any, written: list[Path]) -> dict[str, Any]:
    return {
        "files": [str(file) for file in written],
        "recipe": tuned.recipe,
        "measure": tuned.measure or None,
        "before": _look(tuned.before),
        "after": _look(tuned.after),
        "updates": tuned.updates,
        "refitted": tuned.refitted,
        "stopped": tuned.stopped,
        "reason": tuned.reason,
        "resumed": tuned.resumed,
        "sparsity": tuned.sparsity,
        "matched": dict(tuned.matched),
        "history": [_look(look) for look in tuned.history],
        "applied": [asdict(row) for row in tuned.applied],
    }


def _look(look: Any) -> dict[str, Any]:
    """A look at the held-out samples; what is no number is null."""
    facts = {"step": look.step, "loss": look.loss, "score": look.score, "train": look.train_loss}
    return {k: v if v is not None and v - v == 0 else None for k, v in facts.items()}
