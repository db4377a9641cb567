"""Numbers against the reference: what was compared, on which data, with what error.

Two comparisons are kept apart. *Fidelity*: does the engine compute what the optimized graph says?
It has to, to a tolerance, whatever the recipe. *Accuracy*: how far is the artifact from the source
model? That is the recipe's doing, it is always reported, and ``--max-error`` gates it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from trivium.compiler.errors import BadInput

if TYPE_CHECKING:
    import onnx_ir as ir

    from trivium.compiler.artifact import Artifact
    from trivium.compiler.backend import Executable

Status = Literal["passed", "failed", "not-run"]


@dataclass(frozen=True)
class Tolerance:
    """The largest error, relative to the output's own magnitude, that is allowed.

    Attributes:
        measure: ``max`` holds the worst element to the limit, ``rms`` the root mean square.
    """

    limit: float
    measure: Literal["max", "rms"] = "max"


FINE = Tolerance(1e-3)
"""What an engine may add to a graph that computes in float32 or wider."""

COARSE = Tolerance(1e-1, "rms")
"""The same for graphs that round to a coarse grid (integers, half precision): an engine that sums
in another order lands one step away here and there, and the steps add up over layers. The worst
element then says little; a wrong engine is wrong on the whole."""

_COARSE_OPS = frozenset(
    {
        "QuantizeLinear",
        "DynamicQuantizeLinear",
        "QLinearConv",
        "QLinearMatMul",
        # Weights in integers let an engine quantize activations on the fly, as ONNX Runtime does.
        "DequantizeLinear",
    }
)
_COARSE_TYPES = frozenset({"FLOAT16", "BFLOAT16"})


def tolerance_for(model: ir.Model) -> Tolerance:
    """The tolerance that an engine gets for a graph, by what the graph rounds to."""
    for node in model.graph.all_nodes():
        if node.op_type in _COARSE_OPS:
            return COARSE
        if any(v.dtype is not None and v.dtype.name in _COARSE_TYPES for v in node.outputs):
            return COARSE
    return FINE


@dataclass(frozen=True)
class Comparison:
    """Differences over all outputs and samples.

    Attributes:
        max_abs_error: Largest absolute difference.
        max_rel_error: Largest absolute difference of an output divided by the largest magnitude
            in that output of the reference.
        rms_rel_error: Root mean square of the differences of an output divided by that of the
            output in the reference.
        problem: What cannot be put into a number (a missing output, another shape, NaN).
    """

    max_abs_error: float
    max_rel_error: float
    rms_rel_error: float
    problem: str = ""

    def error(self, measure: Literal["max", "rms"]) -> float:
        return self.max_rel_error if measure == "max" else self.rms_rel_error

    def within(self, tolerance: float | Tolerance) -> bool:
        """Whether the error stays within a tolerance (a number is one for the worst element)."""
        if not isinstance(tolerance, Tolerance):
            tolerance = Tolerance(tolerance)
        return not self.problem and self.error(tolerance.measure) <= tolerance.limit


SAME = Comparison(0.0, 0.0, 0.0)


def _wrong(problem: str) -> Comparison:
    return Comparison(float("inf"), float("inf"), float("inf"), problem)


def _worst(parts: Iterable[Comparison]) -> Comparison:
    """The largest error of each kind, or the first problem."""
    total = SAME
    for one in parts:
        if one.problem:
            return one
        total = Comparison(
            max(total.max_abs_error, one.max_abs_error),
            max(total.max_rel_error, one.max_rel_error),
            max(total.rms_rel_error, one.rms_rel_error),
        )
    return total


def compare(
    expected: Sequence[Mapping[str, Any]], actual: Sequence[Mapping[str, Any]]
) -> Comparison:
    """Compare outputs, sample by sample and by name."""
    return _worst(
        _compare_one(name, value, have[name])
        if name in have
        else _wrong(f"the output {name!r} is missing")
        for want, have in zip(expected, actual, strict=True)
        for name, value in want.items()
    )


def _compare_one(name: str, want: Any, have: Any) -> Comparison:
    import numpy as np

    if isinstance(want, (list, tuple)):
        if len(want) != len(have):
            return _wrong(f"{name!r} has {len(have)} of {len(want)} items")
        pairs = enumerate(zip(want, have, strict=True))
        return _worst(_compare_one(f"{name}[{i}]", w, h) for i, (w, h) in pairs)
    want, have = np.asarray(want), np.asarray(have)
    if want.shape != have.shape:
        return _wrong(f"{name!r} has shape {list(have.shape)}, not {list(want.shape)}")
    if want.dtype.kind in "OUS":
        equal = bool((want.astype(str) == have.astype(str)).all())
        return SAME if equal else _wrong(f"{name!r} differs")
    want, have = want.astype(np.float64), have.astype(np.float64)
    same = (want == have) | (np.isnan(want) & np.isnan(have))
    if bool((~np.isfinite(have) & ~same).any()):
        return _wrong(f"{name!r} has NaN or infinity where the reference has none")
    difference = np.abs(np.subtract(have, want, where=~same, out=np.zeros_like(want)))
    if not difference.any():
        return SAME
    finite = want[np.isfinite(want)]
    largest = float(difference.max())
    # An output that should be all zeros has no magnitude to relate to: the error is its own scale.
    scale = float(np.abs(finite).max(initial=0.0)) or 1.0
    rms = float(np.sqrt(np.mean(finite**2))) if finite.size else 0.0
    return Comparison(
        largest, largest / scale, float(np.sqrt(np.mean(difference**2))) / (rms or 1.0)
    )


@dataclass(frozen=True)
class Verification:
    """What the manifest says of the comparison; see the module's docstring."""

    status: Status
    reason: str = ""
    accuracy: Comparison | None = None
    fidelity: Comparison | None = None
    compared: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        accuracy, fidelity = self.accuracy, self.fidelity
        return {
            "status": self.status,
            "reason": self.reason or None,
            "max_abs_error": _finite(accuracy.max_abs_error) if accuracy else None,
            "max_rel_error": _finite(accuracy.max_rel_error) if accuracy else None,
            "engine_max_abs_error": _finite(fidelity.max_abs_error) if fidelity else None,
            "engine_max_rel_error": _finite(fidelity.max_rel_error) if fidelity else None,
            "rms_rel_error": _finite(accuracy.rms_rel_error) if accuracy else None,
            "engine_rms_rel_error": _finite(fidelity.rms_rel_error) if fidelity else None,
            "compared": dict(self.compared) if self.compared else None,
        }


