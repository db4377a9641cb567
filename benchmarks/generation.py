"""Generation: many texts at once against one after another, guessed tokens against none, and a
server under load; process CPU time, pinned to one core, in turn, in a process for each row."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.harness import Row, Samples, in_turn, ratio, seconds
from benchmarks.workloads import shared

TITLE = "Generation"

WIDE = {
    "model_type": "llama", "vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1408,
    "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4,
    "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip
"""A Llama of 35M parameters; its weights are random."""

TEXTS, TOKENS = 16, 24

SPEECH = "KING RICHARD III:\nI'll not, my lord.\n\nKING RICHARD III:\n"
"""A text that goes on as it began."""


def rows() -> list[Row]:
    found = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models = {"35M, random": random_checkpoint(folder / "random", WIDE)}
        if (trained := shared("llm-shakespeare")) is not None:
            models["Shakespeare, 3.4M"] = trained
        for what, source in models.items():
            artifact = folder / f"{source.name}.artifact"
            command = [sys.executable, "-m", "trivium.compiler.cli", "compile", str(source)]
            options = ["--target", "cpu", "-o", str(artifact), "--no-cache"]
            subprocess.run([*command, *options], check=True, stdout=subprocess.DEVNULL)
            for case in ("batch", "server"):
                ours, peer = _measure(case, artifact)
                middle, text = ratio(peer.seconds, ours.seconds)
                found.append(
                    Row(f"{what}: {TEXTS} texts of {TOKENS} tokens, {_CASES[case][1]}",
                        f"8 at once {seconds(ours)}", f"one after another {seconds(peer)}",
                        f"{text} times the throughput", "above 1", middle > 1)
                )  # fmt: skip
            if source is trained:
                ours, peer = _measure("guesses", artifact)
                _, text = ratio(peer.seconds, ours.seconds)
                found.append(
                    Row(f"{what}: 200 tokens of text that repeats", f"guessed {seconds(ours)}",
                        f"one by one {seconds(peer)}", f"{text} times as fast")
                )  # fmt: skip
    return found


def random_checkpoint(folder: Path, config: dict[str, Any]) -> Path:
    """Write a Llama checkpoint with random weights, a tensor at a time."""
    import numpy as np
    import onnx_ir as ir

    from trivium.backends.xla import weights

    size, wide, layers = (
        config[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers")
    )
    narrow = size // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes = {
        "model.embed_tokens.weight": (config["vocab_size"], size),
        "lm_head.weight": (config["vocab_size"], size),
        "model.norm.weight": (size,),
    }
    for layer in range(layers):
        for name, shape in {
            "input_layernorm": (size,), "post_attention_layernorm": (size,),
            "self_attn.q_proj": (size, size), "self_attn.o_proj": (size, size),
            "self_attn.k_proj": (narrow, size), "self_attn.v_proj": (narrow, size),
            "mlp.gate_proj": (wide, size), "mlp.up_proj": (wide, size),
            "mlp.down_proj": (size, wide),
        }.items():  # fmt: skip
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
    rng = np.random.default_rng(0)

    def drawn(name: str, shape: tuple[int, ...]) -> ir.TensorProtocol:
        def make() -> ir.TensorProtocol:
            values = rng.standard_normal(shape, np.float32) * 0.05 + (len(shape) == 1)
            return ir.tensor(values.astype(np.float32), name=name)

        return ir.LazyTensor(make, dtype=ir.DataType.FLOAT, shape=ir.Shape(shape), name=name)

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {name: drawn(name, shape) for name, shape in shapes.items()}
    weights.write(tensors, folder / "model.safetensors")
    return folder


def _measure(case: str, artifact: Path) -> tuple[Samples, Samples]:
    command = [sys.executable, "-m", "benchmarks.generation", case, str(artifact)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    first, second = json.loads(done.splitlines()[-1])
    return Samples(first), Samples(second)


Timed = Callable[[Samples], None]


def _timed(work: Callable[[], object]) -> Timed:
    def run(samples: Samples) -> None:
        began = time.process_time()
        work()
        samples.seconds.append(time.process_time() - began)

    return run


def _prompts() -> list[list[int]]:
    import numpy as np

    rng = np.random.default_rng(0)
    return [[int(t) for t in rng.integers(1, 1000, 16)] for _ in range(TEXTS)]


def _batch(artifact: str) -> tuple[Timed, Timed]:
    from trivium.compiler.generation.sampling import Settings
    from trivium.compiler.generation.text import TextGenerator

    asked = Settings(max_new_tokens=TOKENS)
    runs = []
    for at_once in (8, 1):
        made = TextGenerator(artifact, rows=at_once, speculate=False, prefix_bytes=0)
        runs.append(_timed(partial(made.complete, _prompts(), asked)))
    return runs[0], runs[1]


def _guesses(artifact: str) -> tuple[Timed, Timed]:
    from trivium.compiler.generation.sampling import Settings
    from trivium.compiler.generation.text import TextGenerator

    runs = []
    for speculate in (True, False):
        made = TextGenerator(artifact, rows=1, speculate=speculate, prefix_bytes=0)
        asked = Settings(max_new_tokens=200)
        runs.append(_timed(partial(made.complete, [SPEECH], asked)))
    return runs[0], runs[1]


def _server(artifact: str) -> tuple[Timed, Timed]:
    """The same texts by 8 clients at once and by one, from an application in this process."""
    import asyncio

    import httpx

    from trivium.compiler.generation.text import TextGenerator
    from trivium.compiler.serving.app import Limits, Server

    generator = TextGenerator(artifact, rows=8, speculate=False, prefix_bytes=0)
    server = Server(generator, "model", Limits())
    server.loop.start()
    application = server.application()

    async def ask(clients: int) -> None:
        gate = asyncio.Semaphore(clients)
        transport = httpx.ASGITransport(application)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:

            async def one(prompt: list[int]) -> None:
                async with gate:
                    body = {"prompt": prompt, "max_tokens": TOKENS, "temperature": 0}
                    answer = await http.post("/v1/completions", json=body, timeout=600)
                    answer.raise_for_status()

            await asyncio.gather(*map(one, _prompts()))

    return _timed(lambda: asyncio.run(ask(8))), _timed(lambda: asyncio.run(ask(1)))


_CASES = {
    "batch": (_batch, "in one process"),
    "server": (_server, "asked of a server"),
    "guesses": (_guesses, ""),
}


def _child(case: str, artifact: str) -> None:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    ours, peer = in_turn(*_CASES[case][0](artifact), runs=3)
    print(json.dumps([ours.seconds, peer.seconds]), flush=True)
    os._exit(0)  # the server's thread is at rest; nothing is to be waited for


if __name__ == "__main__":
    _child(*sys.argv[1:])
