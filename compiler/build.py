"""One compile, from a model to an artifact: load, normal form, recipe, legalize, build, verify."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trivium
from trivium.compiler import cache, checksums, parts, reference, samples, steps, verify
from trivium.compiler import model as models
from trivium.compiler.artifact import Artifact, staged, write_manifest
from trivium.compiler.backend import BuildRequest
from trivium.compiler.errors import AccuracyFailed, ToolchainMissing, blaming
from trivium.compiler.generation import compiling as generating
from trivium.compiler.job import Generating, Job, resolve
from trivium.compiler.prepare import (
    Prepared,
    Progress,
    refused,
    silent,
)
from trivium.compiler.recipe import Applied, Recipe
from trivium.compiler.steps import Piece, Ready
from trivium.compiler.types import Built, Estimate, Target

if TYPE_CHECKING:
    import onnx_ir as ir

    from trivium.compiler.backend import Tensors


def compile(
    source: str | os.PathLike[str],
    target: str | Target = "cpu",
    *,
    out: str | os.PathLike[str] | None = None,
    backend: str | None = None,
    recipe: str | Recipe = "none",
    shape: Sequence[str] = (),
    calibration: str | os.PathLike[str] | Iterable[Tensors] | None = None,
    max_error: float | None = None,
    seed: int = 0,
    options: Mapping[str, str] | None = None,
    generator: bool | None = None,
    context: int | None = None,
    prefill: Sequence[int] = (),
    guesses: int = 0,
    use_cache: bool = True,
    progress: Progress = silent,
) -> Artifact:
    """Compile a model for a target and verify the result.

    Args:
        source: An ``.onnx`` file or a checkpoint folder.
        target: A target or its name.
        out: The artifact's folder; by default ``<model>.<target>`` in the working directory.
        backend: One of the target's backends, instead of its default.
        recipe: The passes to run between normal form and the backend.
        shape: ``NAME=1x128`` for an input, ``DIM=128`` for a symbolic dimension, ``DIM=16,64`` for
            one that takes several sizes, ``DIM=?`` for one that stays symbolic.
        calibration: Representative inputs: an ``.npz`` file, a folder of them, or feeds.
        max_error: Largest allowed error relative to the source model's outputs.
        seed: Of the inputs that are drawn when no calibration is given.
        options: Options of the backend.
        generator: Whether to give a decoder caches, so that it generates token by token; by
            default those of checkpoint folders whose sequence is not bound by ``shape``.
        context: How many tokens a generator's sequences may have.
        prefill: How many new tokens its prefill programs take, where an engine needs it fixed.
        guesses: How many guessed tokens a program checks in one call, where an engine needs it
            fixed; 0 for none.
        use_cache: Whether an equal earlier compile may be reused.
        progress: Called with the name of each stage as it begins.

    Raises:
        TriviumError: Its subclass and exit code say what kind; nothing is left half-written.
    """
    job = resolve(
        source,
        target,
        backend=backend,
        recipe=recipe,
        shape=shape,
        calibration=calibration,
        max_error=max_error,
        seed=seed,
        options=options,
        generating=Generating(generator, context, tuple(sorted(set(prefill))), guesses),
        progress=progress,
    )
    place = Path(out) if out is not None else Path(default_name(job.source, job.target))
    if use_cache and (found := cache.fetch(job.key, place)) is not None:
        progress("reused an earlier compile")
        return found
    unavailable = job.backend.available()
    if unavailable is not None:
        raise ToolchainMissing(unavailable, about=f"backend {job.backend.name}")
    with staged(place) as folder:
        _compile_into(folder, job, progress)
    artifact = Artifact.open(place, checked=False)
    checksums.note(place, artifact.manifest["files"])
    if use_cache:
        cache.store(job.key, artifact)
    return artifact


def default_name(source: Path, target: Target) -> str:
    """The folder that an artifact gets when the user names none."""
    return f"{source.stem}.{target.name.replace(':', '-')}"


def _compile_into(folder: Path, job: Job, progress: Progress) -> None:
    started = time.perf_counter()
    model = job.model
    generating.check_tokenizer(job)
    progress("running the reference")
    random = reference.draws_random_numbers(model)
    feeds, source, no_reference = job.run_reference()

    progress(f"recipe {job.recipe.name}")
    applied = steps.optimize(job, feeds)
    tolerance = verify.tolerance_for(model)
    inputs, outputs = models.signature(model)
    signature = {
        "inputs": [asdict(info) for info in inputs],
        "outputs": [asdict(info) for info in outputs],
    }
    optimized = source
    if job.recipe.preserves == "lossy" and source is not None:
        optimized = reference.run_model(model, feeds)

    expected = optimized.outputs if optimized is not None and not random else ()
    ready = steps.ready(job, feeds, applied, progress)
    whole = _whole(ready, model)
    if ready.refusals:
        raise refused(whole, job.target)
    built = _build(folder, job, ready, Samples(feeds, expected), progress)
    (folder / "recipe.lock.toml").write_text(job.lock(), encoding="utf-8")
    manifest = _manifest(job, whole, built, ready)
    generator = built.generator or ready.generator
    if generator is not None:
        generating.carry_files(job.source, folder)
        manifest["generator"] = generator.to_json()
        if ready.inserted:
            # It runs on what the source runs on; its caches are its own affair.
            manifest |= signature

    progress("verifying")
    if source is None or optimized is None:
        verification = verify.Verification("not-run", no_reference)
    elif random:
        verification = verify.Verification("not-run", "the model draws random numbers")
    else:
        if ready.generator is not None and ready.inserted:
            source, optimized = generating.logits_of(ready.generator, feeds, source, optimized)
        verification = _verify(folder, job, manifest, feeds, source, optimized, tolerance)
    if verification.status == "failed":
        raise AccuracyFailed(
            verification.reason,
            about=f"{job.source.name} on {job.target.name}",
            remedy="choose a gentler recipe, or give representative data with --calib",
        )
    manifest["verification"] = verification.to_json()
    manifest["seconds"] = round(time.perf_counter() - started, 3)
    write_manifest(folder, manifest)


@dataclass(frozen=True)
class Samples:
    """What a program is built and verified on; nothing is expected where no reference ran."""

    feeds: Sequence[Tensors]
    expected: Sequence[Tensors]


def _whole(ready: Ready, model: ir.Model) -> Prepared:
    """The pieces as one, with the inputs and outputs of the model that they are of."""
    first = ready.pieces[0].prepared
    if not ready.in_parts:
        return first
    inputs, outputs = models.signature(model)
    return replace(
        first, applied=ready.legalized, refusals=ready.refusals, inputs=inputs, outputs=outputs
    )


def _build(folder: Path, job: Job, ready: Ready, samples: Samples, progress: Progress) -> Built:
    """Build each piece, those of a model in parts in folders of their own."""
    progress(f"building with {job.backend.name}")
    if not ready.in_parts:
        return _build_piece(folder, job, ready.pieces[0], samples)
    built = {}
    for piece in ready.pieces:
        own = folder / piece.name
        own.mkdir()
        known = parts.samples_of(piece.prepared, samples.feeds, samples.expected)
        built[piece.name] = _build_piece(own, job, piece, Samples(*known))
    last = ready.pieces[-1]
    if built[last.name].generator is None:
        built[last.name] = replace(built[last.name], generator=last.generator)
    return parts.joined(built, {piece.name: piece.signature for piece in ready.pieces})


def _build_piece(folder: Path, job: Job, piece: Piece, samples: Samples) -> Built:
    request = BuildRequest(
        job.target,
        piece.prepared.workload,
        folder,
        samples=samples.feeds,
        expected=samples.expected,
        options=job.options,
        estimate=piece.estimate,
        generator=piece.generator,
    )
    with blaming(f"backend {job.backend.name}"):
        return job.backend.build(piece.prepared.model, request)


def _manifest(job: Job, prepared: Prepared, built: Built, ready: Ready) -> dict[str, Any]:
    """What is known before the verification; `write_manifest` adds schema and checksums."""
    return {
        "trivium": trivium.__version__,
        "key": job.key,
        "model": {"name": job.source.name, "sha256": job.sha256},
        "target": job.target.name,
        "backend": job.backend.name,
        "recipe": {
            "name": job.recipe.name,
            "preserves": job.recipe.preserves,
            "lock": "recipe.lock.toml",
            "applied": [asdict(row) for row in (*ready.applied, *ready.legalized)],
        },
        "toolchain": job.backend.toolchain(),
        "workload": {
            "dims": dict(prepared.workload.dims),
            "shapes": dict(prepared.workload.shapes),
            "buckets": dict(prepared.workload.buckets),
            "symbolic": list(prepared.workload.symbolic),
        },
        "inputs": [asdict(info) for info in prepared.inputs],
        "outputs": [asdict(info) for info in prepared.outputs],
        "programs": [asdict(program) for program in built.programs],
        "weights": built.weights,
        "memory": dict(built.memory),
        "details": dict(built.details),
        "estimate": estimate_json(ready.estimate),
        "parts": list(built.parts),
        "generator": None,
        "notes": [*models.notes_of(job.model), *built.notes],
    }


def _verify(
    folder: Path,
    job: Job,
    manifest: dict[str, Any],
    feeds: Sequence[Mapping[str, Any]],
    source: reference.Reference,
    optimized: reference.Reference,
    tolerance: verify.Tolerance,
) -> verify.Verification:
    compared = {
        "samples": len(feeds),
        "data": "the calibration file's first samples" if job.calibration else f"seed {job.seed}",
        "data_sha256": samples.digest(feeds),
        "reference": source.engine,
    }
    verify.write_samples(folder, verify.INPUTS, feeds)
    verify.write_samples(folder, verify.SOURCE, source.outputs)
    if optimized is not source:
        verify.write_samples(folder, verify.OPTIMIZED, optimized.outputs)
    # The artifact is loaded as anyone will load it: from its folder, through its manifest.
    pending = {
        **manifest,
        "verification": {"status": "not-run", "reason": "", "compared": compared},
    }
    write_manifest(folder, pending)
    try:
        with blaming(f"backend {job.backend.name}"):
            artifact = Artifact.open(folder, checked=False)
            executable = artifact.load_to_verify()
            actual = verify.outputs_of(artifact, executable, feeds)
    except ToolchainMissing as error:
        return verify.Verification("not-run", str(error), compared=compared)
    return verify.judge(
        source.outputs,
        optimized.outputs,
        actual,
        tolerance=tolerance,
        lossy=job.recipe.preserves == "lossy",
        max_error=job.max_error,
        compared={**compared, "where": executable.where},
    )


def estimate_json(estimate: Estimate | None) -> dict[str, Any] | None:
    """An estimate as the manifest and ``--json`` show it."""
    if estimate is None:
        return None
    table = asdict(estimate)
    table["by_op"] = [
        {
            "name": op["name"],
            "op_type": op["op_type"],
            "seconds": op["seconds"],
            "bound": op["bound"],
        }
        for op in table["by_op"]
    ]
    return table


def summary(artifact: Artifact) -> dict[str, Any]:
    """What ``trivium compile --json`` prints."""
    manifest = artifact.manifest
    estimate = {k: v for k, v in (manifest["estimate"] or {}).items() if k != "by_op"}
    return {
        "artifact": str(artifact.path),
        "target": manifest["target"],
        "backend": manifest["backend"],
        "recipe": manifest["recipe"]["name"],
        "seconds": manifest["seconds"],
        "estimate": estimate,
        "memory": manifest["memory"],
        "verification": manifest["verification"],
        "notes": manifest["notes"],
    }


@dataclass(frozen=True)
class DryRun:
    """What ``--dry-run`` shows: everything up to the backend's build."""

    target: str
    backend: str
    recipe: str
    applied: tuple[Applied, ...]
    refusals: tuple[str, ...]
    estimate: Estimate | None


def dry_run(
    source: str | os.PathLike[str],
    target: str | Target = "cpu",
    *,
    backend: str | None = None,
    recipe: str | Recipe = "none",
    shape: Sequence[str] = (),
    calibration: str | os.PathLike[str] | Iterable[Tensors] | None = None,
    seed: int = 0,
    options: Mapping[str, str] | None = None,
    generator: bool | None = None,
    context: int | None = None,
    prefill: Sequence[int] = (),
    guesses: int = 0,
) -> DryRun:
    """Run the passes and the cost model, build nothing; see `compile`."""
    job = resolve(
        source,
        target,
        backend=backend,
        recipe=recipe,
        shape=shape,
        calibration=calibration,
        seed=seed,
        options=options,
        generating=Generating(generator, context, tuple(sorted(set(prefill))), guesses),
    )
    feeds = job.feeds()
    made = steps.ready(job, feeds, steps.optimize(job, feeds))
    return DryRun(
        job.target.name,
        job.backend.name,
        job.recipe.name,
        (*made.applied, *made.legalized),
        made.refusals,
        None if made.refusals else made.estimate,
    )
