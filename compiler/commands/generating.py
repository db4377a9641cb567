"""``generate``: continue prompts with a generator artifact."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trivium.compiler import files
from trivium.compiler.commands import console
from trivium.compiler.errors import BadInput

if TYPE_CHECKING:
    from trivium.compiler.generation.text import Completion, Prompt, TextGenerator


def generate(arguments: argparse.Namespace) -> int:
    """Print what comes after the prompts, as it comes where there is but one."""
    from trivium.compiler.generation.engine import PREFIX_BYTES
    from trivium.compiler.generation.sampling import Settings
    from trivium.compiler.generation.text import TextGenerator

    settings = Settings(
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        top_k=arguments.top_k,
        seed=arguments.seed,
        stop=tuple(arguments.stop),
        logprobs=arguments.logprobs,
    )
    prompts = _prompts(arguments)
    generator = TextGenerator(
        arguments.artifact,
        rows=min(arguments.rows, len(prompts)),
        capacity=arguments.context,
        speculate=arguments.speculate,
        exact=arguments.exact,
        prefix_bytes=PREFIX_BYTES if len(prompts) > 1 else 0,
    )
    if arguments.image:
        prompts = [generator.see(prompt, arguments.image) for prompt in prompts]
    if len(prompts) == 1 and not arguments.json:
        _stream(generator, prompts[0], settings)
        return 0
    completions = generator.complete(prompts, settings)
    if arguments.json:
        counts = generator.engine.counts
        console.print_json(
            {
                "outputs": [one.to_json() for one in completions],
                "where": generator.decoder.where,
                "guessed": counts.guessed,
                "accepted": counts.accepted,
            }
        )
        return 0
    for index, one in enumerate(completions):
        print(f"--- {index + 1}: {_facts(one)}")
        print(_shown(one))
    return 0


def _prompts(arguments: argparse.Namespace) -> list[Prompt]:
    if arguments.batch is not None:
        return _read_batch(Path(arguments.batch))
    if arguments.prompt_ids is not None:
        return [_ids(arguments.prompt_ids)]
    return [arguments.prompt]


def _ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise BadInput(
            f"{text!r} is no list of tokens", about="--prompt-ids", remedy="give 5,17,42"
        ) from error


def _read_batch(path: Path) -> list[Prompt]:
    """Prompts from a file: a line each, or with ``.jsonl`` a JSON object each whose ``prompt`` is
    a text or a list of tokens."""
    files.require_file(path)
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise BadInput("not a text file", about=str(path)) from error
    if not lines:
        raise BadInput("holds no prompts", about=str(path))
    if path.suffix != ".jsonl":
        return list(lines)
    return [_read_prompt(line, f"{path}, prompt {number}") for number, line in enumerate(lines, 1)]


def _read_prompt(line: str, about: str) -> Prompt:
    try:
        table: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadInput("not JSON", about=about) from error
    prompt = table.get("prompt") if isinstance(table, dict) else None
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list) and all(type(token) is int for token in prompt):
        return prompt
    raise BadInput(
        "has no prompt", about=about, remedy='give {"prompt": "text"} or {"prompt": [5, 17]}'
    )


def _stream(generator: TextGenerator, prompt: Prompt, settings: Any) -> None:
    from trivium.compiler.generation.text import Gathered

    request = generator.submit([prompt], settings)[0]
    gathered = Gathered(1)
    for piece in generator.pieces([request]):
        gathered.add(piece)
        shown = piece.text if request.stream is not None else "".join(f"{t} " for t in piece.tokens)
        sys.stdout.write(shown)
        sys.stdout.flush()
    sys.stdout.write("\n")
    (completion,) = gathered.completions([request])
    for report in completion.logprobs:
        top = ", ".join(f"{token} {logprob:.4f}" for token, logprob in report.top)
        print(f"{report.token} {report.logprob:.4f}" + (f" (of {top})" if top else ""))
    print(f"{_facts(completion)}, {generator.decoder.where}", file=sys.stderr)


def _shown(completion: Completion) -> str:
    if completion.text is not None:
        return completion.text
    return " ".join(map(str, completion.tokens))


def _facts(completion: Completion) -> str:
    rate = f", then {completion.tokens_per_s:.1f} a second" if completion.tokens_per_s else ""
    first = console.si(completion.first_token_s, "s")
    return (
        f"{completion.prompt_tokens} tokens in, {len(completion.tokens)} out "
        f"({completion.finish_reason}), the first after {first}{rate}"
    )
