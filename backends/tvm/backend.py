"""The TVM backend: Relax from normal form, LLVM for this CPU, cubins for NVIDIA GPUs.

An artifact holds the compiled library (``model.so``: kernels and the byte code of Relax's virtual
machine) and the weights, once. For a CUDA target it also holds the kernels as source and as a cubin
that nvcc made, and the same module compiled for the host's CPU, which stands in for the GPU when
the artifact is run or verified.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from trivium.backends.tvm import cuda, legalize, operators, weights
from trivium.backends.tvm.importer import Imported, to_relax
from trivium.compiler import model as models
from trivium.compiler.artifact import Artifact
from trivium.compiler.backend import BuildRequest, Executable, Tensors
from trivium.compiler.errors import BackendFailed, BadInput, ToolchainMissing
from trivium.compiler.onnx_api import one_line
from trivium.compiler.samples import conform_feeds
from trivium.compiler.shapes import require_static
from trivium.compiler.types import Built, Estimate, Program, Target, TensorInfo, Workload

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

    from trivium.compiler.cost import Profile

LIBRARY, STAND_IN = "model.so", "stand_in.so"


class TvmBackend:
    """Apache TVM's Relax."""

    name = "tvm"

    def available(self) -> str | None:
        from importlib.util import find_spec

        if find_spec("tvm") is None:
            return "apache-tvm is not installed; install it with: pip install 'trivium[tvm]'"
        return None

    def toolchain(self) -> dict[str, str]:
        from importlib.metadata import PackageNotFoundError, version

        try:
            return {"apache-tvm": version("apache-tvm")}
        except PackageNotFoundError:
            return {}

    def legalize(self, target: Target) -> Sequence[ir.passes.PassBase]:
        return legalize.passes()

    def refuses(self, node: ir.Node, target: Target) -> str | None:
        return operators.refusal(node)

    def estimate(self, model: ir.Model, target: Target, workload: Workload) -> Estimate:
        from trivium.backends.tvm import cost

        return cost.estimate(model, target, workload)

    def profile(self, target: Target) -> Profile:
        from trivium.backends.tvm import cost

        return cost.profile_for(target)

    def build(self, model: ir.Model, request: BuildRequest) -> Built:
        inputs, outputs = models.signature(model)
        require_static(inputs, "TVM")
        arch = request.target.options.get("arch")
        on_gpu = request.target.family == "gpu"
        if on_gpu and arch is None:
            raise BadInput(
                "the target names no architecture (its option 'arch', such as sm_90)",
                about=request.target.name,
            )
        if on_gpu:
            cuda.find_nvcc()
        _require_linker()
        imported = to_relax(model)
        index = weights.write(model, imported.weights, request.folder)
        library = STAND_IN if on_gpu else LIBRARY
        _compile(imported, _host()).export_library(str(request.folder / library))
        details: dict[str, Any] = {"weights": index, "host": _host_name()}
        notes: tuple[str, ...] = ()
        if arch is not None and on_gpu:
            details["cuda"] = _build_cuda(imported, arch, request)
            notes = (
                f"no GPU ran this: the numbers are those of {STAND_IN}, the same Relax module "
                "compiled for this machine's CPU",
                f"{LIBRARY} carries its kernels as CUDA source, for TVM has no CUDA runtime here; "
                f"{cuda.CUBIN} is what nvcc makes of them for {arch}",
            )
        return Built(
            programs=(Program("main", LIBRARY, inputs, outputs),),
            weights=weights.FILE,
            memory={"weights_bytes": (request.folder / weights.FILE).stat().st_size},
            details=details,
            notes=notes,
        )

    def load(self, artifact: Artifact) -> Executable:
        unavailable = self.available()
        if unavailable is not None:
            raise ToolchainMissing(unavailable, about="backend tvm")
        return TvmExecutable(artifact)


def _require_linker() -> None:
    """Raise ``ToolchainMissing`` where TVM finds no compiler to link a library with."""
    from tvm.support.cc import get_cc

    if get_cc() is None:
        raise ToolchainMissing(
            "no C++ compiler is on this machine, and TVM links with one",
            about="backend tvm",
            remedy="install one with: apt install g++",
        )


