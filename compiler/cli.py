"""The command line: parse, call the API, print.

Nothing heavy is imported before a verb runs, so ``trivium --help`` answers at once and works with
no backend installed. ``--json`` prints one document on standard output and nothing else there;
progress, warnings and errors go to standard error. Exit codes are those of
`trivium.compiler.errors`, 130 for an interrupt.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, TypeAlias

import trivium
from trivium.compiler.errors import TriviumError

if TYPE_CHECKING:
    Verbs: TypeAlias = argparse._SubParsersAction[argparse.ArgumentParser]

DEADLINE = 3600.0
"""Seconds after which a verb is given up by default: nothing hangs for ever."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = make_parser()
    arguments = parser.parse_args(argv)
    if arguments.verb is None:
        parser.print_help()
        return 2
    if sys.stdout is None:
        sys.stdout = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    # A scheduler's SIGTERM cleans up like Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    watch = _watchdog(arguments.timeout)
    try:
        # Verbs live in modules of their own, so that --help need not import what they need.
        module, function = arguments.run
        run: Callable[[argparse.Namespace], int] = getattr(import_module(module), function)
        return run(arguments)
    except TriviumError as error:
        if arguments.verbose:
            raise
        print(f"trivium: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("trivium: interrupted; nothing was left half-written", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output went away (`| head`): not an error of ours.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except MemoryError:
        print(
            "trivium: out of memory; try a smaller --shape or a machine with more", file=sys.stderr
        )
        return 5
    except OSError as error:
        # A disk that is full under our own output, a file that vanished meanwhile.
        if arguments.verbose:
            raise
        where = f"{error.filename}: " if error.filename else ""
        print(f"trivium: {where}{error.strerror or error}", file=sys.stderr)
        return 5
    except Exception as error:
        if arguments.verbose:
            raise
        line = " ".join(f"{type(error).__name__}: {error}".split())
        print(f"trivium: {line}; a bug: please report it with --verbose", file=sys.stderr)
        return 5
    finally:
        watch.cancel()


def _watchdog(seconds: float) -> threading.Timer:
    """End the process after a deadline, also when it hangs inside an engine's native code."""

    def expire() -> None:
        message = f"trivium: gave up after {seconds:g} s; raise it with --timeout\n"
        os.write(2, message.encode())
        from trivium.compiler.files import remove_workspaces

        remove_workspaces()
        os._exit(5)

    timer = threading.Timer(min(seconds, threading.TIMEOUT_MAX), expire)
    timer.daemon = True
    timer.start()
    return timer


def make_parser() -> argparse.ArgumentParser:
    """Build the parser of all verbs."""
    parser = argparse.ArgumentParser(
        prog="trivium",
        description="Compile one ONNX model (or checkpoint folder) for CPU, GPU, TPU or FPGA.",
        epilog="Exit codes: 0 done, 1 a constraint is unmet, 2 bad input or usage, 3 the target "
        "cannot run the model, 4 a toolchain is missing, 5 a backend failed, 6 the accuracy gate "
        "failed.",
    )
    parser.add_argument("--version", action="version", version=f"trivium {trivium.__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", title="verbs")
    for add in (
        _add_compiling,
        _add_tuning,
        _add_choosing,
        _add_calibrating,
        _add_explaining,
        _add_using,
        _add_generating,
        _add_listing,
    ):
        add(verbs)
    return parser


def _verb(verbs: Verbs, name: str, where: str, help: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(name, help=help, description=help)
    parser.set_defaults(run=(f"trivium.compiler.{where}", name.replace("-", "_")))
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--verbose", action="store_true", help="show a traceback on errors")
    parser.add_argument(
        "--timeout", type=_positive, default=DEADLINE, metavar="S", help="give up after S seconds"
    )
    return parser


def _positive(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number above 0")
    return number


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number


def _counts(text: str) -> tuple[int, ...]:
    return tuple(_count(part) for part in text.split(","))


def _add_compiling(verbs: Verbs) -> None:
    where = "commands.compiling"
    verb = _verb(verbs, "compile", where, "compile a model for a target and verify the result")
    _model(verb)
    verb.add_argument("--target", required=True, metavar="NAME", help="see: trivium targets")
    verb.add_argument("--backend", metavar="NAME", help="instead of the target's default")
    _recipe(verb)
    _shape(verb)
    _calibration(verb)
    verb.add_argument(
        "--max-error", type=_positive, metavar="X", help="gate: error relative to the source model"
    )
    verb.add_argument("--option", action="append", default=[], metavar="K=V", help="to the backend")
    verb.add_argument("--seed", type=int, default=0, help="of drawn inputs (default 0)")
    verb.add_argument(
        "--generator",
        action=argparse.BooleanOptionalAction,
        help="give a decoder a KV cache, so that it generates (default: checkpoint folders)",
    )
    verb.add_argument(
        "--context", type=_count, metavar="N", help="tokens of a generator's sequences, at most"
    )
    verb.add_argument(
        "--prefill",
        type=_counts,
        default=(),
        metavar="N,M",
        help="new tokens of a generator's prefill programs, where they are fixed",
    )
    verb.add_argument(
        "--guesses",
        type=_count,
        default=0,
        metavar="N",
        help="a program that checks N guessed tokens in one call, where they are fixed",
    )
    verb.add_argument("--no-cache", action="store_true", help="compile even if an equal one exists")
    verb.add_argument("--dry-run", action="store_true", help="passes and prediction, no build")
    verb.add_argument("-o", "--out", metavar="OUT", help="artifact folder (default MODEL.TARGET)")

    verb = _verb(verbs, "optimize", where, "run passes only: ONNX in, ONNX out")
    _model(verb)
    verb.add_argument("-o", "--out", required=True, metavar="OUT.onnx")
    _recipe(verb)
    _shape(verb)
    _calibration(verb)
    verb.add_argument("--target", metavar="NAME", help="what target-aware passes optimize for")
    verb.add_argument("--seed", type=int, default=0)


def _add_tuning(verbs: Verbs) -> None:
    verb = _verb(verbs, "tune", "commands.tuning", "train back what a recipe cost: ONNX in and out")
    # A run that is given up goes on from its checkpoint, but a day is no sign of a hang.
    verb.set_defaults(timeout=24 * DEADLINE)
    _model(verb)
    verb.add_argument("-o", "--out", required=True, metavar="OUT.onnx")
    verb.add_argument(
        "--recipe",
        default="distill",
        metavar="R[+distill]",
        help="recipes, and distill or finetune, joined by + (default distill)",
    )
    verb.add_argument(
        "--data", required=True, metavar="FILE", help=".npz of inputs and perhaps y; ids; or text"
    )
    verb.add_argument("--teacher", metavar="MODEL", help="default: the model itself")
    verb.add_argument("--loss", metavar="NAME|FILE.py:FUNCTION", help="on the labels y")
    verb.add_argument("--alpha", type=float, help="weight of that loss beside the teacher (0.3)")
    verb.add_argument("--temperature", type=float, help="softens both sides' scores (2)")
    verb.add_argument("--match", metavar="kl|mse|cosine", help="how outputs are compared")
    for name in ("hidden", "attention"):
        what = f"match this {'state' if name == 'hidden' else 'map'} too"
        verb.add_argument(f"--{name}", action="append", default=[], metavar="N[=N]", help=what)
        verb.add_argument(f"--{name}-weight", type=float, metavar="X", help="of it (1)")
    verb.add_argument("--optimizer", metavar="NAME", help="of optax (adamw)")
    verb.add_argument("--schedule", metavar="NAME", help="of the rate (cosine)")
    verb.add_argument("--rate", type=float, help="peak learning rate (1e-4)")
    verb.add_argument("--warmup", type=float, metavar="X", help="share of updates (0.05)")
    verb.add_argument("--clip", type=float, metavar="X", help="norm of gradients (1)")
    verb.add_argument("--steps", type=_count, help="updates, instead of --epochs")
    verb.add_argument("--epochs", type=float, help="passes over the data (10)")
    verb.add_argument("--batch", type=_count, help="samples of an update (32)")
    verb.add_argument("--window", type=_count, help="tokens of a sample of text (256)")
    verb.add_argument(
        "--augment", action="append", default=[], metavar="NAME", help="flip, shift, mix, paste"
    )
    verb.add_argument("--freeze", action="append", default=[], metavar="PATTERN", help="of weights")
    verb.add_argument("--freeze-scales", action="store_true", help="of quantized weights")
    verb.add_argument(
        "--refit", action="store_true", help="fit products to the teacher before the first update"
    )
    verb.add_argument("--gradual", type=float, metavar="X", help="reach the sparsity in X of it")
    verb.add_argument("--validation", type=float, metavar="X", help="share held out (0.1)")
    verb.add_argument("--evaluations", type=_count, help="looks at what is held out (20)")
    verb.add_argument("--patience", type=int, help="of them without gain before stopping (5)")
    verb.add_argument("--checkpoint", metavar="DIR", help="kept until done (default OUT.tuning)")
    verb.add_argument("--target", metavar="NAME", help="what target-aware passes optimize for")
    verb.add_argument("--seed", type=int)
    _shape(verb)


def _add_choosing(verbs: Verbs) -> None:
    where = "commands.choosing"
    verb = _verb(verbs, "compare", where, "predict a model on many targets, and report")
    _model(verb)
    verb.add_argument("--target", action="append", default=[], metavar="NAME", help="default: all")
    verb.add_argument("--recipe", action="append", default=[], metavar="NAME|FILE")
    verb.add_argument(
        "--backend",
        action="append",
        default=[],
        metavar="NAME",
        help="default: each target's own; all: every one that serves it",
    )
    _shape(verb)
    _calibration(verb)
    _spread(verb)
    verb.add_argument("--measure", action="store_true", help="also time what can run here")
    verb.add_argument("--measured", metavar="FILE.json", help="timings taken on another machine")
    verb.add_argument("--html", metavar="FILE", help="write a self-contained report")
    verb.add_argument("--csv", metavar="FILE")

    verb = _verb(verbs, "plan", where, "pick the target that meets the constraints")
    _model(verb)
    verb.add_argument("--target", action="append", default=[], metavar="NAME", help="default: all")
    verb.add_argument("--recipe", action="append", default=[], metavar="NAME|FILE")
    verb.add_argument("--backend", action="append", default=[], metavar="NAME", help="default: all")
    _shape(verb)
    _calibration(verb)
    _spread(verb)
    verb.add_argument("--max-latency", metavar="5ms")
    verb.add_argument("--min-throughput", type=_positive, metavar="N", help="inferences a second")
    verb.add_argument("--max-memory", metavar="16GiB")
    verb.add_argument("--max-cost", type=_positive, metavar="USD", help="a million inferences")
    verb.add_argument("--max-power", type=_positive, metavar="W")
    verb.add_argument("--max-first-token", metavar="200ms", help="of a generator")
    verb.add_argument("--max-drop", metavar="1%", help="of the metric on --data, by recipe")
    verb.add_argument(
        "--objective", choices=("latency", "throughput", "cost", "energy"), default="latency"
    )
    verb.add_argument("--measure", action="store_true", help="also time what can run here")
    verb.add_argument("--html", metavar="FILE", help="write a self-contained report")


def _spread(parser: argparse.ArgumentParser) -> None:
    """What else candidates may differ in, and what they are judged by."""
    parser.add_argument(
        "--batch", type=_count, action="append", default=[], metavar="N", help="may be given again"
    )
    parser.add_argument(
        "--context", type=_count, metavar="N", help="price a decoder as it generates N tokens long"
    )
    parser.add_argument(
        "--new-tokens", type=_count, metavar="N", help="of the context (default 128); else prompt"
    )
    parser.add_argument(
        "--max-chips", type=_count, metavar="N", help="try every slice of up to N chips"
    )
    parser.add_argument("--prices", metavar="FILE.toml", help="your own prices of an hour")
    _data(parser, required=False)


def _add_explaining(verbs: Verbs) -> None:
    verb = _verb(
        verbs, "explain", "commands.explaining", "say which layer costs a recipe its accuracy"
    )
    verb.add_argument("path", metavar="MODEL", help="a model; with --prompt also an artifact")
    verb.add_argument(
        "--recipe", action="append", default=[], metavar="NAME|FILE", help="may be given again"
    )
    _data(verb, required=False)
    verb.add_argument("--prompt", metavar="TEXT", help="what a language model makes of it instead")
    verb.add_argument("--prompt-ids", metavar="5,17", help="the same, as token ids")
    verb.add_argument("--attention", action="store_true", help="maps by layer and head")
    verb.add_argument("--gradients", action="store_true", help="what each token did to the next")
    _calibration(verb)
    _shape(verb)
    verb.add_argument("--target", default="cpu", metavar="NAME", help="whose speed counts")
    verb.add_argument("--backend", metavar="NAME", help="instead of the target's default")
    verb.add_argument(
        "--samples", type=_count, default=128, help="to judge single layers on (default 128)"
    )
    verb.add_argument("--window", type=_count, default=256, help="tokens, for perplexity")
    verb.add_argument(
        "--budget", metavar="max-drop=1%", help="find the best mix of the recipes that keeps it"
    )
    verb.add_argument("--objective", choices=("latency", "memory"), default="latency")
    verb.add_argument("-o", "--out", metavar="RECIPE.toml", help="write the budget's recipe")
    verb.add_argument("--html", metavar="FILE", help="write a self-contained report")
    verb.add_argument("--top", type=_count, default=20, help="layers to print (default 20)")
    verb.add_argument("--seed", type=int, default=0)


def _add_calibrating(verbs: Verbs) -> None:
    where = "commands.calibrating"
    verb = _verb(verbs, "calibrate", where, "fit the predictions to this hardware, or to a file")
    verb.add_argument("target", metavar="TARGET", help="see: trivium targets")
    verb.add_argument(
        "--budget", type=_seconds, default=60.0, metavar="60s", help="for measuring (default 60s)"
    )
    verb.add_argument(
        "--from", dest="points", metavar="FILE.csv", help="published GEMMs: m,n,k,latency_us"
    )
    verb.add_argument(
        "-o", "--out", metavar="FILE.toml", help="default: the user's file, which predictions read"
    )

    verb = _verb(verbs, "track", where, "show how right predictions have been (bench --track FILE)")
    verb.add_argument("file", metavar="FILE", help="that bench --track wrote")


def _seconds(text: str) -> float:
    return _positive(text.removesuffix("s"))


def _add_using(verbs: Verbs) -> None:
    where = "commands.using"
    verb = _verb(verbs, "run", where, "run an artifact once")
    _artifact(verb)
    verb.add_argument("--input", metavar="X.npz", help="default: seeded inputs")
    verb.add_argument("--output", metavar="Y.npz")

    verb = _verb(verbs, "bench", where, "time an artifact")
    _artifact(verb)
    verb.add_argument("--runs", type=_count, default=100, help="at most (default 100)")
    verb.add_argument("--seconds", type=_positive, default=5.0, help="at most (default 5)")
    verb.add_argument("--track", metavar="FILE", help="add the run to a file: see trivium track")

    verb = _verb(verbs, "eval", where, "measure quality on data")
    verb.add_argument("path", metavar="MODEL|ARTIFACT")
    _data(verb)
    verb.add_argument("--against", metavar="MODEL", help="take this model's outputs for y")
    verb.add_argument("--window", type=_count, default=256, help="tokens, for perplexity")

    verb = _verb(verbs, "inspect", where, "say what a model or an artifact is")
    verb.add_argument("path", metavar="MODEL|ARTIFACT")

    verb = _verb(verbs, "verify", where, "compare an artifact with its reference again")
    _artifact(verb)
    verb.add_argument("--max-error", type=_positive, metavar="X")


def _add_generating(verbs: Verbs) -> None:
    where = "commands.generating"
    verb = _verb(verbs, "generate", where, "continue prompts with a generator artifact")
    _artifact(verb)
    prompt = verb.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT")
    prompt.add_argument("--prompt-ids", metavar="5,17", help="tokens instead of a text")
    prompt.add_argument("--batch", metavar="FILE", help="a prompt each line, or JSON if .jsonl")
    verb.add_argument(
        "--image",
        action="append",
        default=[],
        metavar="FILE",
        help="in the prompt's <image> places",
    )
    verb.add_argument("--max-new-tokens", type=_count, default=128, metavar="N")
    verb.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="default 0: greedy"
    )
    verb.add_argument("--top-p", type=float, default=1.0, metavar="P")
    verb.add_argument("--top-k", type=int, default=0, metavar="K")
    verb.add_argument("--seed", type=int, default=0)
    verb.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends the output")
    verb.add_argument(
        "--logprobs", type=int, nargs="?", const=0, metavar="N", help="and of the N likeliest"
    )
    verb.add_argument("--context", type=_count, metavar="N", help="tokens of a text, at most")
    verb.add_argument(
        "--rows", type=_count, default=8, metavar="N", help="texts at once (default 8)"
    )
    verb.add_argument(
        "--speculate",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="guess tokens from what was said before; the output is the same",
    )
    verb.add_argument(
        "--exact",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="round alike whatever is guessed; without, int4 takes 6 to 17%% less time on a CPU",
    )

    verb = _verb(verbs, "serve", "commands.serving", "serve a generator artifact over HTTP")
    _artifact(verb)
    verb.add_argument("--host", default="127.0.0.1", help="default: this machine alone")
    verb.add_argument("--port", type=int, default=8000, help="default 8000; 0: any that is free")
    verb.add_argument("--name", help="of the model, for clients (default: the folder's)")
    verb.add_argument("--context", type=_count, metavar="N", help="tokens of a text, at most")
    verb.add_argument("--rows", type=_count, default=8, metavar="N", help="texts at once")
    verb.add_argument(
        "--queue", type=_count, default=64, metavar="N", help="requests that may wait"
    )
    verb.add_argument("--deadline", type=_positive, default=300.0, metavar="S", help="of a request")
    verb.add_argument("--speculate", action=argparse.BooleanOptionalAction, default=True)
    verb.add_argument("--exact", action=argparse.BooleanOptionalAction, default=False)
    verb.set_defaults(timeout=threading.TIMEOUT_MAX)


def _add_listing(verbs: Verbs) -> None:
    where = "commands.listing"
    verb = _verb(verbs, "targets", where, "list the devices, with their figures and sources")
    verb.add_argument("name", nargs="?", metavar="NAME")
    verb = _verb(verbs, "backends", where, "list the backends, or show one with its options")
    verb.add_argument("name", nargs="?", metavar="NAME")
    verb = _verb(verbs, "passes", where, "list passes and recipes, or show one with its options")
    verb.add_argument("name", nargs="?", metavar="NAME")
    _verb(verbs, "doctor", where, "say what is installed and what each missing extra would add")
    verb = _verb(verbs, "cache", where, "show or clear the artifacts kept of earlier compiles")
    verb.add_argument("--clear", action="store_true")


def _model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="an .onnx file or a checkpoint folder")


def _artifact(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("artifact", metavar="ARTIFACT", help="a folder that compile wrote")


def _recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--recipe", default="none", metavar="NAME|FILE", help="see: trivium passes (default none)"
    )


def _shape(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shape",
        action="extend",
        nargs="+",
        default=[],
        metavar="NAME=1x128",
        help="bind an input's shape, or a symbolic dimension (DIM=128; DIM=? keeps it so)",
    )


def _data(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    parser.add_argument(
        "--data", required=required, metavar="FILE", help=".npz with x and y, .npy ids, or .txt"
    )
    parser.add_argument(
        "--metric",
        default="accuracy",
        metavar="NAME",
        help="accuracy (default), perplexity, cosine, mse, or map:NAME, a function of yours",
    )


def _calibration(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--calib", metavar="DATA", help="representative inputs: an .npz, or a folder of them"
    )


if __name__ == "__main__":
    sys.exit(main())
