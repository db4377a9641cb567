"""The loop that generates: requests come and go at every step, and share each call of the model.

Continuous batching: a request that arrives is read (prefill) and joins those that are being
continued; one that ends leaves at once. A step gives every active request at least one token.
Tokens are also guessed ahead (`speculation`); those that come out are the same either way, and the
same in any company.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from trivium.compiler.errors import BadInput
from trivium.compiler.generation.prefixes import PrefixCache
from trivium.compiler.generation.sampling import LogProbs, Settings, choose, log_probs
from trivium.compiler.generation.slots import free_memory, require_memory
from trivium.compiler.generation.speculation import PromptLookup
from trivium.compiler.generation.tokenizer import StopTexts, TextStream, Tokenizer
from trivium.compiler.generator import Decoder

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

FinishReason = Literal["stop", "length", "cancelled"]

PREFIX_BYTES = 256 << 20
"""What caches of earlier prompts may hold, by default."""


@dataclass(frozen=True)
class Piece:
    """What a step adds to one text; the last one says why it ends.

    Attributes:
        index: Of the request.
    """

    index: int
    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[LogProbs, ...] = ()
    finish_reason: FinishReason | None = None


@dataclass(eq=False)
class Request:
    """One text that is continued, and its state.

    Attributes:
        tokens: Of the prompt, and those generated so far.
        submitted, first_token, finished: Seconds on a monotonic clock; None until then.
    """

    index: int
    prompt: int
    settings: Settings
    tokens: list[int]
    stream: TextStream | None
    stops: StopTexts
    lookup: PromptLookup = field(default_factory=PromptLookup)
    cancelled: bool = False
    finish_reason: FinishReason | None = None
    submitted: float = field(default_factory=time.monotonic)
    first_token: float | None = None
    finished: float | None = None

    @property
    def generated(self) -> list[int]:
        return self.tokens[self.prompt :]


@dataclass
class Counts:
    """What an engine has done since it was made, in tokens and steps."""

    prompt: int = 0
    reused: int = 0
    generated: int = 0
    guessed: int = 0
    accepted: int = 0
    steps: int = 0


class Engine:
    """Continues texts over one decoder.

    Args:
        tokenizer: Without one, pieces have tokens only, and stop texts are refused.
        rows: How many texts are continued at once, at most.
        capacity: Tokens of a text in all; by default the context.
        speculate: Whether to guess tokens ahead.
        prefix_bytes: What caches of earlier prompts may hold.
        exact: Whether a text on its own is fed tokens in pairs where the decoder asks for it
            (`Decoder.pairs`), so that what is guessed changes no digit of any logit.

    Raises:
        BackendFailed: The caches would not fit into the memory.
    """

    def __init__(
        self,
        decoder: Decoder[Any],
        tokenizer: Tokenizer | None,
        *,
        rows: int = 8,
        capacity: int | None = None,
        speculate: bool = True,
        prefix_bytes: int = PREFIX_BYTES,
        exact: bool = True,
    ) -> None:
        generator = decoder.generator
        if not generator.vocabulary:
            raise BadInput(
                f"its output {generator.logits!r} holds no logits over a vocabulary",
                about="generate",
                remedy="export the model with its output projection",
            )
        self.decoder, self.tokenizer = decoder, tokenizer
        self.rows = min(rows, generator.rows or rows)
        self.capacity = min(capacity or generator.context, generator.context)
        self.counts = Counts()
        if capacity is not None:  # asked for; otherwise each text takes what it may need
            require_memory(generator, self.rows, self.capacity)
        self._speculate = speculate
        self._pairs = exact and decoder.pairs and generator.checks_any and not generator.grows
        self._prefixes = PrefixCache(decoder, prefix_bytes)
        self._waiting: deque[Request] = deque()
        self._active: list[Request] = []
        self._cache: Any = None
        self._submitted = 0

    @property
    def busy(self) -> bool:
        """Whether a step has something to do."""
        return bool(self._waiting or self._active)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def active(self) -> int:
        return len(self._active)

    def submit(self, prompt: Sequence[int], settings: Settings) -> Request:
        """Queue a prompt.

        Raises:
            BadInput: It is empty, holds what is no token, or leaves no room for another.
        """
        request = self.prepare(prompt, settings)
        self.enqueue(request)
        return request

    def prepare(self, prompt: Sequence[int], settings: Settings) -> Request:
        """Check a prompt, without queueing it; see `submit`."""
        vocabulary = self.decoder.generator.vocabulary
        wrong = next(
            (t for t in prompt if not (0 <= t < vocabulary or self.decoder.knows(t))), None
        )
        if not prompt:
            raise BadInput("is empty", about="the prompt", remedy="give at least one token")
        if wrong is not None:
            raise BadInput(
                f"holds the token {wrong}, and the vocabulary is {vocabulary}", about="the prompt"
            )
        if len(prompt) >= self.capacity:
            raise BadInput(
                f"has {len(prompt)} tokens, which leaves no room in a context of {self.capacity}",
                about="the prompt",
                remedy="shorten it",
            )
        require_memory(self.decoder.generator, 1, self._room(len(prompt), settings))
        if settings.stop and self.tokenizer is None:
            raise BadInput("needs a tokenizer", about="stop", remedy="compile a folder with one")
        self._submitted += 1
        stream = self.tokenizer.stream() if self.tokenizer is not None else None
        stops = StopTexts(settings.stop)
        return Request(
            self._submitted - 1, len(prompt), settings, [int(t) for t in prompt], stream, stops
        )

    def enqueue(self, request: Request) -> None:
        self._waiting.append(request)

    def reset(self) -> None:
        """Forget all requests, and all that was read."""
        self._waiting.clear()
        self._active = []
        self._cache = None
        self._prefixes.clear()

    def step(self) -> list[Piece]:
        """Give every active request at least one token; return what came of it."""
        self.counts.steps += 1
        pieces = self._leave_cancelled()
        while self._waiting and len(self._active) < self.rows and self._fits(self._waiting[0]):
            pieces.append(self._admit(self._waiting.popleft()))
        # Whoever was admitted has a token already, and gets its next one with the others.
        if self._active:
            pieces += self._decode()
        return pieces

    def _room(self, prompt: int, settings: Settings) -> int:
        """How many tokens a text may come to have."""
        return min(self.capacity, prompt + settings.max_new_tokens)

    def _need(self, request: Request) -> int:
        return self._room(request.prompt, request.settings)

    def _fits(self, request: Request) -> bool:
        """Whether there is memory for one more text, as long as those at work may still become."""
        free = free_memory()
        if free is None or not self._active or not self.decoder.generator.grows:
            return True
        to_come = sum(self._need(one) - len(one.tokens) for one in self._active)
        tokens = to_come + self._need(request)
        return tokens * self.decoder.generator.bytes_per_token <= free

    def _leave_cancelled(self) -> list[Piece]:
        gone = [r for r in (*self._waiting, *self._active) if r.cancelled]
        if not gone:
            return []
        self._waiting = deque(r for r in self._waiting if not r.cancelled)
        self._keep_active([r for r in self._active if not r.cancelled])
        return [self._end(request, "cancelled", "", (), ()) for request in gone]

    def _admit(self, request: Request) -> Piece:
        """Read a prompt, choose its first token, and let it join the others."""
        prompt = request.tokens
        cache, known = self._prefixes.take(prompt)
        if cache is None:
            cache = self.decoder.start(capacity=self._need(request))
        logits = self._read(cache, prompt, known)
        self.counts.prompt += len(prompt)
        self.counts.reused += known
        self._prefixes.keep(prompt, cache, 0)
        request.lookup.extend(prompt)
        piece = self._take(request, logits[0])
        if request.finish_reason is None:
            joined = [self._cache, cache] if self._active else [cache]
            self._cache = self.decoder.join(joined) if len(joined) > 1 else cache
            self._active.append(request)
        return piece

    def _read(self, cache: Any, prompt: list[int], known: int) -> Array:
        """Feed a cache what it does not know of a prompt; return the logits after its end."""
        new = prompt[known:]
        if not self._pairs or len(new) % 2 == 0:
            return self.decoder.feed(cache, [new])
        logits = self.decoder.feed(cache, [[*new, new[-1]]], keep=2)
        self.decoder.truncate(cache, [len(prompt)])
        return logits[:, :1]

    def _decode(self) -> list[Piece]:
        guesses = self._guesses()
        width = max(map(len, guesses))
        filling = [request.tokens[-1] for request in self._active]
        if self._pairs and len(self._active) == 1 and width % 2 == 0:
            width += 1
            if self._speculate:
                filling = [self._active[0].lookup.likely(guesses[0])]
        # All rows get as many tokens, or they would have to be moved: what a text has no guess for
        # is filled up with a token that may come true like any other.
        fed = [
            [r.tokens[-1], *guess, *[fill] * (width - len(guess))]
            for r, guess, fill in zip(self._active, guesses, filling, strict=True)
        ]
        logits = self.decoder.feed(self._cache, fed, keep=width + 1)
        pieces = []
        for request, tokens, guess, rows in zip(self._active, fed, guesses, logits, strict=True):
            piece = self._take(request, rows, tokens[1:], len(guess))
            pieces.append(piece)
        # What was guessed wrong is forgotten; the last token of each has not been fed yet.
        self.decoder.truncate(self._cache, [len(r.tokens) - 1 for r in self._active])
        self._keep_active([request for request in self._active if request.finish_reason is None])
        return pieces

    def _guesses(self) -> list[list[int]]:
        """What may come next in each text; nothing where checking it would not pay.

        A call checks as many tokens of every text, so as many are guessed as half of them have
        guesses for; and no text may outgrow its room.
        """
        none: list[list[int]] = [[] for _ in self._active]
        checked = self.decoder.generator.most_checked(len(self._active))
        room = min(self.capacity - len(request.tokens) for request in self._active) - 1
        most = room if checked is None else min(room, checked - 1)
        if not self._speculate or most < 1:
            return none
        guesses = []
        for request in self._active:
            left = request.settings.max_new_tokens - len(request.generated) - 1
            guesses.append(request.lookup.guess(min(left, most)))
        width = sorted(map(len, guesses))[len(guesses) // 2]
        return [guess[:width] for guess in guesses] if width else none

    def _take(
        self, request: Request, logits: Array, guess: Sequence[int] = (), guessed: int = 0
    ) -> Piece:
        """Choose tokens after those that were fed, as far as what was guessed is what is chosen.

        The first ``guessed`` tokens of a guess are guesses, the rest fills up.
        """
        settings = request.settings
        new: list[int] = []
        reports: list[LogProbs] = []
        text, reason = "", None
        for place, row in enumerate(logits):
            token = choose(row, settings, len(request.tokens))
            new.append(token)
            request.tokens.append(token)
            if settings.logprobs is not None:
                reports.append(log_probs(row, token, settings.logprobs))
            more, reason = self._say(request, token)
            text += more
            if reason is not None or place >= len(guess) or token != guess[place]:
                break
        accepted = len(new) - 1
        request.lookup.learn(guessed, min(accepted, guessed))
        request.lookup.extend(new)
        self.counts.generated += len(new)
        self.counts.guessed += guessed
        self.counts.accepted += min(accepted, guessed)
        request.first_token = request.first_token or time.monotonic()
        if reason is not None:
            return self._end(request, reason, text, tuple(new), tuple(reports))
        return Piece(request.index, text, tuple(new), tuple(reports))

    def _say(self, request: Request, token: int) -> tuple[str, FinishReason | None]:
        """The text that a token adds, and whether the request ends with it."""
        over = token in self.decoder.generator.eos
        full = len(request.generated) >= request.settings.max_new_tokens
        full = full or len(request.tokens) >= self.capacity
        reason: FinishReason | None = "stop" if over else "length" if full else None
        if request.stream is None:
            return "", reason
        more = "" if over else request.stream.push(token)
        more += request.stream.finish() if reason is not None else ""
        text, stopped = request.stops.push(more)
        if stopped:
            return text, "stop"
        return text + (request.stops.finish() if reason is not None else ""), reason

    def _end(
        self,
        request: Request,
        reason: FinishReason,
        text: str,
        tokens: tuple[int, ...],
        reports: tuple[LogProbs, ...],
    ) -> Piece:
        request.finish_reason = reason
        request.finished = time.monotonic()
        return Piece(request.index, text, tokens, reports, reason)

    def _keep_active(self, kept: list[Request]) -> None:
        """Let the requests leave that have ended; what they have read stays known for a while."""
        if len(kept) == len(self._active):
            return
        for row, request in enumerate(self._active):
            if request.finish_reason is not None:
                known = request.tokens[: self._cache.lengths[row]]
                self._prefixes.keep(known, self._cache, row)
        rows = [row for row, request in enumerate(self._active) if request in kept]
        self._cache = self.decoder.select(self._cache, rows) if rows else None
        self._active = kept
