"""One compile, from a model to an artifact: load, normal form, recipe, legalize, build, verify.

`prepare` is the part that needs no toolchain (compare and plan use it too); `compile` goes all
the way.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trivium
from trivium.compiler import cache, plugins, recipe, reference, samples, shapes, verify
from trivium.compiler import model as models
from trivium.compiler import targets as target_names
from trivium.compiler.artifact import Artifact, staged, write_manifest
from trivium.compiler.backend import BuildRequest
from trivium.compiler.errors import AccuracyFailed, BadInput, ToolchainMissing, Unsupported
from trivium.compiler.recipe import Applied, Context, Recipe
from trivium.compiler.types import Estimate, Target, TensorInfo, Workload

if TYPE_CHECKING:
    import onnx_ir as ir

    from trivium.compiler.backend import Backend, Tensors

Progress = Callable[[str], None]

SAMPLES = 2
"""How many feeds a compile is verified on."""


def silent(stage: str) -> None:
    """A progress callback that says nothing."""


@dataclass(frozen=True)
class Prepared:
    """A model on its way to a backend.

    Attributes:
        model: Legalized (or, with ``legalized=False``, in normal form after the recipe).
        applied: What each pass did and declined.
        refusals: One line for each node that the backend cannot run.
    """

    model: ir.Model
    backend: Backend
    workload: Workload
    applied: tuple[Applied, ...]
    refusals: tuple[str, ...]
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]


def choose_backend(target: Target, name: str | None) -> Backend:
    """Return the target's default backend, or the named one if it serves the target."""
    if name is not None and name not in target.backends:
        known = plugins.names("trivium.backends")
        problem = f"does not serve {target.name}" if name in known else "is not installed"
        raise BadInput(
            f"the backend {name!r} {problem}",
            about="--backend",
            remedy=f"{target.name} is served by {', '.join(target.backends)}",
        )
    backend: Backend = plugins.get("trivium.backends", name or target.backend)
    return backend


def optimize(
    source: str | os.PathLike[str] | ir.Model,
    recipe_name: str | Recipe = "none",
    *,
    shape: Sequence[str] = (),
    calibration: Iterable[Tensors] | None = None,
    target: Target | None = None,
    backend: str | None = None,
    seed: int = 0,
) -> tuple[ir.Model, list[Applied]]:
    """Bring a model to normal form and run a recipe on it: ONNX in, ONNX out.

    Args:
        source: A path, or a loaded model (which is changed in place).
        recipe_name: A recipe, its name, or a TOML file.
        shape: ``NAME=1x128`` and ``DIM=128`` as on the command line.
        calibration: Feeds for passes that calibrate; may be iterated more than once.
        target, backend: Tell passes that ask what they optimize for; the backend is by default
            that of the target.

    Returns:
        The model, and what each pass did.
    """
    model = models.load(source) if isinstance(source, (str, os.PathLike)) else source
    workload = shapes.parse(shape, models.signature(model)[0])
    backend = target.backend if backend is None and target is not None else backend
    context = Context(target, calibration, workload, seed, backend)
    return model, _optimize(model, _recipe(recipe_name), context)


def _recipe(given: str | Recipe) -> Recipe:
    return recipe.read(given) if isinstance(given, str) else given


def _optimize(model: ir.Model, chosen: Recipe, context: Context) -> list[Applied]:
    shapes.bind(model, context.workload)
    applied = recipe.run(recipe.read(recipe.NORMALIZE), model, context)
    return applied + recipe.run(chosen, model, context)


def legalize(model: ir.Model, backend: Backend, target: Target, workload: Workload) -> Prepared:
    """Bring an optimized model to what a backend takes, in place, and collect its refusals."""
    applied = recipe.apply(backend.legalize(target), model)
    refusals = []
    for node in model.graph.all_nodes():
        reason = backend.refuses(node, target)
        if reason is not None:
            refusals.append(f"{node.name or node.op_type} ({node.op_type}): {reason}")
    inputs, outputs = models.signature(model)
    return Prepared(
        model, backend, workload, tuple(applied), tuple(dict.fromkeys(refusals)), inputs, outputs
    )


@dataclass
class Job:
    """The arguments of a compile, resolved."""

    source: Path
    target: Target
    backend: Backend
    recipe: Recipe
    shape: tuple[str, ...]
    calibration: Sequence[Tensors] | None
    max_error: float | None
    seed: int
    options: Mapping[str, str]
    sha256: str = ""
    key: str = ""
    stages: dict[str, float] = field(default_factory=dict)


