"""Running an XLA artifact: on its own device where this machine has one, else on the CPU."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trivium.backends.xla import partition, pipeline, platforms, weights
from trivium.backends.xla.partition import Partition
from trivium.compiler.artifact import Artifact
from trivium.compiler.backend import Tensors
from trivium.compiler.errors import BackendFailed, BadInput, ToolchainMissing
from trivium.compiler.onnx_api import one_line
from trivium.compiler.samples import conform_feeds
from trivium.compiler.types import Program, TensorInfo

if TYPE_CHECKING:
    import numpy as np

_DEVICE_FILES = {"tpu": ("/dev/accel0", "/dev/vfio/0"), "cuda": ("/dev/nvidia0", "/dev/dxg")}
_JAX_NAME = {"cuda": "gpu", "tpu": "tpu", "cpu": "cpu"}


class XlaExecutable:
    """The programs of an artifact, compiled for what is here, over one copy of the weights.

    Args:
        simulated: Run them spread as far as `simulation` has made devices of this CPU.
    """

    def __init__(self, artifact: Artifact, *, simulated: bool = False) -> None:
        self._details: Mapping[str, Any] = artifact.manifest["details"]["xla"]
        platform = self._details["device"]["platform"]
        devices = local_devices("cpu" if simulated else platform)
        here = devices[0].platform
        self._on_target = not simulated and is_here(self._details)
        self._simulated = simulated
        self._devices = devices if simulated else devices[: self._wanted()]
        kind = self._devices[0].device_kind
        self.measures_target = self._on_target and kind == self._details["device_kind"]
        name = "this CPU" if here == "cpu" else f"{len(self._devices)} x {kind}"
        if simulated:
            name = f"{len(devices)} devices simulated on this CPU{self._meshes()}"
        stands_in = "" if self.measures_target else f" in place of {artifact.manifest['target']}"
        self.where = f"XLA (jax {artifact.backend.toolchain()['jax']}) on {name}{stands_in}"
        self._stored = weights.arrays(artifact.path / artifact.manifest["weights"])
        self._staged_weights: dict[tuple[str, Any], Any] = {}
        self.held: dict[str, Any] = {}
        self._staged = False
        self._weights: dict[str, Any] = {}
        self._spread: dict[str, Any] = {}
        generator = artifact.generator
        self.caches = [cache.past for cache in generator.caches] if generator is not None else []
        self._programs = [
            (program.inputs, self._load(artifact.path, program)) for program in artifact.programs
        ]
        self.named = {
            program.name: function
            for program, (_, function) in zip(artifact.programs, self._programs, strict=True)
        }
        self.inputs: Sequence[TensorInfo] = artifact.inputs
        if not self._staged:
            self._place(self._stored)

    def _wanted(self) -> int:
        """How many devices to use."""
        return int(self._details["devices"]) if self._on_target else 1

    def _meshes(self) -> str:
        """How the simulated mesh differs from the real one, in words."""
        for program in self._details["programs"].values():
            one = (program.get("stages") or [program])[0]
            real, here = one["partition"]["mesh"], (one["simulated"] or one)["partition"]["mesh"]
            if real != here:
                shape = "x".join(map(str, here.values()))
                return f" (a mesh of {shape} instead of {'x'.join(map(str, real.values()))})"
        return ""

    def _spread_as(self, program: Program) -> tuple[str, Partition]:
        """The export to run, and how it is spread here."""
        details = self._details["programs"][program.name]
        if self._simulated and details["simulated"]:
            table = details["simulated"]
            return table["file"] or program.file, Partition.from_json(table["partition"])
        split = Partition.from_json(details["partition"])
        if not self._on_target:
            return program.file, partition.SINGLE
        if split.kind == "annotated":
            return f"{program.name}.sharded.stablehlo", split
        return program.file, split

    def _load(self, folder: Path, program: Program) -> Any:
        stages = self._details["programs"][program.name].get("stages")
        if stages and (self._on_target or self._simulated):
            return self._chain(folder, program, stages)
        name, split = self._spread_as(program)
        devices = self._devices[: split.devices]
        names = [info.name for info in program.inputs]
        caches = [name for name in names if name in self.caches]
        inputs = [name for name in names if name not in caches]
        function, mesh = self._function(folder / name, split, devices, inputs, caches)
        self._whole = partition.sharding(mesh, [])
        self._spread |= partition.shardings(mesh, split.weights, split.weights)
        if caches:
            self.held = partition.shardings(mesh, caches, split.inputs)
        return function

    def _chain(
        self, folder: Path, program: Program, stages: Sequence[Mapping[str, Any]]
    ) -> pipeline.Chain:
        """The stages of a program, each on its part of the devices as far as there are enough."""
        found = []
        self._staged = True
        for index, stage in enumerate(stages):
            table = stage["simulated"] if self._simulated else stage
            split = Partition.from_json(table["partition"])
            apart = split.devices * len(stages) <= len(self._devices)
            first = index * split.devices if apart else 0
            devices = self._devices[first : first + split.devices]
            caches = [name for name in stage["inputs"] if name in self.caches]
            inputs = [name for name in stage["inputs"] if name not in caches]
            file = folder / table["file"]
            function, mesh = self._function(file, split, devices, inputs, caches)
            self.held |= partition.shardings(mesh, caches, split.inputs)
            given = partition.shardings(mesh, inputs, split.inputs)
            own = self._placed(stage["weights"], mesh, split)
            found.append(pipeline.Link(function, own, inputs, caches, given))
        return pipeline.Chain(found, [info.name for info in program.outputs])

    def _function(
        self,
        file: Path,
        split: Partition,
        devices: Sequence[Any],
        inputs: Sequence[str],
        caches: Sequence[str],
    ) -> tuple[Any, Any]:
        """An export as a function on some devices, and their mesh."""
        import jax
        import jax.export

        from trivium.backends.xla.lowering import precise

        try:
            exported = jax.export.deserialize(bytearray(file.read_bytes()))
        except Exception as error:  # flatbuffers and jax raise many kinds for what is damaged
            raise BadInput(
                f"not a jax export that this jax can read ({one_line(error)})",
                about=str(file),
                remedy="compile the model again",
            ) from error
        mesh = partition.mesh_of(split, devices)
        shardings: tuple[Any, ...] = (None, partition.shardings(mesh, inputs, split.inputs))
        if caches:
            shardings = (*shardings, partition.shardings(mesh, caches, split.inputs))
        with precise():
            function = jax.jit(
                exported.call,
                in_shardings=shardings,
                donate_argnums=(2,) if caches else (),
                compiler_options=platforms.compiler_options(devices[0].platform),
            )
        return function, mesh

    def _placed(self, names: Sequence[str], mesh: Any, split: Partition) -> dict[str, Any]:
        """The weights of a stage on its devices, the same array where another program has it."""
        import jax

        from trivium.backends.xla.lowering import precise

        own = {}
        for name, where in partition.shardings(mesh, names, split.weights).items():
            key = (name, where)
            if key not in self._staged_weights:
                with precise():
                    self._staged_weights[key] = jax.device_put(self._stored[name], where)
            own[name] = self._staged_weights[key]
        return own

    def _place(self, stored: Mapping[str, Any]) -> None:
        import numpy as np

        from trivium.backends.xla.lowering import packing, precise

        # The order of axes is the model's doing, and so the same in all programs.
        orders = next(iter(self._details["programs"].values())).get("packed", {})
        stacks = next(iter(self._details["programs"].values())).get("stacks", {})
        gone = {name for names in stacks.values() for name in names}
        with precise():
            for name, array in stored.items():
                if name not in gone:
                    packed = packing.packed(array, orders.get(name))
                    self._weights[name] = self._put(name, packed)
            # One stack at a time: no more than one is twice in this process's memory.
            for name, names in stacks.items():
                self._weights[name] = self._put(name, np.stack([stored[one] for one in names]))

    def _put(self, name: str, array: Any) -> Any:
        import jax

        return jax.device_put(array, self._spread.get(name, self._whole))

    @property
    def program_inputs(self) -> Sequence[TensorInfo]:
        """Of the first program; the others take the same in other sizes."""
        return self._programs[0][0]

    @property
    def weights(self) -> dict[str, Any]:
        """On the devices, by name."""
        return self._weights

    def run(self, feeds: Tensors) -> dict[str, np.ndarray[Any, Any]]:
        import numpy as np

        from trivium.backends.xla.lowering import precise

        inputs, program = self._program_for(feeds)
        ready = conform_feeds(feeds, inputs)
        _require_agreement(ready, inputs)
        held = {name: ready.pop(name) for name in self.caches if name in ready}
        try:
            with precise():
                results = program(self._weights, ready, *([held] if held else []))
                return {name: np.asarray(value) for name, value in results.items()}
        except Exception as error:  # XLA raises one kind for everything, jax several more
            raise BackendFailed(one_line(error), about="XLA") from error

    def _program_for(self, feeds: Tensors) -> tuple[Sequence[TensorInfo], Any]:
        """The program that takes feeds of these shapes; the only one, if there is but one."""
        import numpy as np

        if len(self._programs) == 1:
            return self._programs[0]
        feeds = conform_feeds(feeds, self.inputs)
        for inputs, program in self._programs:
            if all(_takes(info.shape, np.shape(feeds[info.name])) for info in inputs):
                return inputs, program
        name = self.inputs[0].name
        built = ", ".join(str(list(inputs[0].shape)) for inputs, _ in self._programs)
        raise BadInput(
            f"no program takes {name!r} of shape {list(np.shape(feeds[name]))} with these others",
            about="run",
            remedy=f"built are the shapes {built}; pad to one, or compile with more --shape sizes",
        )


def _takes(declared: Sequence[int | str], sizes: Sequence[int]) -> bool:
    """Whether a program of this shape takes an array of that one."""
    return all(isinstance(d, str) or d == size for d, size in zip(declared, sizes, strict=True))


def _require_agreement(arrays: Tensors, inputs: Sequence[TensorInfo]) -> None:
    """Raise ``BadInput`` where a symbolic dimension has several sizes in one call, or none."""
    seen: dict[str, tuple[str, int]] = {}
    for info in inputs:
        for dim, size in zip(info.shape, arrays[info.name].shape, strict=True):
            if isinstance(dim, int):
                continue
            name, before = seen.setdefault(dim, (info.name, size))
            if before != size:
                raise BadInput(
                    f"{dim} is {before} in {name!r} and {size} in {info.name!r}", about="run"
                )
            if size == 0:
                raise BadInput(f"{dim} is 0 in {info.name!r}", about="run", remedy="give 1 or more")


def is_here(details: Mapping[str, Any]) -> bool:
    """Whether this machine has the devices that an artifact was compiled for."""
    platform = details["device"]["platform"]
    devices = local_devices(platform)
    return devices[0].platform == _JAX_NAME[platform] and len(devices) >= int(details["devices"])


def local_devices(platform: str) -> list[Any]:
    """Return this machine's devices of a platform if it has any, else its CPU.

    Raises:
        ToolchainMissing: jax was imported earlier, and told to leave out the CPU.
    """
    if "jax" not in sys.modules and not any(map(_present, _DEVICE_FILES)):
        _import_jax_for_cpu()
    import jax

    # A device file may be there without a driver or plug-in for it: then jax has no such devices.
    for name in [_JAX_NAME[platform]] * _present(platform) + ["cpu"]:
        with suppress(RuntimeError):
            return list(jax.devices(name))
    raise ToolchainMissing(
        "jax was started without its CPU",
        about="XLA",
        remedy="unset JAX_PLATFORMS, or add cpu to it",
    )


def _present(platform: str) -> bool:
    """Whether this machine has the files of a platform's devices."""
    return any(os.path.exists(file) for file in _DEVICE_FILES.get(platform, ()))


def _import_jax_for_cpu() -> None:
    """Import jax with only the CPU in view, and leave the environment as it was.

    Otherwise jax asks every plug-in that is installed, and libtpu searches the network for a TPU.
    """
    previous = os.environ.get("JAX_PLATFORMS")
    os.environ["JAX_PLATFORMS"] = "cpu"
    try:
        import jax  # noqa: F401
    finally:
        if previous is None:
            del os.environ["JAX_PLATFORMS"]
        else:
            os.environ["JAX_PLATFORMS"] = previous
