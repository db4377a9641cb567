"""A generator artifact as an `Executable`: run on whole sequences it gives what the source model
gives; `generator` hands out the decoder that a generation loop drives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from trivium.compiler.generator import Decoder, Generator
from trivium.compiler.samples import conform_feeds
from trivium.compiler.types import TensorInfo

if TYPE_CHECKING:
    import numpy as np

    from trivium.compiler.backend import Tensors


def is_driven(generator: Generator | None, inputs: Iterable[TensorInfo]) -> bool:
    """Whether an artifact was given caches that its source has not: it is then run by its decoder,
    on the source's inputs."""
    names = {info.name for info in inputs}
    return generator is not None and not any(cache.past in names for cache in generator.caches)


class GeneratorExecutable:
    """Runs a decoder as the model that it was made from.

    Args:
        inputs: Of the artifact. Where they hold the caches (the source had some), ``plain`` runs
            the program as it is.
        decoder: The loaded generator.
        plain: Runs the program on feeds for all its inputs.
    """

    def __init__(
        self,
        inputs: Sequence[TensorInfo],
        decoder: Decoder[Any],
        measures_target: bool,
        plain: Callable[[Tensors], dict[str, np.ndarray[Any, Any]]] | None = None,
    ) -> None:
        self.inputs = inputs
        self.where = decoder.where
        self.measures_target = measures_target
        self._decoder, self._plain = decoder, plain

    def generator(self) -> Decoder[Any]:
        """The decoder, over the same weights."""
        return self._decoder

    def run(self, feeds: Tensors) -> dict[str, np.ndarray[Any, Any]]:
        """Return the logits at every token; zeros at padding."""
        import numpy as np

        if self._plain is not None:
            return self._plain(feeds)
        generator = self._decoder.generator
        ready = conform_feeds(feeds, self.inputs)
        ids = ready[generator.tokens]
        kept = np.asarray(ready.get(generator.mask or "", np.ones(ids.shape[:2]))) != 0
        logits = np.zeros((*ids.shape[:2], generator.vocabulary), np.float32)
        for row, (own, keep) in enumerate(zip(ids, kept, strict=True)):
            tokens = self._tokens(own[keep])
            if not tokens:
                continue
            cache = self._decoder.start(capacity=len(tokens))
            logits[row, keep] = self._decoder.feed(cache, [tokens], keep=len(tokens))[0]
        return {generator.logits: logits}

    def _tokens(self, own: np.ndarray[Any, Any]) -> list[int]:
        """The tokens of a row, of which a decoder that sees is given the embeddings."""
        embeddings = getattr(self._decoder, "embeddings", None)
        if embeddings is None:
            return [int(token) for token in own]
        return list(embeddings.add(own))
