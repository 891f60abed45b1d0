"""The commands of `dejavu`, and how they end."""

import ctypes
import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, NoReturn

import torch.distributed as dist
import typer

from dejavu.launch.bench import app as bench_app
from dejavu.launch.convert import convert_command
from dejavu.launch.demo_page import show_demo
from dejavu.launch.options import (
    NVTX,
    AllReduce,
    Device,
    DType,
    Model,
    OverlapOption,
    Stages,
    load_engine,
    print_line,
    stderr,
)
from dejavu.launch.pipeline import COMMANDS
from dejavu.launch.profiling import profile_command, torch_traced
from dejavu.launch.ranks import LAUNCHED, USER_ERROR, launch
from dejavu.launch.requests import answer_stream
from dejavu.parallel.groups import global_rank, shut_down
from dejavu.parallel.watchdog import LOST_PEER, explain, lost_peer, note_error
from dejavu.profiles import nvtx
from dejavu.runtime.engine import Generation
from dejavu.runtime.graphs import MAX_BATCH
from dejavu.runtime.preemption import PREEMPTED, Preemption
from dejavu.runtime.sampling import SamplingParams
from dejavu.runtime.sparsity import DENSE
from dejavu.runtime.weights import DEMO

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
for _name, _command in COMMANDS.items():
    app.command(_name)(_command)
app.command("convert")(convert_command)
app.command("profile", context_settings={"allow_interspersed_args": False})(profile_command)
app.add_typer(bench_app, name="bench")

Sparsity = Annotated[str, typer.Option(help="dense, lossless, demo, or a directory of predictors.")]


def _show_version(asked: bool) -> None:
    if asked:
        print(f"dejavu {version('dejavu')}, torch {version('torch')}")
        raise typer.Exit


@app.callback()
def dejavu(
    _: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show it and exit.")
    ] = False,
) -> None:
    """Tensor-parallel OPT inference. Alone, under `dejavu launch`, or under torchrun:

    torchrun --nproc-per-node N -m dejavu.launch.cli COMMAND ...
    """


@app.command()
def generate(
    model: Model = DEMO,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; may be given several times.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="A file with a prompt a line.")] = None,
    stdin: Annotated[
        bool, typer.Option("--stdin", help="Answer JSON lines from standard input, until it ends.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(help="The longest text, in tokens.")] = 64,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Draw from the k likeliest tokens; 0: from all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens that make up p.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the random stream, the same on every rank.")] = 0,
    stop: Annotated[
        list[str] | None, typer.Option(help="End before this string; may be given several times.")
    ] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after the end of text.")] = False,
    max_batch: Annotated[
        int, typer.Option(min=1, max=MAX_BATCH, help="The most prompts that run together.")
    ] = 16,
    sparsity: Sparsity = DENSE,
    density: Annotated[
        float | None, typer.Option(help="Mean MLP density, between the calibrated points.")
    ] = None,
    fill_kv: Annotated[
        str,
        typer.Option(help="K/V of heads not chosen: lazy (when next chosen), always (each step), auto."),
    ] = "auto",
    verify_every: Annotated[
        int, typer.Option(min=0, help="Re-check every so many steps densely and report the drift; 0: never.")
    ] = 0,
    dtype: DType = "auto",
    device: Device = "auto",
    pp: Stages = 1,
    all_reduce: AllReduce = "auto",
    cuda_graph: Annotated[
        bool, typer.Option(help="Record the decode step; without, it is launched with all NVTX ranges.")
    ] = True,
    overlap: OverlapOption = "auto",
    nvtx_ranges: NVTX = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, last.")] = False,
) -> None:
    """Continue one prompt, many, or a stream of requests."""
    params = SamplingParams(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop=tuple(stop or ()),
        ignore_eos=ignore_eos,
    )
    if stdin and as_json:
        raise ValueError("--stdin answers in JSON lines by itself: give it without --json")
    if stdin and verify_every:
        raise ValueError("--verify-every reports at the end of a run: give it without --stdin")
    prompts = _prompts(prompt, prompt_file, stdin)
    engine = load_engine(
        model,
        dtype,
        device,
        nvtx_ranges,
        pp=pp,
        sparsity=sparsity,
        density=density,
        all_reduce=all_reduce,
        cuda_graph=cuda_graph,
        fill_kv=fill_kv,  # type: ignore[arg-type]  # Engine checks it
        overlap=overlap,  # type: ignore[arg-type]  # Engine checks it
    )
    preemption = Preemption(engine.pipeline.world)
    if stdin:
        if answer_stream(
            engine, sys.stdin.buffer, print_line, defaults=params, max_batch=max_batch, preemption=preemption
        ):
            raise typer.Exit(PREEMPTED)
        return
    run = partial(
        engine.generate, params=params, verify_every=verify_every, shall_stop=preemption.after_token
    )
    if as_json:
        generation = run(prompts, max_batch=max_batch)
        print_line(json.dumps(asdict(generation)))
    elif len(prompts) == 1:
        generation = _generate_aloud(run, prompts[0])
    else:
        generation = run(prompts, max_batch=max_batch)
        _print_results(generation)
    if not as_json:
        _print_summary(generation)
    if generation.preempted:
        raise typer.Exit(PREEMPTED)


