"""One engine on one model, in a process of its own: prints figures as JSON.

    python benchmarks/llm_child.py speed|copy|quality ENGINE MODEL THREADS

Imports nothing of this project but what the engine ``trivium`` needs, so that other interpreters
(that of llama-cpp-python) can run it. Seconds are processor time of one thread, or wall time of
several.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

CONTEXTS = (128, 512)
PREFILL = 512
TOKENS = 16
CAPACITY = 640

COPIED = 200
WINDOW, WINDOWS = 256, 48

SPEECH = [8, 51, 6, 37, 29, 41, 17, 12] * 6
"""A prompt that repeats; it is of the trained model's tokens and of the others' too."""

Feed = Callable[..., Any]
"""Append tokens and compute the logits after the last of them, or after each with ``every``."""


def main(what: str, engine: str, model: str, count: str) -> None:
    threads = int(count)
    if threads == 1:
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    os.environ["OMP_NUM_THREADS"] = count
    clock = time.process_time if threads == 1 else time.perf_counter
    print(json.dumps(WHAT[what](engine, model, threads, clock)))
    sys.stdout.flush()
    os._exit(0)  # some engines crash when they are taken down


Clock = Callable[[], float]


def _speed(engine: str, model: str, threads: int, clock: Clock) -> dict[str, Any]:
    prompt = [3 + i * 37 % 250 for i in range(CAPACITY)]
    started = clock()
    reset = ENGINES[engine](model, threads)
    reset()(prompt[:8])
    figures: dict[str, Any] = {}
    if threads == 1:
        figures["first_s"] = clock() - started
    reset()(prompt[: CONTEXTS[0]])
    for context in CONTEXTS:
        feed = reset()
        took = _timed(partial(feed, prompt[:context]), clock)
        if context == PREFILL:
            figures["prefill_s"] = took
        times = [_timed(partial(feed, [7]), clock) for _ in range(TOKENS)]
        figures[f"decode{context}_s"] = sorted(times)[len(times) // 2]
    figures["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return figures


def _timed(call: Callable[[], object], clock: Clock) -> float:
    started = clock()
    call()
    return clock() - started


def _copy(engine: str, model: str, threads: int, clock: Clock) -> dict[str, Any]:
    """Continue a text that repeats; guessing is ours."""
    import numpy as np

    if engine != "trivium":
        feed = ENGINES[engine](model, threads)()
        logits = feed(SPEECH)

        def plain() -> None:
            nonlocal logits
            for _ in range(COPIED):
                logits = feed([int(np.argmax(logits))])

        return {"plain_s": _timed(plain, clock)}
    from trivium.compiler.generation.sampling import Settings
    from trivium.compiler.generation.text import TextGenerator

    figures: dict[str, Any] = {}
    texts = []
    for name, guess in (("plain_s", False), ("guessed_s", True)):
        made = TextGenerator(
            model, rows=1, speculate=guess, prefix_bytes=0, capacity=len(SPEECH) + COPIED + 1
        )
        (request,) = made.submit([SPEECH], Settings(max_new_tokens=COPIED + 1))
        made.engine.decoder.generator.__dict__["eos"] = ()  # the text is to be as long as asked
        pieces = made.pieces([request])
        first = list(next(pieces).tokens)  # the prompt is read
        started = clock()
        rest = [token for piece in pieces for token in piece.tokens]
        figures[name] = clock() - started
        figures["guessed"], figures["accepted"] = (
            made.engine.counts.guessed,
            made.engine.counts.accepted,
        )
        texts.append(first + rest)
    figures["same"] = texts[0] == texts[1]
    return figures


def _quality(engine: str, model: str, threads: int, clock: Clock) -> dict[str, Any]:
    """Perplexity of the trained model on whole windows of its validation text."""
    import numpy as np

    data = Path(__file__).parents[1] / ".." / "shared" / "data"
    given = Path(os.environ.get("TRIVIUM_TEST_DATA") or data)
    ids = np.load(given / "llm-shakespeare" / "val_ids.npy")
    reset = ENGINES[engine](model, threads)
    total, count = 0.0, 0
    for window in range(WINDOWS):
        text = [int(t) for t in ids[window * WINDOW : (window + 1) * WINDOW + 1]]
        # The second half comes token by token, out of the caches. Copied: engines reuse memory.
        feed, half = reset(), WINDOW // 2
        found = [np.array(feed(text[:half], every=True)).reshape(half, -1)]
        found += [np.array(feed([token])).reshape(1, -1) for token in text[half:-1]]
        logits = np.concatenate(found).astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        chosen = logits[np.arange(WINDOW), text[1:]]
        total += float((np.log(np.exp(logits).sum(axis=1)) - chosen).sum())
        count += WINDOW
    return {"perplexity": float(np.exp(total / count))}


def _trivium(folder: str, threads: int) -> Callable[[], Feed]:
    import trivium

    decoder = trivium.load(folder).generator()

    def reset() -> Feed:
        cache = decoder.start(1, CAPACITY)

        def feed(tokens: list[int], every: bool = False) -> Any:
            return decoder.feed(cache, [tokens], keep=len(tokens) if every else 1)[0]

        return feed

    return reset


def _genai(folder: str, threads: int) -> Callable[[], Feed]:
    import onnxruntime_genai as og

    config = og.Config(folder)
    session = {"intra_op_num_threads": threads}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
    model = og.Model(config)
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=min(CAPACITY, _context(folder)), do_sample=False)

    def reset() -> Feed:
        generator = og.Generator(model, parameters)

        def feed(tokens: list[int], every: bool = False) -> Any:
            generator.append_tokens([tokens])
            if every:
                return generator.get_output("logits")[0]
            return generator.get_logits()

        return feed

    return reset


def _openvino(folder: str, threads: int) -> Callable[[], Feed]:
    """A stateful model by OpenVINO's own settings: caches in u8, activations rounded in groups."""
    import numpy as np
    import openvino

    properties = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
    compiled = openvino.Core().compile_model(Path(folder) / "model.xml", "CPU", properties)
    names = {next(iter(port.names)) for port in compiled.inputs}

    def reset() -> Feed:
        request, place = compiled.create_infer_request(), 0

        def feed(tokens: list[int], every: bool = False) -> Any:
            nonlocal place
            count = len(tokens)
            place += count
            feeds = {
                "input_ids": np.array([tokens]),
                "attention_mask": np.ones((1, place), np.int64),
                "beam_idx": np.zeros(1, np.int32),
                "logits_positions": np.arange(0 if every else count - 1, count),
            }
            given = {name: array for name, array in feeds.items() if name in names}
            return request.infer(given, share_inputs=True)[0][0]

        return feed

    return reset


