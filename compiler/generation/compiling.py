"""The part of a compile that makes a generator of a decoder, and holds the result to the source."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trivium.compiler import model as models
from trivium.compiler import parts, shapes
from trivium.compiler import recipe as recipes
from trivium.compiler.backend import cache_form
from trivium.compiler.errors import BadInput
from trivium.compiler.generation import sourced, tokenizer
from trivium.compiler.generation.recognize import recognize
from trivium.compiler.generator import STEP_TOKENS, Decoder, Generator, Role
from trivium.compiler.recipe import Applied, Context, Recipe, Step
from trivium.compiler.types import Workload

if TYPE_CHECKING:
    import onnx_ir as ir

    from trivium.compiler.job import Job
    from trivium.compiler.prepare import Prepared
    from trivium.compiler.reference import Reference

CONTEXT = 2048
"""Tokens in all, where nothing says how many positions a model has, and of static buffers, which
take their memory whether it is used or not, unless more is asked for."""

PREFILL = 128
"""New tokens of the prefill program of an engine that needs it fixed."""

TOKENIZER, CHAT_TEMPLATE = "tokenizer.json", "chat_template.jinja"
IMAGES = "preprocessor_config.json"
_CARRIED = (TOKENIZER, "tokenizer_config.json", "generation_config.json", CHAT_TEMPLATE, IMAGES)
"""Files of a checkpoint folder that an artifact takes along."""
_GENERATE = ("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")
"""How the names of architectures end that generate."""


def prepare(
    model: ir.Model, job: Job, beside: Sequence[str] = ()
) -> tuple[Generator | None, Workload, list[Applied]]:
    """Make a generator of an optimized decoder, in place, if it is one and that is asked for.

    Args:
        beside: Inputs that have nothing to do with its tokens.

    Returns:
        How to drive it, the workload with the sizes that its programs take, and the pass that gave
        it caches, if it had none.

    Raises:
        BadInput: It was asked for and cannot be done, or with a context that is too long; or the
            tokenizer is that of another model.
    """
    asked, form, folder = job.generating, cache_form(job.backend), job.source.suffix != ".onnx"
    if asked.wanted is False or (form is None and not asked.wanted):
        return None, job.workload, []
    if form is None:
        raise BadInput(
            f"{job.backend.name} cannot drive generators",
            about="--generator",
            remedy="leave it out",
        )
    applied: list[Applied] = []
    found = recognize(model, beside)
    if found is None and (asked.wanted or folder):
        applied = [_insert_cache(model, form)]
        found = recognize(model, beside) if applied[0].modified else None
    if found is not None and form == "static" and found.form != form:
        found = None
    if found is None:
        if asked.wanted:
            reasons = "; ".join(reason for row in applied for reason in row.declined)
            raise BadInput(
                f"no cache can be given to it: {reasons or 'it has no attention'}",
                about=job.source.name,
            )
        return None, job.workload, applied
    found = _with_facts(found, job.source, asked.context)
    generator, workload = _sized(found, model, job)
    if generator.form == "static":
        shapes.bind(model, workload)
    return generator, workload, applied


def prepare_part(
    part: ir.Model, whole: ir.Model, job: Job
) -> tuple[Generator | None, Workload, list[Applied]]:
    """`prepare` for the last part of a model, if that is a decoder which sees.

    An engine whose sizes are all fixed runs the whole as it is.

    Raises:
        BadInput: As `prepare`, or a generator of other parts is asked for.
    """
    sight, source = parts.sight_of(whole), sourced.source_of(whole)
    apart = sight is not None or source is not None
    if not apart or cache_form(job.backend) in (None, "static"):
        if job.generating.wanted:
            raise BadInput(
                f"{job.backend.name} makes no generator of a model of several parts",
                about="--generator",
                remedy="leave it out, or try --backend onnxruntime",
            )
        return None, job.workload, []
    found, workload, applied = prepare(part, job, source.memory if source is not None else ())
    if found is None:
        return None, workload, applied
    # What is taken of an encoder is that of one row.
    rows = found.rows if source is None else 1
    return replace(found, sight=sight, source=source, rows=rows), workload, applied


def check_tokenizer(job: Job) -> None:
    """Refuse a checkpoint that will be a generator and has the tokenizer of another model, before
    anything is run; what `prepare` alone can tell is checked there.

    Raises:
        BadInput: With a token that the model does not have.
    """
    if job.generating.wanted is False or cache_form(job.backend) is None:
        return
    config = _read(job.source / "config.json")
    text = config.get("text_config")
    size = _whole((text if isinstance(text, dict) else {}) | config, "vocab_size")
    names = config.get("architectures")
    generates = any(str(name).endswith(_GENERATE) for name in names or ())
    if generates and size is not None:
        _require_tokenizer(job.source, size)


def _require_tokenizer(folder: Path, vocabulary: int) -> None:
    if vocabulary and (folder / TOKENIZER).is_file():
        tokenizer.require_fitting(folder / TOKENIZER, vocabulary)


def with_source(model: ir.Model, job: Job) -> None:
    """Cut a model with an encoder and a decoder into both, if it is to be a generator."""
    source, form = sourced.source_of(model), cache_form(job.backend)
    if source is not None and job.generating.wanted is not False and form not in (None, "static"):
        sourced.declare(model, sourced.cut(model, source))


def _insert_cache(model: ir.Model, form: str) -> Applied:
    options = {"form": form, "outputs": "chosen"}
    step = Recipe("generator", (Step("insert-kv-cache", options),))
    (row,) = recipes.run(step, model, Context())
    return row


def _with_facts(found: Generator, source: Path, context: int | None) -> Generator:
    """Add what the checkpoint folder says of a decoder.

    Raises:
        BadInput: Its tokenizer belongs to another model.
    """
    _require_tokenizer(source, found.vocabulary)
    config = _read(source / "config.json")
    text = config.get("text_config")
    options = (text if isinstance(text, dict) else {}) | config
    options |= _read(source / "generation_config.json")
    eos = options.get("eos_token_id")
    return replace(
        found,
        context=_context(found, options, context),
        eos=tuple(e for e in (eos if isinstance(eos, list) else [eos]) if type(e) is int),
        bos=_whole(options, "bos_token_id"),
        tokenizer=TOKENIZER if (source / TOKENIZER).is_file() else None,
        chat_template=CHAT_TEMPLATE if _template(source) is not None else None,
    )


def _context(found: Generator, options: Mapping[str, Any], asked: int | None) -> int:
    """How many tokens a text may have.

    Raises:
        BadInput: More are asked for than the model has positions.
    """
    known = _whole(options, "max_position_embeddings", "n_positions") or found.context
    lengths = [cache.shape[cache.length_axis] for cache in found.caches]
    limits = [size for size in (known, *lengths) if isinstance(size, int) and size]
    most = min(limits, default=CONTEXT)
    if asked is not None and limits and asked > most:
        raise BadInput(
            f"the model has {most} positions", about=f"--context {asked}", remedy="ask for fewer"
        )
    return asked or (min(most, CONTEXT) if found.form == "static" else most)


def _sized(found: Generator, model: ir.Model, job: Job) -> tuple[Generator, Workload]:
    """Bind the dimensions of a generator: for static buffers all of them, with a program for each
    number of new tokens; for others those that a prediction of one step asks for."""
    infos = {info.name: info for info in models.signature(model)[0]}
    sizes: dict[int | str, int] = {}
    for name in filter(None, (found.chosen, found.start)):
        sizes[infos[name].shape[0]] = 1
    new = infos[found.tokens].shape[1]
    sizes[new] = 1
    growing = found.form == "growing"
    held = min(found.context, STEP_TOKENS) - 1 if growing else found.context
    for cache in found.caches:
        sizes[cache.shape[cache.length_axis]] = held
    if found.mask is not None:
        sizes.setdefault(infos[found.mask].shape[-1], held + growing)
    bound = {dim: size for dim, size in sizes.items() if isinstance(dim, str)}
    workload = replace(job.workload, dims={**bound, **job.workload.dims})
    if found.form != "static" or not isinstance(new, str):
        return found, workload
    batch = infos[found.tokens].shape[0]
    rows = batch if isinstance(batch, int) else workload.dims.get(batch, 1)
    longest = next((size for size in job.generating.prefill if size > found.context), None)
    if longest is not None:
        raise BadInput(
            f"the context is {found.context} tokens",
            about=f"--prefill {longest}",
            remedy="give sizes up to that, or a larger --context",
        )
    takes = {1, *(job.generating.prefill or (min(PREFILL, found.context),))}
    roles = [Role("decode" if n == 1 else f"prefill{n}", n) for n in sorted(takes)]
    dims = {str(batch): rows, **workload.dims}
    dims.pop(new)
    buckets = dict(workload.buckets)
    if job.generating.guesses:
        # The last token that is known goes before those that are guessed.
        width = job.generating.guesses + 1
        places = infos[found.chosen].shape[0] if found.chosen is not None else None
        if width > found.context or not isinstance(places, str):
            raise BadInput(
                f"the context is {found.context} tokens"
                if width > found.context
                else "the model does not let the positions of its logits be chosen",
                about=f"--guesses {job.generating.guesses}",
                remedy="leave it out",
            )
        roles.append(Role(f"check{width}", width, width))
        takes.add(width)
        dims.pop(places)
        buckets[places] = (1, width)
    return (
        replace(found, rows=rows, programs=tuple(roles)),
        replace(workload, dims=dims, buckets={**buckets, new: tuple(sorted(takes))}),
    )


def one_step(prepared: Prepared, generator: Generator) -> Prepared:
    """The model as it decodes one token, for the cost model."""
    model = prepared.model.clone()
    tokens = next(info for info in prepared.inputs if info.name == generator.tokens)
    batch, new = tokens.shape[:2]
    one = dict.fromkeys(prepared.workload.buckets, 1)
    dims = {str(batch): 1, **prepared.workload.dims, **one, str(new): 1}
    workload = replace(prepared.workload, dims=dims, buckets={})
    shapes.bind(model, workload)
    return replace(prepared, model=model, workload=workload)


def _read(path: Path) -> dict[str, Any]:
    """The options of a JSON file; none where there is no such file or it is damaged."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {k: v for k, v in table.items() if v is not None} if isinstance(table, dict) else {}


