"""The application: routes, streams, deadlines, and clients that vanish."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from trivium.compiler.errors import BadInput, TriviumError
from trivium.compiler.generation.engine import Piece
from trivium.compiler.generation.text import TextGenerator
from trivium.compiler.generation.tokenizer import Tokenizer
from trivium.compiler.serving import requests
from trivium.compiler.serving.loop import EngineLoop, QueueFull, Ticket
from trivium.compiler.serving.metrics import Metrics
from trivium.compiler.serving.requests import Asked
from trivium.compiler.serving.responses import Response, failure

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request as HttpRequest
    from starlette.responses import Response as HttpResponse

_MOST_BODY = 8 << 20
"""Bytes of a request."""


@dataclass(frozen=True)
class Limits:
    """What a server lets its clients do.

    Attributes:
        waiting: How many requests may wait for their turn.
        seconds: After how long a request is given up.
    """

    waiting: int = 64
    seconds: float = 300.0


class _Late(TriviumError):
    exit_code = 5


class _Unknown(TriviumError):
    exit_code = 2


_STATUS: Mapping[type[TriviumError], tuple[int, str]] = {
    _Late: (504, "timeout"),
    _Unknown: (404, "not_found_error"),
    QueueFull: (429, "rate_limit_error"),
    BadInput: (400, "invalid_request_error"),
}
"""How errors are told; whatever else is the server's own."""


def _status(error: TriviumError) -> tuple[int, str]:
    found = (told for kind, told in _STATUS.items() if isinstance(error, kind))
    return next(found, (500, "server_error"))


