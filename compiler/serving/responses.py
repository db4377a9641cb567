"""Responses of OpenAI's API: whole, or piece by piece."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trivium.compiler.errors import TriviumError
from trivium.compiler.generation.engine import Piece
from trivium.compiler.generation.sampling import LogProbs
from trivium.compiler.generation.tokenizer import Tokenizer

Json = dict[str, Any]


@dataclass
class Response:
    """One response in the making.

    Attributes:
        chat: Whether it is of ``/v1/chat/completions``.
        prompt_tokens: Of all prompts, each counted once.
    """

    chat: bool
    model: str
    tokenizer: Tokenizer
    prompt_tokens: int
    generated: int = 0
    identifier: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, choices: Sequence[Sequence[Piece]]) -> Json:
        """The response to a request that does not stream."""
        kind = "chat.completion" if self.chat else "text_completion"
        rows = []
        for index, pieces in enumerate(choices):
            text = "".join(piece.text for piece in pieces)
            reports = [report for piece in pieces for report in piece.logprobs]
            self.generated += sum(len(piece.tokens) for piece in pieces)
            said: Json = {"message": {"role": "assistant", "content": text}}
            rows.append(
                {
                    "index": index,
                    **(said if self.chat else {"text": text}),
                    "logprobs": self._logprobs(reports),
                    "finish_reason": pieces[-1].finish_reason,
                }
            )
        return {**self._head(kind), "choices": rows, "usage": self.usage()}

    def opening(self, choices: int) -> list[Json]:
        """What a stream begins with: whose turn it is."""
        if not self.chat:
            return []
        delta = {"role": "assistant", "content": ""}
        return [
            self._chunk([{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}])
            for index in range(choices)
        ]

    def chunk(self, piece: Piece) -> Json:
        """One event of a stream."""
        self.generated += len(piece.tokens)
        said: Json = {"delta": {"content": piece.text} if piece.text else {}}
        return self._chunk(
            [
                {
                    "index": piece.index,
                    **(said if self.chat else {"text": piece.text}),
                    "logprobs": self._logprobs(piece.logprobs),
                    "finish_reason": piece.finish_reason,
                }
            ]
        )

    def closing(self) -> Json:
        """The event that counts tokens, for a stream that asked for it."""
        return {**self._chunk([]), "usage": self.usage()}

    def usage(self) -> Json:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.generated,
            "total_tokens": self.prompt_tokens + self.generated,
        }

    def _chunk(self, choices: Sequence[Json]) -> Json:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return {**self._head(kind), "choices": list(choices)}

    def _head(self, kind: str) -> Json:
        prefix = "chatcmpl" if self.chat else "cmpl"
        return {
            "id": f"{prefix}-{self.identifier}",
            "object": kind,
            "created": self.created,
            "model": self.model,
        }

    def _logprobs(self, reports: Sequence[LogProbs]) -> Json | None:
        if not reports:
            return None
        if self.chat:
            return {"content": [self._report(one) for one in reports]}
        return {
            "tokens": [self._text(one.token) for one in reports],
            "token_logprobs": [one.logprob for one in reports],
            "top_logprobs": [
                {self._text(token): logprob for token, logprob in one.top} for one in reports
            ],
        }

    def _report(self, report: LogProbs) -> Json:
        def entry(token: int, logprob: float) -> Json:
            text = self._text(token)
            return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

        return {
            **entry(report.token, report.logprob),
            "top_logprobs": [entry(token, logprob) for token, logprob in report.top],
        }

    def _text(self, token: int) -> str:
        return self.tokenizer.decode([token], skip_special=False)


def failure(error: TriviumError, kind: str) -> Mapping[str, Any]:
    """An error, as clients of the API expect it."""
    return {
        "error": {"message": str(error), "type": kind, "param": error.about or None, "code": None}
    }
