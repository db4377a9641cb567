"""Driving a decoder whose caches are variables of OpenVINO: one inference request for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from trivium.backends.openvino import engine
from trivium.backends.openvino.stateful import BEAMS
from trivium.compiler.artifact import Artifact
from trivium.compiler.backend import Executable, Tensors
from trivium.compiler.errors import BackendFailed
from trivium.compiler.generation.executable import GeneratorExecutable, is_driven
from trivium.compiler.generation.slots import SlotDecoder
from trivium.compiler.generator import Generator
from trivium.compiler.samples import conform_feeds, numpy_dtype
from trivium.compiler.types import TensorInfo

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]


def load(artifact: Artifact, generator: Generator) -> Executable:
    """Load the artifact of a generator so that it can be driven."""
    program, details = artifact.programs[0], artifact.manifest["details"]
    precision, held = details["precision"], details["kv_cache_precision"]
    try:
        compiled = engine.compile_file(str(artifact.path / program.file), precision, held)
    except Exception as error:  # openvino raises RuntimeError, and what pybind makes of others
        raise BackendFailed(engine.reason(error), about="openvino") from error
    where = f"{engine.name()} on this CPU, {precision}, caches {held}"
    decoder = OpenVinoDecoder(generator, compiled, where)
    if is_driven(generator, artifact.inputs):
        return GeneratorExecutable(artifact.inputs, decoder, True)
    outputs = [str(info["name"]) for info in artifact.manifest["outputs"]]

    def run(feeds: Tensors) -> dict[str, Array]:
        return decoder.run(conform_feeds(feeds, artifact.inputs), outputs)

    return GeneratorExecutable(artifact.inputs, decoder, True, run)


class OpenVinoDecoder(SlotDecoder):
    """A compiled model whose requests hold a cache each; see `SlotDecoder`.

    A cache's buffers are a list of one: its request.
    """

    def __init__(self, generator: Generator, compiled: Any, where: str) -> None:
        super().__init__(generator)
        self.where = where
        self._compiled = compiled
        self._dtypes = {
            name: numpy_dtype(port.get_element_type().to_dtype().name)
            for port in compiled.inputs
            for name in port.names
        }

    def _empty(self, rows: int, length: int) -> list[Any]:
        return [self._compiled.create_infer_request()]

    def _call(self, feeds: Mapping[str, Array], buffers: list[Any]) -> tuple[Array, list[Any]]:
        import numpy as np

        given = {n: np.ascontiguousarray(a.astype(self._dtypes[n])) for n, a in feeds.items()}
        if BEAMS in self._dtypes:
            given[BEAMS] = np.arange(len(feeds[self.generator.tokens]), dtype=np.int32)
        try:
            # Inputs are shared, for they live until the call ends; outputs are copied out of it.
            results = buffers[0].infer(given, share_inputs=True)
        except Exception as error:  # as above
            raise BackendFailed(engine.reason(error), about="openvino") from error
        return results[0], buffers

    def _arrange(
        self, buffers: Sequence[Sequence[Any]], places: Sequence[tuple[int, int]], slots: Array
    ) -> list[Any]:
        import numpy as np

        held = [_states(own[0]) for own in buffers]
        request = self._compiled.create_infer_request()
        if not slots.shape[1]:
            return [request]
        made = {}
        for cache in self.generator.caches:
            axes = (cache.batch_axis, cache.length_axis)
            shape = cache.sized(len(places), slots.shape[1])
            made[cache.past] = np.zeros(shape, numpy_dtype(cache.dtype))
            rows = np.moveaxis(made[cache.past], axes, (0, 1))
            for row, (source, place) in enumerate(places):
                wanted = slots[row] >= 0
                if wanted.any():
                    old = np.moveaxis(held[source][cache.past].state.data, axes, (0, 1))
                    rows[row][wanted] = old[place, slots[row][wanted]]
        _set(request, made)
        return [request]

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
        """Run once on feeds that hold the caches; return outputs, the caches among them."""
        request = self._compiled.create_infer_request()
        pasts = {cache.past: cache.present for cache in self.generator.caches}
        held = {name: feeds[name] for name in pasts}
        if all(array.size for array in held.values()):
            _set(request, held)
        small = {name: array for name, array in feeds.items() if name not in pasts}
        logits, _ = self._call(small, [request])
        after = {pasts[name]: state.state.data.copy() for name, state in _states(request).items()}
        known = {**after, self.generator.logits: logits}
        return {name: known[name] for name in outputs}


def _states(request: Any) -> dict[str, Any]:
    return {state.name: state for state in request.query_state()}


def _set(request: Any, arrays: Mapping[str, Array]) -> None:
    import numpy as np
    import openvino

    states = _states(request)
    for name, array in arrays.items():
        states[name].state = openvino.Tensor(np.ascontiguousarray(array))


def program_inputs(
    inputs: Sequence[TensorInfo], generator: Generator, beams: bool
) -> tuple[TensorInfo, ...]:
    """What the program takes at each call: what the graph takes, but for the caches."""
    pasts = {cache.past for cache in generator.caches}
    left = tuple(info for info in inputs if info.name not in pasts)
    tokens = next(info for info in left if info.name == generator.tokens)
    return (*left, TensorInfo(BEAMS, "int32", tokens.shape[:1])) if beams else left