@app.command()
def demo(dtype: DType = "auto", device: Device = "auto", nvtx_ranges: NVTX = False) -> None:
    """Dense, lossless and predicted, side by side, on the embedded model (`make demo`: on two ranks)."""
    show_demo(load_engine(DEMO, dtype, device, nvtx_ranges))


@app.command(
    "launch",
    context_settings={
        "ignore_unknown_options": True,
        "allow_interspersed_args": False,
        "help_option_names": [],
    },
)
def launch_command(
    arguments: Annotated[list[str], typer.Argument(metavar="COMMAND", help="After torchrun's options.")],
) -> None:
    """Start a command on several ranks: torchrun, with errors in one line.

    For example: dejavu launch --nproc-per-node 2 generate --prompt "Once upon a time"
    """
    raise typer.Exit(launch(arguments))


def _prompts(prompt: list[str] | None, prompt_file: Path | None, stdin: bool) -> list[str]:
    if sum((bool(prompt), prompt_file is not None, stdin)) != 1:
        raise ValueError("give one of --prompt, --prompt-file and --stdin")
    if prompt_file is None:
        return prompt or []
    try:
        lines = prompt_file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as e:
        reason = e.strerror if isinstance(e, OSError) else "not UTF-8 text"
        raise ValueError(f"cannot read {prompt_file}: {reason}") from None
    prompts = [line.removesuffix("\r") for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"{prompt_file} has no prompts: expected one a line")
    return prompts


def _generate_aloud(run: Callable[..., Generation], prompt: str) -> Generation:
    """Prints the prompt and its text as it comes; a prompt that is refused is not echoed."""
    unsaid = [prompt]

    def on_text(_: int, text: str) -> None:
        print(*unsaid, text, sep="", end="", flush=True)
        unsaid.clear()

    generation = run([prompt], on_text=on_text)
    print(*unsaid)
    return generation


def _print_results(generation: Generation) -> None:
    for i, result in enumerate(generation.results):
        print(f"[{i + 1}] {result.prompt}{result.text}")