def _finite(number: float) -> float | None:
    return number if number < float("inf") else None


def judge(
    source: Sequence[Mapping[str, Any]],
    optimized: Sequence[Mapping[str, Any]],
    actual: Sequence[Mapping[str, Any]],
    *,
    tolerance: Tolerance,
    lossy: bool,
    max_error: float | None,
    compared: Mapping[str, Any],
) -> Verification:
    """Hold an artifact's outputs to the source's and to the optimized graph's.

    Args:
        source, optimized, actual: Outputs by sample: of the source model, of the graph after
            the recipe, of the artifact.
        tolerance: What the engine may add; see `tolerance_for`.
        lossy: Whether the recipe gives up accuracy on purpose: then only ``max_error`` gates it.
        max_error: The user's gate on the relative error against the source.
    """
    accuracy, fidelity = compare(source, actual), compare(optimized, actual)
    reason = ""
    if not fidelity.within(tolerance) and not (
        lossy and tolerance.measure == "rms" and _as_good(accuracy, fidelity, source, optimized)
    ):
        reason = f"the engine does not compute what the graph says: {_excess(fidelity, tolerance)}"
    elif not lossy and not accuracy.within(tolerance):
        reason = f"{_excess(accuracy, tolerance)} against the source"
    elif max_error is not None and not accuracy.within(max_error):
        reason = f"{_excess(accuracy, Tolerance(max_error))}, which is --max-error"
    status: Status = "failed" if reason else "passed"
    details = {
        **compared,
        "tolerance": tolerance.limit,
        "tolerance_measure": tolerance.measure,
        "max_error": max_error,
        "not_finite": nowhere_finite(source),
    }
    return Verification(status, reason, accuracy, fidelity, details)


def nowhere_finite(samples: Sequence[Mapping[str, Any]]) -> list[str]:
    """The float outputs that are NaN or infinite throughout: nothing in them can be compared."""
    import numpy as np

    def blind(array: Any) -> bool:
        is_float = isinstance(array, np.ndarray) and array.dtype.kind == "f" and array.size > 0
        return is_float and not np.isfinite(array).any()

    names = samples[0] if samples else ()
    return [name for name in names if all(blind(sample[name]) for sample in samples)]


def caveat(compared: Mapping[str, Any]) -> str:
    """What a passed verification does not say, as the end of a line."""
    names = ", ".join(compared.get("not_finite", ()))
    what = f"; nothing to compare in {names}, which the source makes NaN or infinite"
    return what if names else ""


