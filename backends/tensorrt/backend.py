"""The TensorRT backend: a strongly typed graph, and the folder that becomes an engine.

An engine can only be built by TensorRT itself, on the GPU that it is for. Where that is at hand the
plan is built right away. Where it is not, the artifact is a *build folder*: the legalized model,
the settings, and two scripts that need nothing of Trivium; its manifest says that nothing was run,
and why. So the backend is available everywhere; `load` is what raises where TensorRT is absent.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trivium.backends.tensorrt import legalize, operators, settings, static_caches
from trivium.backends.tensorrt.qdq_lint import lint
from trivium.compiler import model as models
from trivium.compiler import reference, verify
from trivium.compiler.artifact import Artifact
from trivium.compiler.backend import BuildRequest, Executable, Tensors
from trivium.compiler.errors import BackendFailed, ToolchainMissing
from trivium.compiler.options import values_of
from trivium.compiler.samples import conform_feeds
from trivium.compiler.types import Built, Estimate, Program, Target, TensorInfo, Workload

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

    from trivium.compiler.cost import Profile
    from trivium.compiler.generator import Generator

BUILD, RUN, README = "build_engine.py", "run_engine.py", "README.md"
_BUILD_SECONDS, _RUN_SECONDS, _PROBE_SECONDS = 3600, 600, 120


class TensorRTBackend:
    """NVIDIA TensorRT 11."""

    name = "tensorrt"
    cache_form = "static"
    options = settings.OPTIONS

    def available(self) -> str | None:
        return None

    def toolchain(self) -> dict[str, str]:
        from importlib.metadata import PackageNotFoundError, version

        try:
            return {"tensorrt": version("tensorrt")}
        except PackageNotFoundError:
            return {}

    def legalize(self, target: Target) -> Sequence[ir.passes.PassBase]:
        return legalize.passes()

    def refuses(self, node: ir.Node, target: Target) -> str | None:
        return operators.refusal(node)

    def estimate(self, model: ir.Model, target: Target, workload: Workload) -> Estimate:
        from trivium.backends.tensorrt import cost

        return cost.estimate(model, target, workload)

    def profile(self, target: Target) -> Profile:
        from trivium.backends.tensorrt import cost

        return cost.profile_for(target)

    def build(self, model: ir.Model, request: BuildRequest) -> Built:
        folder = request.folder
        inputs, outputs = models.signature(model)
        generator = request.generator
        cases = {"main": request.workload}
        if generator is not None:
            cases = static_caches.workloads(generator, inputs, request.workload)
        chosen = values_of(self, request.options)
        each = [settings.settings(chosen, inputs, case) for case in cases.values()]
        engine = each[0] | {"profiles": [ranges for one in each for ranges in one["profiles"]]}
        if generator is not None:
            settings.fix(engine["profiles"])
        saved = models.save(model, folder / settings.MODEL)
        (folder / settings.SETTINGS).write_text(json.dumps(engine, indent=1) + "\n")
        for script in (BUILD, RUN):
            source = files("trivium.backends.tensorrt") / "scripts" / script
            (folder / script).write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
        readme = _readme(engine) + (_driving(generator, cases) if generator is not None else "")
        (folder / README).write_text(readme, encoding="utf-8")
        findings = lint(model)
        error, checked = _check_legalized(model, request)
        notes = [str(finding) for finding in findings]
        missing = why_not_here()
        if missing is None:
            _run_script(folder / BUILD, [], _BUILD_SECONDS)
        else:
            notes.insert(0, f"no engine was built here ({missing}): run {BUILD} on the GPU")
        return Built(
            programs=tuple(
                Program(
                    name,
                    settings.MODEL if missing else settings.PLAN,
                    _sized(inputs, case),
                    _sized(outputs, case),
                )
                for name, case in cases.items()
            ),
            weights=saved[1].name if len(saved) > 1 else saved[0].name,
            memory={"weights_bytes": _weights_bytes(model)},
            details={
                "engine": engine,
                "engine_built": missing is None,
                "legalized_graph_max_rel_error": error,
                "legalized_graph_checked": checked,
                "qdq_findings": len(findings),
            },
            notes=tuple(notes),
        )

    def load(self, artifact: Artifact) -> Executable:
        if artifact.generator is not None:
            raise ToolchainMissing(
                "the caches of a generator stay on the GPU, with the program that runs its engine",
                about="backend tensorrt",
                remedy=f"{README} of the artifact says what that program has to do",
            )
        missing = why_not_here()
        if missing is not None:
            raise ToolchainMissing(
                missing,
                about="backend tensorrt",
                remedy=f"copy the artifact to the GPU's machine and run {BUILD} there",
            )
        if not (artifact.path / settings.PLAN).is_file():
            raise ToolchainMissing(
                "the artifact is a build folder without an engine",
                about=str(artifact.path),
                remedy=f"run its {BUILD}, or compile again on this machine",
            )
        return TensorRTExecutable(artifact)


def _weights_bytes(model: ir.Model) -> int:
    tensors = (value.const_value for value in model.graph.initializers.values())
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def why_not_here() -> str | None:
    """Return why no engine can be built or run on this machine, or None if one can.

    The builder is tried in a process of its own: TensorRT aborts the one that it is in when the
    driver is absent or too old.
    """
    from importlib.util import find_spec

    if find_spec("tensorrt") is None:
        return "TensorRT is not installed"
    probe = "import tensorrt as trt; trt.Builder(trt.Logger(trt.Logger.ERROR))"
    try:
        done = subprocess.run(
            [sys.executable, "-c", probe],
            capture_output=True,
            text=True,
            timeout=_PROBE_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"TensorRT's builder did not start in {_PROBE_SECONDS} s"
    if done.returncode == 0:
        return None
    return f"TensorRT is installed, but its builder does not start: {_last_line(done)}"


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return lines[-1].strip() if lines else f"exit code {done.returncode}"


def _run_script(script: Path, arguments: Sequence[str], seconds: int) -> None:
    try:
        done = subprocess.run(
            [sys.executable, str(script), *arguments],
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise BackendFailed(f"no result after {seconds} s", about=script.name) from error
    if done.returncode:
        raise BackendFailed(_last_line(done), about=script.name)


def _check_legalized(model: ir.Model, request: BuildRequest) -> tuple[float | None, str]:
    """Hold the legalized graph to the one before, on the CPU: what can be verified anywhere.

    Raises:
        BackendFailed: Legalizing changed what the graph computes.
    """
    if not request.expected:
        return None, "there is no reference run to compare with"
    generator = request.generator
    held = [cache.past for cache in generator.caches] if generator is not None else []
    driven = generator is not None and not any(past in request.samples[0] for past in held)
    expected: Sequence[Tensors] = request.expected
    try:
        if generator is not None and driven:
            ran, expected = _driven(model, request, generator)
        else:
            ran = reference.run_model(model, request.samples)
    except BackendFailed as error:
        return None, error.cause
    found = verify.compare(expected, ran.outputs)
    if not found.within(verify.tolerance_for(model)):
        raise BackendFailed(
            found.problem or f"legalizing changed the outputs by {found.max_rel_error:.3g}",
            about="backend tensorrt",
            remedy="this is a bug in a legalizing pass: please report it with the model",
        )
    return found.max_rel_error, f"{ran.engine}, {len(request.samples)} samples"


def _driven(
    model: ir.Model, request: BuildRequest, generator: Generator
) -> tuple[reference.Reference, list[Tensors]]:
    """What the graph gives as it will be run, prefill and then token by token; and what it should.

    Raises:
        BackendFailed: It cannot be run here.
    """
    import onnxruntime as ort

    from trivium.compiler.generation import compiling
    from trivium.compiler.onnx_api import one_line

    pairs = list(zip(request.samples, request.expected, strict=True))
    expected: list[Tensors] = [
        compiling.expected_logits(generator, feed, want) for feed, want in pairs
    ]
    options = ort.SessionOptions()
    options.log_severity_level = 4
    with tempfile.TemporaryDirectory(prefix="trivium-") as folder:
        path = Path(folder) / "model.onnx"
        models.save(model, path)
        try:
            session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            decoder = static_caches.CheckedDecoder(generator, session)
            outputs = tuple(
                compiling.driven_logits(decoder, compiling.rows_of(generator, feed))
                for feed in request.samples
            )
        except Exception as error:  # onnxruntime raises a dozen kinds without a common base
            raise BackendFailed(one_line(error), about="backend tensorrt") from error
    return reference.Reference(outputs, f"onnxruntime {ort.__version__}"), expected


def _sized(infos: Sequence[TensorInfo], case: Workload) -> tuple[TensorInfo, ...]:
    """Inputs or outputs with the dimensions of a program."""
    return tuple(
        replace(info, shape=tuple(case.dims.get(str(dim), dim) for dim in info.shape))
        for info in infos
    )


def _driving(generator: Generator, cases: Mapping[str, Workload]) -> str:
    profiles = "".join(f"- profile {index}: `{name}`\n" for index, name in enumerate(cases))
    pairs = ", ".join(f"`{c.past}` and `{c.present}`" for c in generator.caches[:2])
    return f"""