def compile(
    source: str | os.PathLike[str],
    target: str | Target = "cpu",
    *,
    out: str | os.PathLike[str] | None = None,
    backend: str | None = None,
    recipe: str | Recipe = "none",
    shape: Sequence[str] = (),
    calibration: str | os.PathLike[str] | Sequence[Tensors] | None = None,
    max_error: float | None = None,
    seed: int = 0,
    options: Mapping[str, str] | None = None,
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
            one that takes several sizes.
        calibration: Representative inputs: an ``.npz`` file, or feeds.
        max_error: Largest allowed error relative to the source model's outputs.
        seed: Of the inputs that are drawn when no calibration is given.
        options: Options of the backend.
        use_cache: Whether an equal earlier compile may be reused.
        progress: Called with the name of each stage as it begins.

    Raises:
        TriviumError: Its subclass and exit code say what kind; nothing is left half-written.
    """
    job = _job(
        source,
        target,
        backend,
        recipe,
        shape,
        calibration,
        max_error,
        seed,
        options or {},
        progress,
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
    if use_cache:
        cache.store(job.key, artifact)
    return artifact


def default_name(source: Path, target: Target) -> str:
    """The folder that an artifact gets when the user names none."""
    return f"{source.stem}.{target.name.replace(':', '-')}"


def _job(
    source: str | os.PathLike[str],
    target: str | Target,
    backend: str | None,
    given_recipe: str | Recipe,
    shape: Sequence[str],
    calibration: str | os.PathLike[str] | Sequence[Tensors] | None,
    max_error: float | None,
    seed: int,
    options: Mapping[str, str],
    progress: Progress,
) -> Job:
    path = Path(source)
    found = target_names.find(target) if isinstance(target, str) else target
    chosen = choose_backend(found, backend)
    steps = _recipe(given_recipe)
    progress("reading the model")
    model = models.load(path)
    # Bound first: a calibration file is cut into feeds of the batch that will be compiled.
    shapes.bind(model, shapes.parse(shape, models.signature(model)[0]))
    inputs, _ = models.signature(model)
    if isinstance(calibration, (str, os.PathLike)):
        calibration = samples.read_npz(calibration, inputs)
    job = Job(path, found, chosen, steps, tuple(shape), calibration, max_error, seed, dict(options))
    job.sha256 = models.content_hash(path, model)
    job.key = _key(job)
    return job


def _key(job: Job) -> str:
    """What an equal compile has in common with this one."""
    facts = {
        "trivium": cache.fingerprint(),
        "model": job.sha256,
        "target": repr(job.target),
        "backend": job.backend.name,
        "toolchain": job.backend.toolchain(),
        "recipe": recipe.lock(job.recipe, seed=job.seed, model_sha256="", calibration=None),
        "shape": sorted(job.shape),
        "calibration": samples.digest(job.calibration) if job.calibration is not None else None,
        "max_error": job.max_error,
        "options": dict(sorted(job.options.items())),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _compile_into(folder: Path, job: Job, progress: Progress) -> None:
    started = time.perf_counter()
    model = models.load(job.source)
    workload = shapes.parse(job.shape, models.signature(model)[0])
    shapes.bind(model, workload)

    progress("running the reference")
    random = reference.draws_random_numbers(model)
    feeds, source, no_reference = _feeds_that_run(model, job, workload)

    progress(f"recipe {job.recipe.name}")
    calibration = job.calibration if job.calibration is not None else feeds
    context = Context(job.target, calibration, workload, job.seed, job.backend.name)
    applied = _optimize(model, job.recipe, context)
    preserves = job.recipe.preserves
    tolerance = verify.tolerance_for(model)
    optimized = source
    if preserves == "lossy" and source is not None:
        optimized = reference.run_model(model, feeds)

    progress(f"legalizing for {job.backend.name}")
    prepared = legalize(model, job.backend, job.target, workload)
    if prepared.refusals:
        raise refused(prepared, job.target)
    estimate = job.backend.estimate(model, job.target, shapes.each(workload)[-1])

    progress(f"building with {job.backend.name}")
    built = job.backend.build(
        model,
        BuildRequest(
            job.target,
            workload,
            folder,
            samples=feeds,
            expected=optimized.outputs if optimized is not None and not random else (),
            options=job.options,
            estimate=estimate,
        ),
    )
    (folder / "recipe.lock.toml").write_text(
        recipe.lock(
            job.recipe,
            seed=job.seed,
            model_sha256=job.sha256,
            calibration=samples.digest(job.calibration) if job.calibration is not None else None,
        ),
        encoding="utf-8",
    )
    manifest: dict[str, Any] = {
        "trivium": trivium.__version__,
        "key": job.key,
        "model": {"name": job.source.name, "sha256": job.sha256},
        "target": job.target.name,
        "backend": job.backend.name,
        "recipe": {
            "name": job.recipe.name,
            "preserves": preserves,
            "lock": "recipe.lock.toml",
            "applied": [asdict(row) for row in (*applied, *prepared.applied)],
        },
        "toolchain": job.backend.toolchain(),
        "workload": {
            "dims": dict(workload.dims),
            "shapes": dict(workload.shapes),
            "buckets": dict(workload.buckets),
        },
        "inputs": [asdict(info) for info in prepared.inputs],
        "outputs": [asdict(info) for info in prepared.outputs],
        "programs": [asdict(program) for program in built.programs],
        "weights": built.weights,
        "memory": dict(built.memory),
        "details": dict(built.details),
        "estimate": estimate_json(estimate),
        "notes": [*models.notes_of(model), *built.notes],
    }
    progress("verifying")
    if source is None:
        verification = verify.Verification("not-run", no_reference)
    elif random:
        verification = verify.Verification("not-run", "the model draws random numbers")
    else:
        assert optimized is not None
        verification = _verify(folder, job, manifest, feeds, source, optimized, tolerance)
    if verification.status == "failed":
        raise AccuracyFailed(
            verification.reason,
            about=f"{job.source.name} on {job.target.name}",
            remedy="find the guilty layer with: trivium explain, or choose a gentler recipe",
        )
    manifest["verification"] = verification.to_json()
    manifest["seconds"] = round(time.perf_counter() - started, 3)
    write_manifest(folder, manifest)


def refused(prepared: Prepared, target: Target) -> Unsupported:
    """The error that lists every node a backend cannot run."""
    shown = "; ".join(prepared.refusals[:8])
    more = f"; and {len(prepared.refusals) - 8} more" if len(prepared.refusals) > 8 else ""
    return Unsupported(
        f"{prepared.backend.name} cannot run {len(prepared.refusals)} nodes: {shown}{more}",
        about=target.name,
        remedy=_elsewhere(prepared, target),
        refusals=prepared.refusals,
    )


def _elsewhere(prepared: Prepared, target: Target) -> str:
    others = [name for name in target.backends if name != prepared.backend.name]
    if others:
        return f"try --backend {others[0]}"
    return "" if target.family == "cpu" else "try --target cpu"


def _feeds(model: ir.Model, job: Job, workload: Workload) -> list[dict[str, Any]]:
    """The samples to verify on: the user's first ones, or seeded ones."""
    if job.calibration:
        return [dict(feed) for feed in job.calibration[:SAMPLES]]
    cases = shapes.each(workload)
    count = SAMPLES if len(cases) == 1 else 1
    return [
        feed for case in cases for feed in samples.seeded(model, case, count=count, seed=job.seed)
    ]


def _feeds_that_run(
    model: ir.Model, job: Job, workload: Workload
) -> tuple[list[dict[str, Any]], reference.Reference | None, str]:
    """The samples and the reference run on them; seeded ones in the first size that runs."""
    feeds = _feeds(model, job, workload)
    source, reason = _try_reference(job.source, model, feeds)
    if source is not None or job.calibration or not shapes.open_dims(models.signature(model)[0]):
        return feeds, source, reason
    for size in samples.OTHER_DIMS:
        other = samples.seeded(model, workload, count=SAMPLES, seed=job.seed, size=size)
        source, _ = _try_reference(job.source, model, other)
        if source is not None:
            return other, source, ""
    return feeds, None, reason


def _try_reference(
    path: Path, model: ir.Model, feeds: Sequence[Mapping[str, Any]]
) -> tuple[reference.Reference | None, str]:
    from trivium.compiler.errors import BackendFailed

    try:
        if path.suffix == ".onnx":
            return reference.run_file(path, feeds), ""
        return reference.run_model(model, feeds), ""
    except BackendFailed as error:
        return None, error.cause


def _verify(
    folder: Path,
    job: Job,
    manifest: dict[str, Any],
    feeds: Sequence[Mapping[str, Any]],
    source: reference.Reference,
    optimized: reference.Reference,
    tolerance: float,
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
        executable = Artifact.open(folder, checked=False).load()
        actual = [executable.run(feed) for feed in feeds]
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


def estimate_json(estimate: Estimate) -> dict[str, Any]:
    """An estimate as the manifest and ``--json`` show it."""
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
    calibration: str | os.PathLike[str] | Sequence[Tensors] | None = None,
    seed: int = 0,
) -> DryRun:
    """Run the passes and the cost model, build nothing."""
    job = _job(source, target, backend, recipe, shape, calibration, None, seed, {}, silent)
    model = models.load(job.source)
    workload = shapes.parse(job.shape, models.signature(model)[0])
    shapes.bind(model, workload)
    feeds = _feeds(model, job, workload)
    calibration = job.calibration or feeds
    context = Context(job.target, calibration, workload, job.seed, job.backend.name)
    applied = _optimize(model, job.recipe, context)
    prepared = legalize(model, job.backend, job.target, workload)
    estimate = None
    if not prepared.refusals:
        estimate = job.backend.estimate(model, job.target, workload)
    return DryRun(
        job.target.name,
        job.backend.name,
        job.recipe.name,
        (*applied, *prepared.applied),
        prepared.refusals,
        estimate,
    )