def _as_good(
    accuracy: Comparison,
    fidelity: Comparison,
    source: Sequence[Mapping[str, Any]],
    optimized: Sequence[Mapping[str, Any]],
) -> bool:
    """Whether an engine differs from a coarse graph by no more than the graph does from its source,
    and lands as near to the source as the graph.

    Rounding steps taken in another order add up over the layers of a transformer until two engines
    are as far apart as the grid is coarse. Neither is wrong then: a wrong one is further away.
    """
    coarse = compare(source, optimized)
    within = fidelity.rms_rel_error <= coarse.rms_rel_error
    return (
        not fidelity.problem
        and within
        and accuracy.within(Tolerance(1.1 * coarse.rms_rel_error, "rms"))
    )


def _excess(comparison: Comparison, tolerance: Tolerance) -> str:
    error = comparison.error(tolerance.measure)
    kind = "relative error" if tolerance.measure == "max" else "relative RMS error"
    return comparison.problem or f"{kind} {error:.3g} > {tolerance.limit:g}"


INPUTS, SOURCE, OPTIMIZED = "verify/inputs.npz", "verify/source.npz", "verify/optimized.npz"


def write_samples(folder: Any, file: str, samples: Sequence[Mapping[str, Any]]) -> None:
    """Store samples as one ``.npz`` with the keys ``<sample>/<name>``."""
    import numpy as np

    path = folder / file
    path.parent.mkdir(exist_ok=True)
    arrays = {
        f"{i}/{name}": _storable(array)
        for i, sample in enumerate(samples)
        for name, array in sample.items()
    }
    np.savez(path, **arrays)


def _storable(array: Any) -> Any:
    """numpy's format knows no ml_dtypes: store those as float32, which holds them all exactly."""
    import numpy as np

    array = np.asarray(array)
    return array.astype(np.float32) if array.dtype.kind == "V" or array.dtype.num > 256 else array


def read_samples(path: Any) -> list[dict[str, Any]]:
    """Read what `write_samples` stored."""
    import numpy as np

    samples: dict[int, dict[str, Any]] = {}
    with np.load(path, allow_pickle=False) as archive:
        for key in archive.files:
            index, _, name = key.partition("/")
            samples.setdefault(int(index), {})[name] = archive[key]
    return [samples[index] for index in sorted(samples)]


def outputs_of(
    artifact: Artifact, executable: Executable, feeds: Sequence[Mapping[str, Any]]
) -> list[Mapping[str, Any]]:
    """Run an artifact on samples; a generator as it generates: by prefill, then token by token."""
    from trivium.compiler.generation import compiling as generating
    from trivium.compiler.generation.executable import is_driven

    generator = artifact.generator
    driven = getattr(executable, "driven", None)  # a decoder that sees, with all its parts
    if driven is not None:
        return [driven(feed) for feed in feeds]
    drive = getattr(executable, "generator", None)  # one that has none drives it by itself
    if generator is None or drive is None or not is_driven(generator, artifact.inputs):
        return [executable.run(feed) for feed in feeds]
    decoder = drive()
    return [generating.driven_logits(decoder, generating.rows_of(generator, f)) for f in feeds]


def verify(artifact: Artifact, *, max_error: float | None = None) -> Verification:
    """Run an artifact again on the samples that it carries and judge it as its compile did.

    Raises:
        ToolchainMissing: Nothing on this machine can run it.
    """
    manifest = artifact.manifest["verification"]
    if not (artifact.path / INPUTS).is_file():
        return Verification("not-run", str(manifest.get("reason") or "it carries no samples"))
    feeds = read_samples(artifact.path / INPUTS)
    source = read_samples(artifact.path / SOURCE)
    path = artifact.path / OPTIMIZED
    optimized = read_samples(path) if path.is_file() else source
    executable = artifact.load_to_verify()
    actual = outputs_of(artifact, executable, feeds)
    compared = {**(manifest["compared"] or {}), "where": executable.where}
    gate = max_error if max_error is not None else compared.get("max_error")
    return judge(
        source,
        optimized,
        actual,
        tolerance=Tolerance(compared["tolerance"], compared["tolerance_measure"]),
        lossy=artifact.manifest["recipe"]["preserves"] == "lossy",
        max_error=gate,
        compared=compared,
    )


def carried_feeds(artifact: Artifact) -> list[dict[str, Any]]:
    """The feeds that an artifact was verified on.

    Raises:
        BadInput: It carries none, because no reference could run at its compile.
    """
    path = artifact.path / INPUTS
    if not path.is_file():
        raise BadInput(
            "it carries no inputs", about=str(artifact.path), remedy="give --input X.npz"
        )
    return read_samples(path)
