"""Generating text from Python: an artifact, loaded once, that continues prompts.

>>> generator = TextGenerator("artifact")                              # doctest: +SKIP
>>> for piece in generator.stream(["Once upon"], Settings(max_new_tokens=20)):
...     print(piece.text, end="")                                      # doctest: +SKIP
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from trivium.compiler.artifact import Artifact
from trivium.compiler.errors import BadInput
from trivium.compiler.generation.engine import PREFIX_BYTES, Engine, FinishReason, Piece, Request
from trivium.compiler.generation.sampling import LogProbs, Settings
from trivium.compiler.generation.tokenizer import Tokenizer
from trivium.compiler.generator import Decoder

GREEDY = Settings()

Prompt = str | Sequence[int]
"""A text, or its tokens."""


@dataclass(frozen=True)
class Completion:
    """A text that was generated.

    Attributes:
        prompt_tokens: How many the prompt has.
        first_token_s: Seconds from asking to the first token.
        tokens_per_s: Of the tokens after the first one; None if there is none.
    """

    text: str | None
    tokens: tuple[int, ...]
    prompt_tokens: int
    finish_reason: FinishReason
    first_token_s: float
    tokens_per_s: float | None
    logprobs: tuple[LogProbs, ...] = ()

    def to_json(self) -> dict[str, Any]:
        document = asdict(self)
        if not self.logprobs:
            document.pop("logprobs")
        return document


class TextGenerator:
    """A generator artifact, loaded.

    Args:
        artifact: It, or its folder.
        rows: How many texts are continued at once, at most.
        capacity: Tokens of a text in all; by default the model's context.
        speculate: Whether to guess tokens ahead: the same tokens, sooner where texts repeat.
        prefix_bytes: What caches of earlier prompts may hold.
        exact: Whether a text on its own comes out the same to the last digit whatever is guessed,
            at a price where weights have four bits; see `Engine`.

    Raises:
        BadInput: It is no generator.
        BackendFailed: The caches would not fit into the memory.
    """

    def __init__(
        self,
        artifact: Artifact | str | os.PathLike[str],
        *,
        rows: int = 8,
        capacity: int | None = None,
        speculate: bool = True,
        prefix_bytes: int = PREFIX_BYTES,
        exact: bool = True,
    ) -> None:
        artifact = artifact if isinstance(artifact, Artifact) else Artifact.open(artifact)
        self.artifact = artifact
        generator = artifact.generator
        if generator is None:
            raise BadInput(
                "is no generator",
                about=str(artifact.path),
                remedy="compile a decoder with --generator, or its checkpoint folder",
            )
        has_tokenizer = generator.tokenizer is not None
        self.tokenizer = Tokenizer(artifact) if has_tokenizer else None
        self.decoder: Decoder[Any] = artifact.load().generator()  # type: ignore[attr-defined]
        self.engine = Engine(
            self.decoder,
            self.tokenizer,
            rows=rows,
            capacity=capacity,
            speculate=speculate,
            prefix_bytes=prefix_bytes,
            exact=exact,
        )

    def encode(self, prompt: Prompt) -> list[int]:
        """Return the tokens of a prompt.

        Raises:
            BadInput: It is a text, and the artifact has no tokenizer.
        """
        tokens = self._tokens(prompt)
        sources = getattr(self.decoder, "sources", None)
        return tokens if sources is None or not tokens else [sources.read(tokens)]

    def _tokens(self, prompt: Prompt) -> list[int]:
        if not isinstance(prompt, str):
            return [int(token) for token in prompt]
        if self.tokenizer is None:
            raise BadInput(
                "it carries no tokenizer",
                about=str(self.artifact.path),
                remedy="give tokens (--prompt-ids)",
            )
        return self.tokenizer.encode(prompt)

    def see(self, prompt: Prompt, images: Sequence[str | os.PathLike[str] | Any]) -> list[int]:
        """Return the tokens of a prompt with images in it, to be continued like any other.

        Args:
            prompt: It has a place for each image, ``<image>`` as a rule.
            images: Files, or arrays float [channels, height, width], normalized.

        Raises:
            BadInput: The model sees no images, or the prompt has not as many places.
        """
        import numpy as np

        from trivium.compiler.generation import images as image_files
        from trivium.compiler.generation.seeing import with_images

        embeddings = getattr(self.decoder, "embeddings", None)
        if embeddings is None:
            raise BadInput("it sees no images", about=str(self.artifact.path))
        pixels = next(i for i in self.artifact.inputs if i.name == embeddings.sight.pixels)
        read = [
            np.asarray(image, np.float32)
            if isinstance(image, np.ndarray)
            else image_files.read(Path(image), self.artifact, pixels)
            for image in images
        ]
        return with_images(self.encode(prompt), read, embeddings)

    def stream(
        self, prompts: Sequence[Prompt], settings: Settings | Sequence[Settings] = GREEDY
    ) -> Iterator[Piece]:
        """Continue prompts together; yield what is added to each (``index`` says to which)."""
        return self.pieces(self.submit(prompts, settings))

    def complete(
        self, prompts: Sequence[Prompt], settings: Settings | Sequence[Settings] = GREEDY
    ) -> list[Completion]:
        """Continue prompts together, to their ends."""
        requests = self.submit(prompts, settings)
        gathered = Gathered(len(requests))
        for piece in self.pieces(requests):
            gathered.add(piece)
        return gathered.completions(requests)

    def submit(
        self, prompts: Sequence[Prompt], settings: Settings | Sequence[Settings] = GREEDY
    ) -> list[Request]:
        """Queue prompts, all or none; `pieces` continues them.

        Raises:
            BadInput: One is empty, too long, or not of the model's tokens.
        """
        each = [settings] * len(prompts) if isinstance(settings, Settings) else list(settings)
        pairs = zip(prompts, each, strict=True)
        requests = [self.engine.prepare(self.encode(prompt), own) for prompt, own in pairs]
        for request in requests:
            self.engine.enqueue(request)
        return requests

    def pieces(self, requests: Sequence[Request]) -> Iterator[Piece]:
        """Yield what is added to queued requests; ``index`` is the place in the sequence.

        A caller that stops reading cancels what is left of them.
        """
        places = {request.index: place for place, request in enumerate(requests)}
        try:
            while any(request.finish_reason is None for request in requests):
                for piece in self.engine.step():
                    if piece.index in places:
                        yield replace(piece, index=places[piece.index])
        finally:
            for request in requests:
                request.cancelled = request.finish_reason is None


class Gathered:
    """Pieces of several texts, put together."""

    def __init__(self, count: int) -> None:
        self._pieces: list[list[Piece]] = [[] for _ in range(count)]

    def add(self, piece: Piece) -> None:
        self._pieces[piece.index].append(piece)

    def completions(self, requests: Sequence[Request]) -> list[Completion]:
        return [
            _completion(pieces, request)
            for pieces, request in zip(self._pieces, requests, strict=True)
        ]


def _completion(pieces: Sequence[Piece], request: Request) -> Completion:
    first, last = request.first_token, request.finished
    assert first is not None
    assert last is not None
    tokens = tuple(token for piece in pieces for token in piece.tokens)
    rest = last - first
    return Completion(
        text="".join(piece.text for piece in pieces) if request.stream is not None else None,
        tokens=tokens,
        prompt_tokens=request.prompt,
        finish_reason=request.finish_reason or "cancelled",
        first_token_s=first - request.submitted,
        tokens_per_s=(len(tokens) - 1) / rest if len(tokens) > 1 and rest > 0 else None,
        logprobs=tuple(report for piece in pieces for report in piece.logprobs),
    )


def generate(
    artifact: Artifact | str | os.PathLike[str], prompt: Prompt, **settings: Any
) -> Iterator[Piece]:
    """Continue one prompt; yield what is added, as it comes.

    Args:
        settings: Those of `Settings`: ``max_new_tokens=64``, ``temperature=0.8``, ...
    """
    asked = Settings(**settings)
    return TextGenerator(artifact, rows=1, prefix_bytes=0).stream([prompt], asked)
