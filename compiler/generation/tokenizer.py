"""Text to tokens and back, by the ``tokenizers`` library, and chat templates by jinja2."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trivium.compiler import files
from trivium.compiler.errors import BadInput, ToolchainMissing
from trivium.compiler.onnx_api import one_line

if TYPE_CHECKING:
    from trivium.compiler.artifact import Artifact

_UNFINISHED = "\ufffd"
"""What bytes that are no whole character yet decode to."""


class Tokenizer:
    """The tokenizer of an artifact.

    Raises:
        BadInput: It has none, or one that does not fit the model.
        ToolchainMissing: The library is not installed.
    """

    def __init__(self, artifact: Artifact) -> None:
        generator = artifact.generator
        about = str(artifact.path)
        if generator is None or generator.tokenizer is None:
            raise BadInput("it carries no tokenizer", about=about, remedy="give --prompt-ids")
        self._library = _read(artifact.path / generator.tokenizer, generator.vocabulary)
        self._template = None
        if generator.chat_template is not None:
            self._template = (artifact.path / generator.chat_template).read_text(encoding="utf-8")
        self._special = _special_tokens(artifact.path / "tokenizer_config.json")

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Return the tokens of a text; with ``special`` those that the model expects around it."""
        return list(self._library.encode(text, add_special_tokens=special).ids)

    def decode(self, tokens: Sequence[int], *, skip_special: bool = True) -> str:
        return str(self._library.decode(list(tokens), skip_special_tokens=skip_special))

    def stream(self) -> TextStream:
        """Return a decoder of tokens that come one by one."""
        return TextStream(self)

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Return the tokens of a conversation, up to where the model is to go on.

        Raises:
            BadInput: There is no template, or it does not take these messages.
        """
        return self.encode(self.render(messages), special=False)

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """Return the text that the chat template makes of a conversation."""
        if self._template is None:
            raise BadInput(
                "the model has no chat template", about="chat", remedy="use completions instead"
            )
        try:
            template = _environment().from_string(self._template)
            text: str = template.render(
                messages=list(messages), add_generation_prompt=True, **self._special
            )
        except Exception as error:  # whatever an expression in a template may raise
            raise BadInput(f"the chat template fails: {error}", about="chat") from error
        return text


def require_fitting(path: Path, vocabulary: int) -> None:
    """Refuse a tokenizer that is none, or that of another model; its library has to be installed.

    One that has fewer tokens than the model will do: vocabularies are padded.

    Raises:
        BadInput: With a token that the model does not have.
    """
    if find_spec("tokenizers") is not None:
        _read(path, vocabulary)


def _read(path: Path, vocabulary: int) -> Any:
    """The library's tokenizer of a file.

    Raises:
        BadInput: It is none, or does not fit the model.
        ToolchainMissing: The library is not installed.
    """
    try:
        from tokenizers import Tokenizer as Library
    except ImportError as error:
        raise ToolchainMissing(
            "the library tokenizers is not installed",
            about=str(path),
            remedy="pip install 'trivium[hf]'",
        ) from error
    try:
        library = Library.from_file(str(path))
    except Exception as error:  # the library raises bare Exceptions
        raise BadInput(f"not a tokenizer ({one_line(error)})", about=str(path)) from error
    # Added tokens may lie beyond what a model knows (those of its siblings that see images), but
    # not those that every text is given.
    tokens = [*library.get_vocab(with_added_tokens=False).values(), *library.encode("").ids]
    largest = max(tokens, default=-1)
    if largest >= vocabulary:
        raise BadInput(
            f"has the token {largest}, and the model a vocabulary of {vocabulary}",
            about=str(path),
            remedy="put the tokenizer into the checkpoint folder that belongs to the model",
        )
    return library


def _environment() -> Any:
    """Jinja as chat templates expect it (as in transformers), in its sandbox."""
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def as_json(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = as_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _special_tokens(path: Path) -> dict[str, str]:
    """The special tokens that a chat template may name (``bos_token`` and others)."""
    if not path.is_file():
        return {}
    options = files.read_json(path)
    found = {}
    for name, value in options.items() if isinstance(options, dict) else ():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            found[name] = text
    return found


class TextStream:
    """Tokens to text, piece by piece.

    A token may hold part of a character, or decode with a space only after another token; so the
    last tokens are decoded together with those before, and what is not whole yet waits.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._start = self._read = 0

    def push(self, token: int) -> str:
        """Return the text that a token adds, as far as it is whole."""
        self._tokens.append(token)
        return self._advance(whole=False)

    def finish(self) -> str:
        """Return what still waited."""
        return self._advance(whole=True)

    def _advance(self, *, whole: bool) -> str:
        known = self._tokenizer.decode(self._tokens[self._start : self._read])
        text = self._tokenizer.decode(self._tokens[self._start :])
        if len(text) <= len(known) or (text.endswith(_UNFINISHED) and not whole):
            return ""
        self._start, self._read = self._read, len(self._tokens)
        return text[len(known) :]


class StopTexts:
    """Watches a text that grows for texts that end it; what may be the begin of one waits."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._waiting = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Return what is certain to be output, and whether a stop was found after it."""
        self._waiting += text
        places = [place for stop in self._stops if (place := self._waiting.find(stop)) >= 0]
        if places:
            out, self._waiting = self._waiting[: min(places)], ""
            return out, True
        held = 0
        for stop in self._stops:
            sizes = range(min(len(stop) - 1, len(self._waiting)), held, -1)
            held = next((size for size in sizes if self._waiting.endswith(stop[:size])), held)
        cut = len(self._waiting) - held
        out, self._waiting = self._waiting[:cut], self._waiting[cut:]
        return out, False

    def finish(self) -> str:
        """Return what still waited."""
        out, self._waiting = self._waiting, ""
        return out