def _host() -> Any:
    """The CPU of this machine as a TVM target."""
    import os

    import tvm

    return tvm.target.Target(
        {"kind": "llvm", "mcpu": _host_name(), "num-cores": os.cpu_count() or 1}
    )


def _host_name() -> str:
    import tvm

    return str(tvm.target.codegen.llvm_get_system_cpu())


def _compile(imported: Imported, target: Any) -> Any:
    """Lower to loops, schedule them for a CPU, and compile."""
    import tvm
    from tvm import relax

    from trivium.backends.tvm.schedule import schedule_for_cpu

    to_loops = tvm.transform.Sequential(
        [
            relax.backend.DispatchSampling(),
            relax.backend.DispatchSortScan(),
            relax.transform.LegalizeOps(),
            relax.transform.AnnotateTIROpPattern(),
            relax.transform.FoldConstant(),
            relax.transform.FuseOps(),
            relax.transform.FuseTIR(),
        ]
    )
    try:
        with target:
            module = schedule_for_cpu(to_loops(imported.module))
            return tvm.compile(module, target)
    except Exception as error:  # TVM raises whatever its C++ side threw
        raise BackendFailed(one_line(error), about="TVM, for the CPU") from error


def _build_cuda(imported: Imported, arch: str, request: BuildRequest) -> dict[str, Any]:
    """Compile for CUDA with dlight's schedules, and the kernels to a cubin."""
    import tvm

    target = tvm.target.Target(
        {
            "kind": "cuda",
            "arch": arch,
            "max_threads_per_block": 1024,
            "max_shared_memory_per_block": 49152,
            "thread_warp_size": 32,
        },
        host=_host(),
    )
    try:
        executable = tvm.compile(imported.module, target)
        executable.export_library(str(request.folder / LIBRARY))
    except Exception as error:  # as in _compile
        raise BackendFailed(one_line(error), about=f"TVM, for {arch}") from error
    source = request.folder / cuda.SOURCE
    source.write_text(cuda.kernel_source(executable), encoding="utf-8")
    made = cuda.compile_cubin(source, request.folder / cuda.CUBIN, arch)
    return {"arch": f"sm_{made.sm}", "cubin": cuda.CUBIN, "kernels": list(made.kernels)}


class TvmExecutable:
    """Relax's virtual machine over an artifact's library and weights."""

    def __init__(self, artifact: Artifact) -> None:
        import tvm
        from tvm import relax

        program = artifact.programs[0]
        details = artifact.manifest["details"]
        stand_in = "cuda" in details
        built_for = details["host"]
        if built_for != _host_name():
            raise ToolchainMissing(
                f"it was compiled for a {built_for}, this CPU is a {_host_name()}",
                about=str(artifact.path),
                remedy="compile the model on this machine",
            )
        try:
            library = tvm.runtime.load_module(
                str(artifact.path / (STAND_IN if stand_in else program.file))
            )
            self._machine = relax.VirtualMachine(library, tvm.cpu())
        except Exception as error:  # TVM raises whatever its C++ side threw
            raise BackendFailed(one_line(error), about=str(artifact.path)) from error
        self._weights = weights.read(artifact.path, details["weights"])
        self.inputs: Sequence[TensorInfo] = program.inputs
        self._outputs = [info.name for info in program.outputs]
        self.measures_target = not stand_in
        version = artifact.backend.toolchain()["apache-tvm"]
        place = f" in place of {artifact.manifest['target']}" if stand_in else ""
        self.where = f"TVM {version} on this CPU{place}"

    def run(self, feeds: Tensors) -> dict[str, np.ndarray[Any, Any]]:
        import tvm

        ready = conform_feeds(feeds, self.inputs)
        arguments = [tvm.runtime.tensor(array) for array in ready.values()]
        try:
            results = self._machine["main"](*arguments, *self._weights)
        except Exception as error:  # as above
            raise BackendFailed(one_line(error), about="tvm") from error
        listed = [results] if hasattr(results, "numpy") else list(results)
        return {name: result.numpy() for name, result in zip(self._outputs, listed, strict=True)}


BACKEND = TvmBackend()
