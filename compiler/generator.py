"""What a model that generates token by token is: how its caches and inputs are called, how long
a sequence may be, and what a loaded one can do.

A decoder becomes a *generator* when its attention has caches: the same graph then serves prefill
(many new tokens) and decode (one). `Generator` is derived from that graph
(`trivium.compiler.generation.recognize`) and kept in the manifest; `Decoder` is what a loop drives,
whatever the engine.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

if TYPE_CHECKING:
    import numpy as np

    from trivium.compiler.types import TensorInfo

Form = Literal["growing", "static", "shared", "ragged", "stateful"]
"""How caches are kept: ``growing`` by concatenation; ``static``, buffers that are given and come
back, written from one place on; ``shared``, buffers that the engine writes in place; ``ragged``,
the same, with each row written from its own end on: new tokens begin at the left, and the mask is
1 for as many columns as the row has tokens; ``stateful``, growing inside of the engine, as
variables that are called like the inputs they stand for."""

STEP_TOKENS = 512
"""Tokens of the text that a step is predicted and timed for, where the context is as long."""


@dataclass(frozen=True)
class CacheInfo:
    """One cache: an input that holds what was seen and the output that holds the new tokens too.

    Attributes:
        shape: Of the input; a symbolic dimension is its name.
        batch_axis, length_axis: Which axes are the rows and the slots for tokens.
    """

    past: str
    present: str
    dtype: str
    shape: tuple[int | str, ...]
    batch_axis: int = 0
    length_axis: int = 2

    @property
    def bytes_per_token(self) -> int:
        """What one token of one row takes."""
        from trivium.compiler.samples import numpy_dtype

        own = (self.batch_axis, self.length_axis)
        sizes = [d for axis, d in enumerate(self.shape) if axis not in own and isinstance(d, int)]
        return math.prod(sizes) * int(numpy_dtype(self.dtype).itemsize)

    def sized(self, rows: int, length: int) -> tuple[int, ...]:
        """The shape of a buffer."""
        sizes = {self.batch_axis: rows, self.length_axis: length}
        return tuple(sizes[a] if a in sizes else int(d) for a, d in enumerate(self.shape))


@dataclass(frozen=True)
class Role:
    """A program of a generator.

    Attributes:
        tokens: How many new tokens it takes; None: any number.
        logits: After how many of them it gives logits, where the number is fixed.
    """

    program: str
    tokens: int | None = None
    logits: int = 1


@dataclass(frozen=True)
class Sight:
    """How images come into the prompts of a decoder that sees.

    Its program takes embeddings, which the parts before it make of tokens and images.

    Attributes:
        pixels: The input of images, float [images, channels, height, width].
        ids: The input of token ids, of the parts before the decoder.
        token: What stands for an image in a prompt.
        count: How many tokens an image takes the places of.
    """

    pixels: str
    ids: str
    token: int
    count: int


@dataclass(frozen=True)
class Source:
    """How a decoder is given the text that it goes out from.

    Attributes:
        ids, mask: The encoder's inputs, [rows, source].
        target: The decoder's input of tokens.
        start: The token that texts start with.
        memory: What the decoder takes of the encoder at each call.
    """

    ids: str
    mask: str
    target: str
    start: int
    memory: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, table: Mapping[str, Any]) -> Source:
        return cls(**{**table, "memory": tuple(table["memory"])})


@dataclass(frozen=True)
class Generator:
    """How to drive a decoder that has caches.

    Attributes:
        tokens: The input of new token ids, [rows, new]; of their embeddings [rows, new, width]
            with ``sight``.
        mask: The input that is 1 for slots that count, over cache and new tokens; if it has one.
        positions: The input of the new tokens' places in their sequences; if it has one.
        start: The input that says where in static buffers the new tokens go.
        counts: The input of how many of the new tokens of each row count, [rows] (``ragged``).
        chosen: The input of the positions among the new ones whose logits are wanted; without
            one, there are logits for ``kept`` of them.
        kept: ``all`` or ``last``: of which new positions there are logits where nothing chooses.
        logits: The output, [rows, chosen, vocabulary].
        context: How many tokens a row may have in all.
        rows: How many sequences are decoded at once, where the programs fix it.
        eos: Tokens that end a text.
        tokenizer, chat_template: Files of the artifact, where it has them.
        sight: How it is shown images, if it can be.
        source: How it is given the text that an encoder reads, if it has one.
        programs: From many new tokens to one; a single entry of None serves all.
    """

    form: Form
    tokens: str
    logits: str
    vocabulary: int
    caches: tuple[CacheInfo, ...]
    context: int
    mask: str | None = None
    positions: str | None = None
    start: str | None = None
    counts: str | None = None
    chosen: str | None = None
    kept: Literal["all", "last"] = "all"
    rows: int | None = None
    eos: tuple[int, ...] = ()
    bos: int | None = None
    tokenizer: str | None = None
    chat_template: str | None = None
    sight: Sight | None = None
    source: Source | None = None
    programs: tuple[Role, ...] = (Role("main"),)

    @property
    def bytes_per_token(self) -> int:
        """What the caches of one token of one row take."""
        return sum(cache.bytes_per_token for cache in self.caches)

    @property
    def grows(self) -> bool:
        """Whether caches take memory as tokens come, and not all of it from the begin."""
        return self.form in ("growing", "stateful")

    @property
    def checks_any(self) -> bool:
        """Whether one call gives the logits after as many tokens of a row as one likes."""
        fixed = any(role.tokens is not None for role in self.programs)
        return not fixed and (self.chosen is not None or self.kept == "all")

    @property
    def checker(self) -> Role | None:
        """The program that gives the logits after a fixed number of tokens, if there is one."""
        return next((role for role in self.programs if role.logits > 1), None)

    def most_checked(self, rows: int) -> int | None:
        """After how many tokens of each row one call gives logits; None for any number.

        The buffers of several rows that an engine writes in place take one token at a time.
        """
        if self.checks_any:
            return 1 if self.form == "shared" and rows > 1 else None
        return self.checker.logits if self.checker is not None else 1

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, table: Mapping[str, Any]) -> Generator:
        lists = {
            "caches": tuple(
                CacheInfo(**{**cache, "shape": tuple(cache["shape"])}) for cache in table["caches"]
            ),
            "programs": tuple(Role(**role) for role in table["programs"]),
            "eos": tuple(table["eos"]),
        }
        sight, source = table.get("sight"), table.get("source")
        beside = {
            "sight": Sight(**sight) if sight else None,
            "source": Source.from_json(source) if source else None,
        }
        return cls(**{**table, **lists, **beside})


def program_sizes(generator: Generator, inputs: Sequence[TensorInfo]) -> dict[str, dict[str, int]]:
    """The sizes that each program of a generator gives to symbolic dimensions of its inputs."""
    infos = {info.name: info for info in inputs}
    new = infos[generator.tokens].shape[1]
    places = infos[generator.chosen].shape[0] if generator.chosen is not None else None
    return {
        role.program: {
            dim: size
            for dim, size in {new: role.tokens, places: role.logits}.items()
            if isinstance(dim, str) and size
        }
        for role in generator.programs
    }


class Cache(Protocol):
    """The state of some sequences (rows), each with its own length; opaque otherwise."""

    @property
    def lengths(self) -> list[int]:
        """How many tokens each row holds."""
        ...


C = TypeVar("C", bound=Cache)


class Decoder(Protocol[C]):
    """A generator that is loaded: what a generation loop drives.

    Attributes:
        pairs: Whether the engine rounds one token on its own otherwise than several, and what it
            rounds is quantized after, so that the difference can be seen. It then computes any
            even number of tokens alike.
    """

    generator: Generator
    where: str
    pairs: bool

    def start(self, rows: int = 1, capacity: int | None = None) -> C:
        """Return an empty cache with room for ``capacity`` tokens a row (by default the context).

        Raises:
            BackendFailed: It would not fit into the memory; nothing was allocated.
        """
        ...

    def feed(
        self, cache: C, tokens: Sequence[Sequence[int]], keep: int = 1
    ) -> np.ndarray[Any, Any]:
        """Append tokens to each row; return float32 logits [rows, keep, vocabulary].

        They are those after the last ``keep`` tokens of each row; where a row was given fewer,
        what stands before them means nothing.

        Raises:
            BadInput: A row would be longer than the context.
        """
        ...

    def knows(self, token: int) -> bool:
        """Whether a token beyond the vocabulary stands for something that was shown to it."""
        ...

    def truncate(self, cache: C, lengths: Sequence[int]) -> None:
        """Forget the last tokens of rows, so that these lengths are left."""
        ...

    def select(self, cache: C, rows: Sequence[int]) -> C:
        """Return a cache of some rows, in this order; the old one must not be used again."""
        ...

    def join(self, caches: Sequence[C]) -> C:
        """Return one cache with the rows of all; the old ones must not be used again."""
        ...

    def copy(self, cache: C, row: int, length: int) -> C:
        """Return a cache of its own that holds the first tokens of a row."""
        ...
