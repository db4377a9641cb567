"""The engine in a thread of its own, and the way from coroutines to it and back."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace

from trivium.compiler.errors import BackendFailed, TriviumError
from trivium.compiler.generation.engine import Engine, Piece, Request
from trivium.compiler.generation.sampling import Settings

_LOG = logging.getLogger(__name__)


class QueueFull(TriviumError):
    """More is waiting than the server lets wait."""

    exit_code = 5


@dataclass(eq=False)
class Ticket:
    """Some requests that belong together, and where their pieces arrive."""

    requests: Sequence[Request]
    arrivals: asyncio.Queue[Piece | TriviumError]
    loop: asyncio.AbstractEventLoop

    def send(self, what: Piece | TriviumError) -> None:
        # The loop may be gone when a server is being shut down.
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.arrivals.put_nowait, what)


class EngineLoop:
    """Runs an engine as long as it has something to do.

    Args:
        most_waiting: How many requests may wait; further ones are refused.
    """

    def __init__(self, engine: Engine, most_waiting: int) -> None:
        self.engine = engine
        self.failures = 0
        self._most = most_waiting
        self._inbox: list[Ticket] = []
        self._tickets: dict[int, tuple[Ticket, int]] = {}  # of requests that have not ended
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="trivium-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Finish the step at work, and no other."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def waiting(self) -> int:
        return self.engine.waiting + self._arriving

    @property
    def pending(self) -> int:
        """How many requests have not ended, or whose end nobody was told yet."""
        return len(self._tickets) + self._arriving

    @property
    def _arriving(self) -> int:
        return sum(len(ticket.requests) for ticket in self._inbox)

    def submit(self, prompts: Sequence[tuple[Sequence[int], Settings]]) -> Ticket:
        """Queue prompts; called from a coroutine.

        Raises:
            BadInput: One of them cannot be continued; none is queued.
            QueueFull: Too many are waiting.
        """
        requests = [self.engine.prepare(prompt, settings) for prompt, settings in prompts]
        ticket = Ticket(requests, asyncio.Queue(), asyncio.get_running_loop())
        with self._changed:
            here = self.pending
            if here + len(requests) > self.engine.rows + self._most:
                raise QueueFull(f"{here} requests are at work or wait", remedy="try again later")
            self._inbox.append(ticket)
            self._changed.notify()
        return ticket

    async def pieces(self, ticket: Ticket) -> AsyncIterator[Piece]:
        """Yield what is added to each request of a ticket (``index``: its place in it).

        Whoever stops reading cancels what is left.
        """
        ended = 0
        try:
            while ended < len(ticket.requests):
                what = await ticket.arrivals.get()
                if isinstance(what, TriviumError):
                    raise what
                ended += what.finish_reason is not None
                yield what
        finally:
            for request in ticket.requests:
                request.cancelled = request.finish_reason is None

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._stopping or self._inbox or self.engine.busy):
                    self._changed.wait()
                if self._stopping:
                    break
                arrived, self._inbox = self._inbox, []
                for ticket in arrived:
                    for place, request in enumerate(ticket.requests):
                        self._tickets[request.index] = (ticket, place)
                        self.engine.enqueue(request)
            try:
                pieces = self.engine.step()
            except Exception as error:  # whatever an engine raises, the server goes on
                _LOG.exception("a step of the engine failed")
                self._fail(error)
                continue
            for piece in pieces:
                self._deliver(piece)
        self._fail(BackendFailed("the server is shutting down"))

    def _deliver(self, piece: Piece) -> None:
        ticket, place = self._tickets[piece.index]
        if piece.finish_reason is not None:
            del self._tickets[piece.index]
        ticket.send(replace(piece, index=place))

    def _fail(self, error: Exception) -> None:
        """Tell everybody whose texts are lost, and begin anew."""
        self.failures += 1
        known = isinstance(error, TriviumError)
        told = error if known else BackendFailed(f"the engine failed ({type(error).__name__})")
        self.engine.reset()
        for ticket in {id(ticket): ticket for ticket, _ in self._tickets.values()}.values():
            ticket.send(told)  # type: ignore[arg-type]
        self._tickets.clear()
