"""One engine on one model, in a process of its own: prints figures of one thread as JSON.

    python benchmarks/llm_child.py ENGINE MODEL

Imports nothing of this project but what the engine ``trivium`` needs, so that other interpreters
(that of llama-cpp-python) can run it. Seconds are processor time.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from functools import partial

CONTEXTS = (128, 512)
PREFILL = 512
TOKENS = 16
CAPACITY = 640

Feed = Callable[[list[int]], None]
"""Append tokens and compute the logits after the last of them."""


def main(engine: str, model: str) -> None:
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    os.environ["OMP_NUM_THREADS"] = "1"
    prompt = [3 + i * 37 % 250 for i in range(CAPACITY)]
    started = time.process_time()
    reset = ENGINES[engine](model)
    reset()(prompt[:8])
    figures: dict[str, object] = {"first_s": time.process_time() - started}
    reset()(prompt[:PREFILL])
    figures["prefill_s"] = _timed(lambda: reset()(prompt[:PREFILL]))
    for context in CONTEXTS:
        feed = reset()
        feed(prompt[:context])
        times = [_timed(partial(feed, [7])) for _ in range(TOKENS)]
        figures[f"decode{context}_s"] = sorted(times)[len(times) // 2]
    figures["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps(figures))


def _timed(call: Callable[[], object]) -> float:
    started = time.process_time()
    call()
    return time.process_time() - started


def _trivium(folder: str) -> Callable[[], Feed]:
    import trivium

    decoder = trivium.load(folder).generator()  # type: ignore[attr-defined]

    def reset() -> Feed:
        cache = decoder.start(1, CAPACITY)
        return lambda tokens: decoder.feed(cache, [tokens])

    return reset


def _genai(folder: str) -> Callable[[], Feed]:
    import onnxruntime_genai as og

    # Read by the session options of its configuration.
    model = og.Model(folder)
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=CAPACITY, do_sample=False)

    def reset() -> Feed:
        generator = og.Generator(model, parameters)

        def feed(tokens: list[int]) -> None:
            generator.append_tokens([tokens])
            generator.get_logits()

        return feed

    return reset


def _llama(path: str, *, flash: bool = True) -> Callable[[], Feed]:
    import llama_cpp

    llama_cpp.llama_log_set(_quiet(llama_cpp), None)
    model_parameters = llama_cpp.llama_model_default_params()
    model = llama_cpp.llama_model_load_from_file(path.encode(), model_parameters)
    parameters = llama_cpp.llama_context_default_params()
    parameters.n_ctx, parameters.n_batch, parameters.n_ubatch = CAPACITY, PREFILL, PREFILL
    parameters.n_threads = parameters.n_threads_batch = 1
    if not flash:
        parameters.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    context = llama_cpp.llama_init_from_model(model, parameters)

    def reset() -> Feed:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)

        def feed(tokens: list[int]) -> None:
            array = (llama_cpp.llama_token * len(tokens))(*tokens)
            batch = llama_cpp.llama_batch_get_one(array, len(tokens))
            if llama_cpp.llama_decode(context, batch):
                raise RuntimeError("llama_decode failed")

        return feed

    return reset


def _quiet(llama_cpp: object) -> object:
    quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)  # type: ignore[attr-defined]
    _kept.append(quiet)
    return quiet


_kept: list[object] = []

ENGINES = {
    "trivium": _trivium,
    "genai": _genai,
    "llama": _llama,
    "llama-plain": partial(_llama, flash=False),
}

if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