def _whole(options: Mapping[str, Any], *names: str) -> int | None:
    found = (options.get(name) for name in names)
    return next((value for value in found if type(value) is int and value >= 0), None)


def _template(source: Path) -> str | None:
    """The chat template of a checkpoint folder: its own file, or the tokenizer's."""
    try:
        return (source / CHAT_TEMPLATE).read_text(encoding="utf-8")
    except OSError:
        template = _read(source / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def carry_files(source: Path, folder: Path) -> None:
    """Copy what turns text into tokens and back from a checkpoint folder into an artifact."""
    for name in _CARRIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    template = _template(source)
    if template is not None:
        (folder / CHAT_TEMPLATE).write_text(template, encoding="utf-8")


def rows_of(generator: Generator, feed: Mapping[str, Any]) -> list[list[int]]:
    """The token ids of each row of a feed of the source model, padding left out."""
    import numpy as np

    ids = np.asarray(feed[generator.tokens])
    mask = feed.get(generator.mask or "")
    kept = np.ones_like(ids) if mask is None else np.asarray(mask)
    return [[int(t) for t in row[keep != 0]] for row, keep in zip(ids, kept, strict=True)]


def expected_logits(
    generator: Generator, feed: Mapping[str, Any], outputs: Mapping[str, Any]
) -> dict[str, Any]:
    """The source's logits at the tokens that are no padding, row after row; and what the parts
    before the decoder give, if it has some."""
    import numpy as np

    logits = np.asarray(outputs[generator.logits], np.float32)
    mask = feed.get(generator.mask or "")
    kept = np.ones(logits.shape[:2]) if mask is None else np.asarray(mask)
    return {**(outputs if generator.sight else {}), generator.logits: logits[kept != 0]}


def logits_of(
    generator: Generator, feeds: Sequence[Mapping[str, Any]], *references: Reference
) -> list[Reference]:
    """What `driven_logits` is to give: the reference runs' logits where there is no padding."""
    made: dict[int, Reference] = {}
    for one in references:
        outputs = tuple(
            expected_logits(generator, feed, output)
            for feed, output in zip(feeds, one.outputs, strict=True)
        )
        made.setdefault(id(one), replace(one, outputs=outputs))
    return [made[id(one)] for one in references]


def driven_logits(decoder: Decoder[Any], rows: Sequence[Sequence[int]]) -> dict[str, Any]:
    """The logits at every token: the first half of each row by prefill, then token by token."""
    import numpy as np

    found = []
    for row in rows:
        cache = decoder.start(capacity=len(row))
        half = max(1, len(row) // 2)
        pieces = (row[:half], *([token] for token in row[half:]))
        found += [decoder.feed(cache, [piece], keep=len(piece))[0] for piece in pieces]
    return {decoder.generator.logits: np.concatenate(found)}
