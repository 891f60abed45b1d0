"""`dejavu bench decode`: whole steps, ours and those of Hugging Face and DeepSpeed, in one table."""

import gc
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, get_args

import torch
import torch.distributed as dist
import typer

from dejavu.kernels.tuning import Settings, forget
from dejavu.launch.options import AllReduce, OverlapOption, stderr
from dejavu.parallel.groups import TPGroup, init_tp, pick_device
from dejavu.profiles.baselines import measure_deepspeed, measure_hf
from dejavu.profiles.decode_bench import POLICIES, PROFILES, Bench, Row, Run
from dejavu.profiles.decode_plots import waterfall_page
from dejavu.profiles.records import device_slug, write_record
from dejavu.profiles.synthetic import Lookahead, synthetic_model
from dejavu.profiles.timing import read_bandwidth
from dejavu.profiles.tune import STEP_KERNELS, write_table
from dejavu.runtime.config import parse_dtype, published_config

ENGINES = ("dejavu", "hf", "hf-compile", "deepspeed")


def decode(
    shape: Annotated[list[str] | None, typer.Option(help="opt-125m to opt-175b. Several times.")] = None,
    engine: Annotated[list[str] | None, typer.Option(help=f"{', '.join(ENGINES)}. Several times.")] = None,
    policy: Annotated[
        list[str] | None, typer.Option(help=f"Of dejavu: {', '.join(POLICIES)}. Several times; all.")
    ] = None,
    density_profile: Annotated[
        str, typer.Option(help="paper75 (one token, Deja Vu's) or union66b (the live neurons of a batch).")
    ] = PROFILES[0],
    predictor_rank: Annotated[int, typer.Option(min=3, help="Of the neurons' predictors.")] = 1024,
    predictor_bits: Annotated[int, typer.Option(help="8 or 16.")] = 8,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Several times.")] = None,
    prompt_len: Annotated[list[int] | None, typer.Option(min=1, help="Several times.")] = None,
    new_tokens: Annotated[int, typer.Option(min=2, help="The first of them ends the prefill.")] = 128,
    dtype: Annotated[str, typer.Option(help="fp16 or bf16.")] = "bf16",
    tp_slice: Annotated[
        int,
        typer.Option(min=0, help="Each rank holds one of so many shares of the model; 0: one of all ranks."),
    ] = 0,
    lookahead: Annotated[str, typer.Option(help="Neurons are predicted half a layer or one ahead.")] = "half",
    overlap: OverlapOption = "auto",
    all_reduce: AllReduce = "auto",
    waterfall: Annotated[bool, typer.Option("--waterfall", help="The gains one by one, too.")] = False,
    tune: Annotated[
        list[str] | None,
        typer.Option(
            help="First renews the launch settings of a kernel of sparse steps in this source tree: "
            f"{', '.join(STEP_KERNELS)}. Several times."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the JSON and the Markdown.")] = Path("results"),
    name: Annotated[str | None, typer.Option(help="Of the record; decode-DEVICE.")] = None,
) -> None:
    """Time to first token and per token at published shapes, on synthetic weights, beside the floor.

    On several ranks: dejavu launch --nproc-per-node 2 bench decode
    """
    engines, policies = engine or ["dejavu"], policy or list(POLICIES)
    for what, given, known in (
        ("engine", engines, ENGINES),
        ("policy", policies, POLICIES),
        ("density_profile", [density_profile], PROFILES),
        ("predictor_bits", [str(predictor_bits)], ("8", "16")),
        ("dtype", [dtype], ("fp16", "bf16")),
        ("lookahead", [lookahead], get_args(Lookahead)),
        ("tune", tune or [], STEP_KERNELS),
    ):
        if unknown := [x for x in given if x not in known]:
            raise ValueError(f"{what}={unknown[0]!r} is unknown: use {', '.join(known)}")
    if not torch.cuda.is_available():
        raise ValueError("dejavu bench measures a GPU, and torch sees no CUDA device here")
    tp = init_tp(pick_device("cuda"))
    if tp.size > 1 and (single := [x for x in engines if x.startswith("hf")]):
        raise ValueError(f"engine {single[0]} runs on one GPU: start it without torchrun")
    if tp_slice and engines != ["dejavu"]:
        raise ValueError(
            "tp_slice is of engine dejavu alone: the others would run another share of the model"
        )
    if tune and ("dejavu" not in engines or max(batch or [1]) > 1):
        raise ValueError("--tune is for sparse steps of one sequence of engine dejavu")
    if density_profile == "paper75" and max(batch or [1]) > 1:
        raise ValueError("density_profile=paper75 is one sequence's: for batches use union66b")
    if tp_slice:
        if tp_slice < tp.size:
            raise ValueError(f"tp_slice={tp_slice} is less than the {tp.size} ranks, which hold a share each")
        tp = TPGroup(rank=tp.rank, size=tp.size, device=tp.device, group=tp.group, shares=tp_slice)
    bandwidth = read_bandwidth(tp.device)
    stderr().print(f"{torch.cuda.get_device_name(tp.device)} reads {bandwidth / 1e12:.2f} TB/s")
    found: list[Row] = []
    dense_ms: dict[tuple[str, int, int], float] = {}

    def keep(rows: Iterable[Row]) -> None:
        for row in rows:
            place = row["shape"], row["batch"], row["prompt_len"]
            if row["op"] == "decode" and row["engine"] == "dejavu" and row["policy"] == "dense":
                dense_ms.setdefault(place, row["ms_mean"])
            if place in dense_ms and row["op"] == "decode":
                row["speedup_vs_dense"] = dense_ms[place] / row["ms_mean"]
            found.append(row)
            stderr().print(_line(row), soft_wrap=True)

    for text in shape or ["opt-6.7b"]:
        runs = [
            _run(text, tp, dtype, bandwidth, size, length, new_tokens)
            for size in batch or [1]
            for length in prompt_len or [128]
        ]
        if "dejavu" in engines:
            model = synthetic_model(runs[0].config, tp, runs[0].dtype)
            for run in runs:
                bench = Bench(
                    run,
                    model,
                    density_profile,
                    rank=predictor_rank,
                    bits=predictor_bits,
                    lookahead=lookahead,  # type: ignore[arg-type]  # checked above
                    overlap=overlap,  # type: ignore[arg-type]  # Engine checks it
                    symm=all_reduce,
                )
                if tune and run is runs[0]:
                    _tune(bench, tune)
                keep({**row, "density_profile": density_profile} for row in bench.rows(policies, waterfall))
                del bench
                _give_back()
            del model
            _give_back()
        for run in runs:
            keep(_baselines(run, engines))
    if tp.rank == 0:
        path = write_record(out, name or f"decode-{device_slug()}", found, synthetic_weights=True,
                            read_tb_per_s=bandwidth / 1e12)  # fmt: skip
        if steps := [row for row in found if row["op"] == "waterfall"]:
            title = f"{tp.size} x {torch.cuda.get_device_name(tp.device)}"
            waterfall_page(steps, path.with_suffix(".png"), title=title)
        print(path)
    if dist.is_initialized():
        dist.barrier(group=tp.group)


def _tune(bench: Bench, kernels: list[str]) -> None:
    """Puts what makes steps shorter into the table, which the ranks of one node share."""
    tp = bench.run.tp

    def tell(kernel: str, settings: Settings | None, ms: float) -> None:
        what = "in use" if settings is None else " ".join(f"{k} {v}" for k, v in settings.items())
        stderr().print(f"{kernel}: {what}: {ms:.3f} ms", soft_wrap=True)
        _give_back()

    best = bench.tune(kernels, tell)
    tp.agree(lambda: write_table(best, tp.device) if tp.rank == 0 else None)
    forget()
    stderr().print(f"{len(best)} of {len(set(kernels))} kernels have better settings: "
                   f"{', '.join(best) or 'the table stays'}", soft_wrap=True)  # fmt: skip


def _run(
    shape: str, tp: TPGroup, dtype: str, bandwidth: float, batch: int, prompt_len: int, new_tokens: int
) -> Run:
    config = published_config(shape)
    config.check_tp(tp.shares)
    if prompt_len + new_tokens > config.max_position_embeddings:
        raise ValueError(
            f"prompt_len={prompt_len} and new_tokens={new_tokens} do not fit the model's "
            f"{config.max_position_embeddings} positions"
        )
    return Run(shape, config, tp, parse_dtype(dtype), bandwidth, batch, prompt_len, new_tokens)


def _baselines(run: Run, engines: list[str]) -> Iterator[Row]:
    sizes = {"batch": run.batch, "prompt_len": run.prompt_len, "new_tokens": run.new_tokens}
    for name in engines:
        if name == "dejavu":
            continue
        if name == "deepspeed":
            decoded = measure_deepspeed(run.config, **sizes, dtype=run.dtype, tp=run.tp)
        else:
            decoded = measure_hf(run.config, **sizes, dtype=run.dtype, device=run.tp.device,
                                 compiled=name == "hf-compile")  # fmt: skip
        yield run.row(decoded, run.dense_bytes(), engine=name, policy="dense")
        _give_back()


def _give_back() -> None:
    """Memory that graphs and models held."""
    gc.collect()
    torch.cuda.empty_cache()


def _line(row: Row) -> str:
    where = (
        f"{row['shape']} tp {row['tp']} on {row['gpus']} GPU(s), batch {row['batch']}, "
        f"prompt {row['prompt_len']}"
    )
    text = (
        f"{where}: {row['engine']} {row['policy']}: {row['ms_mean']:.3f} ms a token "
        f"({row['over_floor']:.2f} x floor), first after {row['ttft_ms']:.0f} ms"
    )
    if "density_mlp" in row:
        text += f", neurons {100 * row['density_mlp']:.1f}%, heads {100 * row['density_heads']:.1f}%"
    if "speedup_vs_dense" in row:
        text += f", {row['speedup_vs_dense']:.2f} x dense"
    if "exposed_share" in row:
        text += f", exposed {100 * row['exposed_share']:.1f}%, hidden {100 * row['hidden_share']:.0f}%"
    return text
