"""Requests of OpenAI's API, read and checked.

What would change the output and is not done here is refused, never ignored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from trivium.compiler.errors import BadInput
from trivium.compiler.generation.sampling import Settings

_MOST_CHOICES = 16

_OFF: Mapping[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none",),
    "tools": ([],),
}
"""Options that are not offered, and the values that ask for nothing."""


@dataclass(frozen=True)
class Asked:
    """What a request asks for.

    Attributes:
        prompts: Tokens, texts, or for a chat its messages.
        settings: One for each choice of a prompt.
        include_usage: Whether a stream ends with the number of tokens.
    """

    prompts: tuple[Any, ...]
    settings: tuple[Settings, ...]
    stream: bool
    include_usage: bool


def completion(body: Any, *, seed: int) -> Asked:
    """Read the body of ``/v1/completions``.

    Args:
        seed: For a request that names none.
    """
    table = _object(body)
    settings = replace(
        _settings(table, seed, default_tokens=16),
        logprobs=_read(table, "logprobs", int, None),
    )
    return _asked(table, _prompts(table.get("prompt")), settings)


def chat(body: Any, *, seed: int, most_tokens: int) -> Asked:
    """Read the body of ``/v1/chat/completions``.

    Args:
        most_tokens: What a request that names no limit gets.
    """
    table = _object(body)
    settings = _settings(table, seed, default_tokens=most_tokens)
    top = _read(table, "top_logprobs", int, 0)
    if _read(table, "logprobs", bool, False):
        settings = replace(settings, logprobs=top)
    elif top:
        raise BadInput("needs logprobs", about="top_logprobs", remedy="set logprobs to true")
    return _asked(table, (_messages(table.get("messages")),), settings)


def _object(body: Any) -> Mapping[str, Any]:
    if not isinstance(body, dict):
        raise BadInput("is no JSON object", about="the request")
    for name, neutral in _OFF.items():
        value = body.get(name)
        if value is not None and value not in neutral:
            raise BadInput("is not offered here", about=name, remedy="leave it out")
    return body


def _asked(table: Mapping[str, Any], prompts: tuple[Any, ...], settings: Settings) -> Asked:
    count = _read(table, "n", int, 1)
    if not 1 <= count * len(prompts) <= _MOST_CHOICES:
        raise BadInput(
            f"asks for {count * len(prompts)} texts",
            about="n",
            remedy=f"ask for 1 to {_MOST_CHOICES}",
        )
    stream = _read(table, "stream", bool, False)
    options = _read(table, "stream_options", dict, {})
    each = tuple(replace(settings, seed=settings.seed + choice) for choice in range(count))
    return Asked(prompts, each, stream, bool(options.get("include_usage")))


def _settings(table: Mapping[str, Any], seed: int, *, default_tokens: int) -> Settings:
    stop = table.get("stop")
    stops = () if stop is None else (stop,) if isinstance(stop, str) else stop
    if not isinstance(stops, (list, tuple)) or not all(isinstance(s, str) for s in stops):
        raise BadInput("is no text or list of texts", about="stop")
    limit = _read(table, "max_completion_tokens", int, None)
    return Settings(
        max_new_tokens=_read(table, "max_tokens", int, default_tokens) if limit is None else limit,
        temperature=_read(table, "temperature", float, 1.0),
        top_p=_read(table, "top_p", float, 1.0),
        top_k=_read(table, "top_k", int, 0),
        seed=_read(table, "seed", int, seed),
        stop=tuple(stops),
    )


def _read(table: Mapping[str, Any], name: str, kind: type, default: Any) -> Any:
    value = table.get(name)
    if value is None:
        return default
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise BadInput(f"is {value!r}"[:80], about=name, remedy=f"give {_KINDS[kind]}")
    return value


_KINDS = {int: "an integer", float: "a number", bool: "true or false", dict: "an object"}


def _prompts(prompt: Any) -> tuple[Any, ...]:
    if isinstance(prompt, str) or _is_tokens(prompt):
        return (prompt,)
    several = prompt if isinstance(prompt, list) else []
    if several and all(isinstance(one, str) or _is_tokens(one) for one in several):
        return tuple(several)
    raise BadInput("is no text, list of texts, or tokens", about="prompt")


def _is_tokens(prompt: Any) -> bool:
    return isinstance(prompt, list) and bool(prompt) and all(type(t) is int for t in prompt)


def _messages(messages: Any) -> tuple[dict[str, Any], ...]:
    if not isinstance(messages, list) or not messages:
        raise BadInput("is no list of messages", about="messages")
    return tuple(_message(message) for message in messages)


def _message(message: Any) -> dict[str, Any]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise BadInput("one has no role", about="messages")
    return {**message, "content": _content(message.get("content"))}


def _content(content: Any) -> str:
    """The text of a message, which may come in parts."""
    if isinstance(content, str):
        return content
    parts: Sequence[Any] = content if isinstance(content, list) else [None]
    texts = [part.get("text") if isinstance(part, dict) else None for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise BadInput("one has a content that is no text", about="messages")
    return "".join(str(text) for text in texts)