It continues texts. Each of its programs is an optimization profile:
{profiles}
A cache is an input and an output ({pairs}, ...): give both the same memory, zeros at first, of
which each call writes what its tokens add. `{generator.start}` says how many slots are filled,
`{generator.mask}` is 1 for the slots that count. Tokens that a program does not need go to the
right, and are left out of the mask.
"""


def _readme(engine: dict[str, Any]) -> str:
    profiles = "".join(
        f"- `{name}`: {sizes['min']} to {sizes['max']}, tuned for {sizes['opt']}\n"
        for profile in engine["profiles"]
        for name, sizes in profile.items()
    )
    return f"""# A TensorRT engine, to be built

On the machine with the GPU (TensorRT 11, its Python package, cuda-python, numpy):

```
python {BUILD}
python {RUN} --input x.npz --output y.npz --repeat 100
```

or, with the same settings and no Python:

```
{settings.trtexec(engine)}
```

The network is strongly typed: it computes in the types that `{settings.MODEL}` spells out.
A plan that `trtexec` made has no `.sha256` beside it; `{RUN}` wants one
(`sha256sum {settings.PLAN} | cut -d' ' -f1 > {Path(settings.PLAN).stem}.sha256`).
{"Shapes:" if profiles else "All shapes are fixed."}
{profiles}"""


class TensorRTExecutable:
    """An engine, run by the artifact's own script in a process of its own.

    A plan that TensorRT dislikes takes the process down that deserializes it; and each run starts
    one, so timing this says nothing of the engine: ``run_engine.py --repeat`` does.
    """

    measures_target = False

    def __init__(self, artifact: Artifact) -> None:
        program = artifact.programs[0]
        self.inputs: Sequence[TensorInfo] = program.inputs
        self._outputs = [info.name for info in program.outputs]
        self._script = artifact.path / RUN
        version = artifact.backend.toolchain().get("tensorrt", "?")
        self.where = f"TensorRT {version} on this machine's GPU, one process for each run"

    def run(self, feeds: Tensors) -> dict[str, np.ndarray[Any, Any]]:
        import numpy as np

        ready = conform_feeds(feeds, self.inputs)
        with tempfile.TemporaryDirectory(prefix="trivium-") as folder:
            source, result = Path(folder) / "x.npz", Path(folder) / "y.npz"
            np.savez(source, **ready)
            arguments = ["--input", str(source), "--output", str(result)]
            _run_script(self._script, arguments, _RUN_SECONDS)
            with np.load(result, allow_pickle=False) as archive:
                return {name: archive[name] for name in self._outputs}


BACKEND = TensorRTBackend()