def _print_summary(generation: Generation) -> None:
    """One line on standard error: the text on standard output stays clean."""
    count = sum(len(result.token_ids) for result in generation.results)
    parts = [f"{count} tokens", f"first after {generation.ttft_ms:.1f} ms"]
    if generation.ms_per_token is not None and generation.gb_per_s is not None:
        ms = generation.ms_per_token
        parts.append(f"{ms['mean']:.2f} ms/token (p50 {ms['p50']:.2f}, p99 {ms['p99']:.2f})")
        parts.append(f"{generation.tokens_per_s:.1f} tokens/s")
        parts.append(
            f"{generation.weight_bytes / 1e6:.1f} MB of weights a step, {generation.gb_per_s:.1f} GB/s"
        )
    if generation.policy != DENSE:
        density = generation.density
        parts.append(
            f"{generation.policy}: {100 * density['mlp']:.1f}% of neurons, "
            f"{100 * density['heads']:.1f}% of heads"
        )
    if generation.drift is not None:
        drift = generation.drift
        parts.append(
            f"drift over {drift['checks']} checks: KL {drift['kl']:.4f}, "
            f"top-1 {100 * drift['top1_agreement']:.1f}%"
        )
    where = f"{generation.pp * generation.tp} rank(s) of {generation.device}, {generation.dtype}"
    if generation.pp > 1:
        where += f", {generation.pp} stages"
    stderr().print(f"[dim]{' | '.join(parts)} | {where}[/dim]", soft_wrap=True)


def run_command() -> None:
    """Runs what the command line says; what a user got wrong, or the system refused, becomes one line on
    standard error and exit status 2."""
    with open(os.devnull, "w") as nowhere, redirect_stdout(sys.stdout if global_rank() == 0 else nowhere):
        status = _run()
        _give_up_what_cannot_be_written()
    if status in (0, PREEMPTED):
        shut_down()
    if "WORLD_SIZE" in os.environ or status == PREEMPTED:
        _leave(status)
    sys.exit(status)


def _give_up_what_cannot_be_written() -> None:
    """Python would try once more when it ends, and say so in its own way."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _leave(status: int) -> NoReturn:
    """Ends the process without taking leave of Python: gloo's threads can abort that, and one that reads
    standard input. After an error all ranks leave at once, and there is nobody to take leave of."""
    sys.stdout.flush()
    sys.stderr.flush()
    if nvtx.is_on() and status in (0, PREEMPTED):  # the profiler has handlers to write what it has seen
        ctypes.CDLL(None).exit(status)
    os._exit(status)


def _run() -> int:
    try:
        with torch_traced():
            status: int = app(standalone_mode=False) or 0
        sys.stdout.flush()
        return status
    except (typer.Abort, KeyboardInterrupt):
        return 130
    except typer.TyperException as e:
        return _fail(e.format_message())
    except ValueError as e:
        if os.environ.get("DEJAVU_TRACEBACK") == "1":
            raise
        return _fail(str(e))
    except OSError as e:  # a full disk
        if os.environ.get("DEJAVU_TRACEBACK") == "1":
            raise
        message = f"{e.filename}: {e.strerror}" if e.filename else str(e.strerror or e)
        if "RANK" not in os.environ:
            return _fail(message)
        explain(message)  # it is this rank's alone
        return USER_ERROR
    except SystemExit as e:  # typer's own, when a reader has gone
        return int(e.code or 0)
    except RuntimeError as e:
        cause = lost_peer(e)
        if cause is None or os.environ.get("DEJAVU_TRACEBACK") == "1":
            raise
        time.sleep(1)  # so that the launcher sees the rank that is the cause before those that lost it
        explain(f"lost another rank: {cause}")
        _leave(LOST_PEER)  # from here: freeing the engine would wait for a GPU that waits for the lost rank


def _fail(message: str) -> int:
    message = " ".join(message.split())
    local_rank = int(os.environ.get("LOCAL_RANK", global_rank()))
    # before the ranks have met, each node speaks for itself; afterwards they have agreed on the error
    speaks = global_rank() == local_rank or not dist.is_initialized()
    if not speaks or not message:  # without one, the help was asked for and shown
        return USER_ERROR
    if LAUNCHED in os.environ and note_error(message):
        return USER_ERROR  # whichever rank is the first, the launcher ends the others, perhaps before a word
    if local_rank == 0 or sys.argv[1:2] == ["profile"]:  # of its own rank alone
        print(f"error: {message}", file=sys.stderr, flush=True)
    return USER_ERROR