def _context(folder: str) -> int:
    config = json.loads((Path(folder) / "genai_config.json").read_text())
    return int(config["model"]["context_length"])


def _llama(path: str, threads: int, *, flash: bool = True) -> Callable[[], Feed]:
    import llama_cpp
    import numpy as np

    llama_cpp.llama_log_set(_quiet(llama_cpp), None)
    model_parameters = llama_cpp.llama_model_default_params()
    model = llama_cpp.llama_model_load_from_file(path.encode(), model_parameters)
    parameters = llama_cpp.llama_context_default_params()
    parameters.n_ctx, parameters.n_batch, parameters.n_ubatch = CAPACITY, PREFILL, PREFILL
    parameters.n_threads = parameters.n_threads_batch = threads
    if not flash:
        parameters.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    context = llama_cpp.llama_init_from_model(model, parameters)
    wide = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))

    def reset() -> Feed:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        place = 0

        def feed(tokens: list[int], every: bool = False) -> Any:
            nonlocal place
            batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
            batch.n_tokens = len(tokens)
            for index, token in enumerate(tokens):
                batch.token[index], batch.pos[index] = token, place + index
                batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
                batch.logits[index] = every or index == len(tokens) - 1
            place += len(tokens)
            failed = llama_cpp.llama_decode(context, batch)
            llama_cpp.llama_batch_free(batch)
            if failed:
                raise RuntimeError("llama_decode failed")
            rows = len(tokens) if every else 1
            logits = llama_cpp.llama_get_logits(context)
            return np.ctypeslib.as_array(logits, shape=(rows, wide))

        return feed

    return reset


def _quiet(llama_cpp: Any) -> object:
    quiet: object = llama_cpp.llama_log_callback(lambda level, text, data: None)
    _kept.append(quiet)
    return quiet


_kept: list[object] = []

ENGINES: dict[str, Callable[[str, int], Callable[[], Feed]]] = {
    "trivium": _trivium,
    "genai": _genai,
    "openvino": _openvino,
    "llama": _llama,
    "llama-plain": partial(_llama, flash=False),
}

WHAT = {"speed": _speed, "copy": _copy, "quality": _quality}

if __name__ == "__main__":
    main(*sys.argv[1:])
