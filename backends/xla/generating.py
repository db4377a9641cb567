"""Driving a decoder with static caches in XLA: one program for each number of new tokens, over
caches that stay on the devices and are donated from call to call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from trivium.compiler.artifact import Artifact
from trivium.compiler.backend import Executable
from trivium.compiler.errors import BackendFailed
from trivium.compiler.generation.executable import GeneratorExecutable, is_driven
from trivium.compiler.generation.slots import SlotDecoder
from trivium.compiler.generator import Generator
from trivium.compiler.onnx_api import one_line
from trivium.compiler.samples import numpy_dtype

if TYPE_CHECKING:
    import numpy as np

    from trivium.backends.xla.executable import XlaExecutable

    Array = np.ndarray[Any, Any]


def load(artifact: Artifact, *, simulated: bool = False) -> Executable:
    """Load an artifact, a generator so that it can be driven; see `XlaExecutable`."""
    from trivium.backends.xla.executable import XlaExecutable

    executable = XlaExecutable(artifact, simulated=simulated)
    if artifact.generator is None:
        return executable
    decoder = XlaDecoder(artifact.generator, executable)
    plain = None if is_driven(artifact.generator, artifact.inputs) else executable.run
    return GeneratorExecutable(artifact.inputs, decoder, executable.measures_target, plain)


class XlaDecoder(SlotDecoder):
    """The programs of an artifact over one copy of the weights; see `SlotDecoder`."""

    def __init__(self, generator: Generator, executable: XlaExecutable) -> None:
        super().__init__(generator)
        self.where = executable.where
        self._executable = executable
        self._programs = {
            (role.tokens, role.logits): executable.named[role.program]
            for role in generator.programs
        }
        self._dtypes = {info.name: numpy_dtype(info.dtype) for info in executable.program_inputs}

    def _empty(self, rows: int, length: int) -> list[Any]:
        import jax
        import numpy as np

        from trivium.backends.xla.lowering import precise

        with precise():
            return [
                jax.device_put(
                    np.zeros(cache.sized(rows, length), numpy_dtype(cache.dtype)),
                    self._executable.held[cache.past],
                )
                for cache in self.generator.caches
            ]

    def _call(self, feeds: Mapping[str, Array], buffers: list[Any]) -> tuple[Array, list[Any]]:
        import numpy as np

        from trivium.backends.xla.lowering import precise

        caches = self.generator.caches
        places = feeds[self.generator.chosen].size if self.generator.chosen is not None else 1
        program = self._programs[feeds[self.generator.tokens].shape[1], places]
        given = {name: array.astype(self._dtypes[name]) for name, array in feeds.items()}
        held = {cache.past: buffer for cache, buffer in zip(caches, buffers, strict=True)}
        try:
            with precise():
                found = program(self._executable.weights, given, held)
                logits = np.asarray(found[self.generator.logits])
        except Exception as error:  # XLA raises one kind for everything, jax several more
            raise BackendFailed(one_line(error), about="XLA") from error
        return logits, [found[cache.present] for cache in caches]

    def _arrange(
        self, buffers: Sequence[Sequence[Any]], places: Sequence[tuple[int, int]], slots: Array
    ) -> list[Any]:
        import jax
        import jax.numpy as jnp
        import numpy as np

        from trivium.backends.xla.lowering import precise

        arranged = []
        with precise():
            for index, cache in enumerate(self.generator.caches):
                axes = (cache.batch_axis, cache.length_axis)
                held = [jnp.moveaxis(own[index], axes, (0, 1)) for own in buffers]
                length = held[0].shape[1]
                rows = jnp.stack([held[source][place] for source, place in places])
                where = np.zeros((len(places), length), np.int64)
                where[:, : slots.shape[1]] = np.maximum(slots, 0)
                where = where.reshape(*where.shape, *[1] * (rows.ndim - 2))
                moved = jnp.moveaxis(jnp.take_along_axis(rows, where, axis=1), (0, 1), axes)
                arranged.append(jax.device_put(moved, self._executable.held[cache.past]))
        return arranged