class Server:
    """A generator, its engine's thread, and the handlers of its routes."""

    def __init__(self, generator: TextGenerator, name: str, limits: Limits) -> None:
        if generator.tokenizer is None:
            raise BadInput(
                "it carries no tokenizer",
                about=str(generator.artifact.path),
                remedy="compile a checkpoint folder that has one",
            )
        self.name, self.limits = name, limits
        self.generator = generator
        self.tokenizer: Tokenizer = generator.tokenizer
        self.loop = EngineLoop(generator.engine, limits.waiting)
        self.metrics = Metrics(self.loop)
        self.started = int(time.time())

    def application(self) -> Starlette:
        from starlette.applications import Starlette
        from starlette.routing import Route

        @asynccontextmanager
        async def lifespan(app: Starlette) -> AsyncIterator[None]:
            self.loop.start()
            try:
                yield
            finally:
                await asyncio.to_thread(self.loop.stop)

        return Starlette(
            lifespan=lifespan,
            routes=[
                Route("/health", self.health),
                Route("/metrics", self.exposition),
                Route("/v1/models", self.models),
                Route("/v1/completions", self._counted(self.completions), methods=["POST"]),
                Route("/v1/chat/completions", self._counted(self.chat), methods=["POST"]),
            ],
        )

    async def health(self, request: HttpRequest) -> HttpResponse:
        from starlette.responses import JSONResponse

        alive = self.loop.alive
        return JSONResponse(
            {
                "status": "ok" if alive else "the engine has ended",
                "model": self.name,
                "where": self.generator.decoder.where,
                "active": self.loop.engine.active,
                "waiting": self.loop.waiting,
            },
            status_code=200 if alive else 503,
        )

    async def exposition(self, request: HttpRequest) -> HttpResponse:
        from starlette.responses import Response as Plain

        text, kind = self.metrics.text()
        return Plain(text, headers={"content-type": kind})

    async def models(self, request: HttpRequest) -> HttpResponse:
        from starlette.responses import JSONResponse

        row = {"id": self.name, "object": "model", "created": self.started, "owned_by": "trivium"}
        return JSONResponse({"object": "list", "data": [row]})

    async def completions(self, request: HttpRequest) -> HttpResponse:
        body = await self._body(request)
        asked = requests.completion(body, seed=secrets.randbits(31))
        return await self._answer(request, asked, chat=False)

    async def chat(self, request: HttpRequest) -> HttpResponse:
        body = await self._body(request)
        most = self.generator.engine.capacity
        asked = requests.chat(body, seed=secrets.randbits(31), most_tokens=most)
        prompts = tuple(self.tokenizer.chat(messages) for messages in asked.prompts)
        return await self._answer(request, replace(asked, prompts=prompts), chat=True)

    def _counted(
        self, handler: Callable[[HttpRequest], Awaitable[HttpResponse]]
    ) -> Callable[[HttpRequest], Awaitable[HttpResponse]]:
        """A handler whose errors are told as the API tells them, and whose answers are counted."""
        from starlette.responses import JSONResponse

        async def handle(request: HttpRequest) -> HttpResponse:
            try:
                response = await handler(request)
            except TriviumError as error:
                status, kind = _status(error)
                headers = {"retry-after": "1"} if status == 429 else None
                response = JSONResponse(failure(error, kind), status, headers)
            self.metrics.requests.labels(request.url.path, response.status_code).inc()
            return response

        return handle

    async def _body(self, request: HttpRequest) -> Any:
        parts, size = [], 0
        async for part in request.stream():
            parts.append(part)
            size += len(part)
            if size > _MOST_BODY:
                raise BadInput(f"has more than {_MOST_BODY} bytes", about="the request")
        try:
            body = json.loads(b"".join(parts))
        except (ValueError, RecursionError) as error:
            raise BadInput("is not JSON", about="the request") from error
        name = body.get("model") if isinstance(body, dict) else None
        if name is not None and name != self.name:
            raise _Unknown(
                f"there is no such model {name!r}"[:100], remedy=f"this is {self.name!r}"
            )
        return body

    async def _answer(self, request: HttpRequest, asked: Asked, *, chat: bool) -> HttpResponse:
        from starlette.responses import JSONResponse, StreamingResponse

        prompts = [self.generator.encode(prompt) for prompt in asked.prompts]
        ticket = self.loop.submit(
            [(prompt, settings) for prompt in prompts for settings in asked.settings]
        )
        response = Response(chat, self.name, self.tokenizer, sum(map(len, prompts)))
        if asked.stream:
            events = self._events(ticket, response, asked.include_usage)
            return StreamingResponse(events, media_type="text/event-stream")
        choices = await self._unless_gone(request, self._gather(ticket))
        return JSONResponse(response.whole(choices))

    async def _gather(self, ticket: Ticket) -> list[list[Piece]]:
        choices: list[list[Piece]] = [[] for _ in ticket.requests]
        async for piece in self._timed(ticket):
            choices[piece.index].append(piece)
        return choices

    async def _unless_gone(
        self, request: HttpRequest, work: Awaitable[list[list[Piece]]]
    ) -> list[list[Piece]]:
        """Await some work, but not for a client that hangs up."""

        async def gone() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass

        working, watching = asyncio.ensure_future(work), asyncio.ensure_future(gone())
        try:
            await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                raise BadInput("the client is gone", about="the request")
            return working.result()
        finally:
            for task in (working, watching):
                task.cancel()
            await asyncio.gather(working, watching, return_exceptions=True)

    async def _events(
        self, ticket: Ticket, response: Response, include_usage: bool
    ) -> AsyncIterator[str]:
        """The events of a stream; an error is the last of them."""
        for event in response.opening(len(ticket.requests)):
            yield _event(event)
        try:
            async for piece in self._timed(ticket):
                if piece.text or piece.logprobs or piece.finish_reason is not None:
                    yield _event(response.chunk(piece))
                else:
                    response.generated += len(piece.tokens)
        except TriviumError as error:
            yield _event(failure(error, _status(error)[1]))
            return
        if include_usage:
            yield _event(response.closing())
        yield "data: [DONE]\n\n"

    async def _timed(self, ticket: Ticket) -> AsyncIterator[Piece]:
        """The pieces of a ticket until the deadline, and how long they took."""
        began = time.monotonic()
        latest: dict[int, float] = {}
        pieces = self.loop.pieces(ticket)
        try:
            while True:
                left = began + self.limits.seconds - time.monotonic()
                try:
                    # Not wait_for: in Python 3.11 it may swallow a cancellation.
                    async with asyncio.timeout(max(left, 0)):
                        piece = await anext(pieces)
                except StopAsyncIteration:
                    return
                except TimeoutError as error:
                    seconds = f"{self.limits.seconds:g} s"
                    raise _Late(f"not done after {seconds}", about="the request") from error
                now = time.monotonic()
                if piece.index not in latest:
                    self.metrics.first_token.observe(now - began)
                elif piece.tokens:
                    taken = (now - latest[piece.index]) / len(piece.tokens)
                    self.metrics.each_token.observe(taken)
                latest[piece.index] = now
                yield piece
        finally:
            await pieces.aclose()  # type: ignore[attr-defined]


def _event(document: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(document, ensure_ascii=False)}\n\n"
