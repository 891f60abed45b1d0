"""The commands of contextual sparsity: study, collect, train, calibrate, eval."""

import hashlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from dejavu.launch.options import Device, DType, Model, bar, load_engine, print_line, stderr
from dejavu.parallel.groups import global_rank, init_tp, pick_device
from dejavu.predictors.calibrate import Target, calibrate
from dejavu.predictors.collect import collect, trace_bytes
from dejavu.predictors.corpus import Corpus, read_corpus
from dejavu.predictors.files import MANIFEST, Manifest
from dejavu.predictors.study import study
from dejavu.predictors.train import TrainConfig, train
from dejavu.profiles.evaluate import Asked, evaluate
from dejavu.profiles.plots import study_page
from dejavu.profiles.quality_plots import predictor_page, quality_page
from dejavu.profiles.records import command_line, existing_folder, write_record
from dejavu.profiles.study_tables import study_rows, study_tables
from dejavu.runtime.engine import Engine
from dejavu.runtime.sparsity import DENSE, LOSSLESS, find_predictors, load_policy
from dejavu.runtime.weights import find_model

Text = Annotated[Path, typer.Option(help="UTF-8 text; lines <|endoftext|> separate documents.")]
Part = Annotated[str, typer.Option(help="Which part of the text: 1/2 is the first half.")]
Window = Annotated[int, typer.Option(min=2, help="Tokens of a window.")]
Tokens = Annotated[int | None, typer.Option(help="Use no more tokens than this.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object, last.")]


def study_command(
    text: Text,
    out: Annotated[Path, typer.Option(help="Directory for NAME.json, NAME.md and NAME.png.")],
    model: Model = "demo",
    part: Part = "1/1",
    window: Window = 512,
    tokens: Tokens = 32768,
    optional: Annotated[
        bool, typer.Option("--optional", help="Also: whole blocks skipped, attention and MLP in parallel.")
    ] = False,
    name: Annotated[str, typer.Option(help="NAME of what is written.")] = "study",
    dtype: DType = "auto",
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Does this model have contextual sparsity? Tables, study.json and a page of plots."""
    check_folder(out, name)
    engine = load_engine(model, dtype, device)
    corpus = corpus_of(engine, text, window, part, tokens)
    with bar("studying") as progress:
        found = study(engine, corpus, optional=optional, on_progress=progress)
    if global_rank() != 0:
        return
    conditions = conditions_of(engine, corpus)
    path = write_record(out, name, study_rows(found), **conditions, study=found)
    study_page(found, path.with_suffix(".png"))
    show_tables(study_tables(found), as_json, found, f"{path}, .md and .png")


def collect_command(
    text: Text,
    out: Annotated[Path, typer.Option(help="The directory of traces to make.")],
    model: Model = "demo",
    part: Part = "1/1",
    window: Window = 512,
    tokens: Tokens = 200_000,
    sparsity: Annotated[
        str, typer.Option(help="Whose hidden states: dense, or a directory of predictors that run.")
    ] = "dense",
    density: Annotated[float | None, typer.Option(help="Of those predictors.")] = None,
    dtype: DType = "auto",
    device: Device = "auto",
) -> None:
    """Write activations for training, to memory-mapped files; started again, it goes on where it was."""
    engine = load_engine(model, dtype, device)
    corpus = corpus_of(engine, text, window, part, tokens)
    engine.policy = engine.tp.agree(
        lambda: load_policy(
            sparsity, engine.model, engine.fingerprint, density=density, sharing="mask", dense_until=1
        )
    )
    whose = _whose(sparsity, density)
    size = trace_bytes(engine.model.config, corpus.tokens)
    said = f"{corpus.tokens} tokens of {corpus.file}: {out} will have {size / 1e9:.2f} GB"
    stderr().print(said, soft_wrap=True)
    with bar("collecting") as progress:
        collect(engine, corpus, out, sparsity=whose, command=command_line(), on_progress=progress)
    stderr().print(f"written: {out}; next: dejavu train --traces {out} --out ...", soft_wrap=True)


def train_command(
    out: Annotated[Path, typer.Option(help="The directory of predictors to make.")],
    traces: Annotated[Path | None, typer.Option(help="What dejavu collect wrote.")] = None,
    model: Model = "demo",
    method: Annotated[
        str,
        typer.Option(help="predicted; svd, sign, lsh, quantized (of fc1); static, random, oracle."),
    ] = "predicted",
    kind: Annotated[
        list[str] | None, typer.Option(help="mlp or heads; by default both, where the method can.")
    ] = None,
    lookahead: Annotated[str, typer.Option(help="How far ahead: none, half, one or two layers.")] = "half",
    rank: Annotated[int, typer.Option(help="Of the MLP's predictors (lsh: planes).")] = 256,
    head_rank: Annotated[int, typer.Option(help="Of the heads' predictors.")] = 64,
    rank_of: Annotated[
        list[str] | None, typer.Option(help="An exception, as mlp.0=64; may be given several times.")
    ] = None,
    bits: Annotated[int, typer.Option(help="Of the predictors' weights: 16, 8, 4, 3 or 2.")] = 16,
    refine_bits: Annotated[
        int | None,
        typer.Option(help="A second stage: rows of fc1 in so few bits score what the first one chose."),
    ] = None,
    labels: Annotated[str, typer.Option(help="contribution (to the residual) or paper (live, norm).")] = (
        "contribution"
    ),
    weighting: Annotated[
        float, typer.Option(help="A live neuron counts contribution ** WEIGHTING in the loss.")
    ] = 1.0,
    epochs: Annotated[float, typer.Option(help="Passes over the traces.")] = 8.0,
    batch: Annotated[int, typer.Option(help="Tokens of a training step.")] = 2048,
    lr: Annotated[float, typer.Option(help="The highest learning rate.")] = 2e-3,
    seed: Annotated[int, typer.Option(help="Of shuffling and of random starts.")] = 0,
    start: Annotated[Path | None, typer.Option(help="Predictors to go on training.")] = None,
    device: Device = "auto",
) -> None:
    """Make predictors, one a layer and kind; ranks share the layers; started again, it goes on."""
    config = TrainConfig(
        method=method,  # type: ignore[arg-type]  # checked by TrainConfig, as the next ones
        kinds=tuple(kind or ("mlp", "heads")),  # type: ignore[arg-type]
        lookahead=lookahead,  # type: ignore[arg-type]
        rank=rank,
        head_rank=head_rank,
        ranks=_ranks(rank_of or []),
        bits=bits,  # type: ignore[arg-type]
        refine_bits=refine_bits,  # type: ignore[arg-type]
        labels=labels,  # type: ignore[arg-type]
        weighting=weighting,
        epochs=epochs,
        batch=batch,
        lr=lr,
        seed=seed,
    )
    tp = init_tp(pick_device(device))
    directory = tp.agree(lambda: find_model(model))
    with bar("training") as progress:
        train(
            directory, traces, out, config, tp=tp, start=start, command=command_line(), on_progress=progress
        )
    stderr().print(f"written: {out}; next: dejavu calibrate --predictors {out} --text ...", soft_wrap=True)


def calibrate_command(
    predictors: Annotated[Path, typer.Option(help="What dejavu train made; its manifest is rewritten.")],
    text: Text,
    model: Model = "demo",
    part: Part = "1/1",
    window: Window = 512,
    tokens: Tokens = 65536,
    search_tokens: Annotated[int, typer.Option(help="Tokens that each threshold is tried on.")] = 8192,
    max_ppl_increase: Annotated[
        str | None, typer.Option(help="A quality budget, as 1%: the fewest bytes that keep it.")
    ] = None,
    recall: Annotated[float | None, typer.Option(help="The same recall in every layer.")] = None,
    mlp_density: Annotated[float | None, typer.Option(help="Mean over tokens and layers.")] = None,
    head_density: Annotated[float | None, typer.Option(help="Mean over tokens and layers.")] = None,
    dtype: DType = "auto",
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Find the thresholds: to a quality budget, a recall or mean densities, layer by layer."""
    target = Target(
        max_ppl_increase=None if max_ppl_increase is None else _share(max_ppl_increase),
        recall=recall,
        mlp_density=mlp_density,
        head_density=head_density,
    )
    engine = load_engine(model, dtype, device)
    corpus = corpus_of(engine, text, window, part, tokens)
    with bar("calibrating") as progress:
        manifest = calibrate(
            engine,
            corpus,
            predictors,
            target,
            search_tokens=search_tokens,
            command=command_line(),
            on_progress=progress,
        )
    if global_rank() != 0:
        return
    predictor_page(manifest, predictors / "report.png")
    tables = [_points_table(manifest), _layers_table(manifest)]
    show_tables(
        tables, as_json, manifest.model_dump(mode="json"), f"{predictors}/manifest.json and report.png"
    )


def eval_command(
    text: Text,
    sparsity: Annotated[
        list[str],
        typer.Option(help="dense, lossless, DIRECTORY or DIRECTORY@DENSITY; may be given several times."),
    ],
    model: Model = "demo",
    part: Part = "1/1",
    window: Window = 512,
    tokens: Tokens = 65536,
    prefix: Annotated[
        list[int] | None,
        typer.Option(help="Tokens of each window that are dense, as a prompt is; by default 1 and 256."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Directory for NAME.json, NAME.md and NAME.png.")] = None,
    name: Annotated[str, typer.Option(help="NAME of what is written.")] = "quality",
    dtype: DType = "auto",
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Quality of policies side by side, decoding token by token, each sequence with its own sets."""
    check_folder(out, name)
    engine = load_engine(model, dtype, device)
    corpus = corpus_of(engine, text, window, part, tokens)
    asked = [_asked(spec) for spec in sparsity]
    with bar("evaluating") as progress:
        rows = evaluate(engine, corpus, asked, prefixes=prefix or (1, 256), on_progress=progress)
    if global_rank() != 0:
        return
    where = ""
    if out is not None:
        path = write_record(out, name, rows, **conditions_of(engine, corpus))
        quality_page(rows, path.with_suffix(".png"), title=f"{engine.name}, {corpus.file}")
        where = f"{path}, .md and .png"
    show_tables([_quality_table(rows)], as_json, {"rows": rows}, where)


def corpus_of(engine: Engine, text: Path, window: int, part: str, tokens: int | None) -> Corpus:
    limit = engine.model.config.max_position_embeddings
    if window > limit:
        raise ValueError(f"windows of {window} tokens do not fit the model's {limit} positions")
    return engine.tp.agree(
        lambda: read_corpus(text, engine.tokenizer, window=window, part=part, max_tokens=tokens)
    )


def _whose(sparsity: str, density: float | None) -> str:
    """The policy's name, with what tells apart two calibrations of one directory."""
    if sparsity in (DENSE, LOSSLESS):
        return sparsity
    directory = find_predictors(sparsity)
    digest = hashlib.sha256((directory / MANIFEST).read_bytes()).hexdigest()[:8]
    return f"{directory.name} {digest}" + ("" if density is None else f" at {density:g}")


def conditions_of(engine: Engine, corpus: Corpus) -> dict[str, Any]:
    return {
        "model": engine.name,
        "text": corpus.file,
        "characters": [corpus.start, corpus.stop],
        "windows": corpus.windows.shape[0],
        "window": corpus.windows.shape[1] - 1,
        "dtype": engine.dtype,
        "tp": engine.tp.size,
    }


def check_folder(out: Path | None, name: str) -> None:
    """Whether results can be written there, before the work is done.

    Raises:
        ValueError: they can't, or ``name`` is no plain name.
    """
    if "/" in name or not name:
        raise ValueError(f"name={name!r} is no plain name: the folder belongs into --out")
    if out is not None:
        there = existing_folder(out)
        if not there.is_dir() or not os.access(there, os.W_OK):
            raise ValueError(f"cannot write to {out}: {there} is no directory, or not a writable one")


def _asked(spec: str) -> Asked:
    """``DIRECTORY@DENSITY``, or what stands alone."""
    name, _, density = spec.rpartition("@")
    try:
        return Asked(name, float(density)) if name else Asked(spec)
    except ValueError:
        raise ValueError(f"{spec!r}: {density!r} is no density") from None


def _share(text: str) -> float:
    """``1%`` or ``0.01``."""
    try:
        return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        raise ValueError(f"{text!r} is no share: write 1% or 0.01") from None


def _ranks(given: list[str]) -> dict[str, int]:
    ranks = {}
    for item in given:
        name, _, rank = item.partition("=")
        if not rank.isdigit():
            raise ValueError(f"--rank-of {item}: expected NAME=RANK, as mlp.0=64")
        ranks[name] = int(rank)
    return ranks


def show_tables(tables: list[Table], as_json: bool, result: dict[str, Any], where: str) -> None:
    console = Console(width=None if sys.stdout.isatty() else 160)
    for table in tables:
        console.print(table)
    if where:
        stderr().print(f"written: {where}", soft_wrap=True)
    if as_json:
        print_line(json.dumps(result))


def make_table(title: str, columns: list[str], rows: list[list[Any]]) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if column in ("policy", "tap") else "right")
    for row in rows:
        table.add_row(*("-" if x is None else f"{x:.4g}" if isinstance(x, float) else str(x) for x in row))
    return table


def _points_table(manifest: Manifest) -> Table:
    rows = [
        [
            "default" if i == manifest.default else "",
            percent(point.mlp_density),
            percent(point.head_density),
            f"{100 * point.ppl_increase:+.2f}%",
            point.kl,
        ]
        for i, point in enumerate(manifest.points)
    ]
    columns = ["", "MLP density", "head density", "perplexity", "KL"]
    return make_table(f"calibrated to {manifest.target}", columns, rows)


def _layers_table(manifest: Manifest) -> Table:
    rows = []
    for entry in manifest.entries:
        held_out = entry.held_out or {}
        shares = [
            percent(held_out[name]) if name in held_out else None
            for name in ("density", "recall", "weighted_recall", "precision", "live")
        ]
        rows.append(
            [entry.name, entry.tap or "-", entry.rank, *(shares if held_out else ["dense", *[None] * 4])]
        )
    columns = ["predictor", "tap", "rank", "density", "recall", "weighted recall", "precision", "live"]
    return make_table("at the default point, on text that was not trained on", columns, rows)


def _quality_table(rows: list[dict[str, Any]]) -> Table:
    cells = [
        [
            row["policy"],
            row["prefix"],
            percent(row["density_mlp"]),
            percent(row["density_heads"]),
            row["ppl"],
            f"{100 * row['ppl_increase']:+.3f}%",
            _interval(row),
            percent(row["top1"]),
            row["kl"],
            row["icl"],
            percent(row["total_share_mlp"]) if "total_share_mlp" in row else None,
        ]
        for row in rows
    ]
    columns = ["policy", "dense prefix", "MLP", "heads", "ppl", "increase", "95% interval", "top-1", "KL"]
    return make_table("quality", [*columns, "ICL", "MLP bytes"], cells)


def _interval(row: dict[str, Any]) -> str | None:
    low, high = row["ppl_increase_low"], row["ppl_increase_high"]
    return None if low is None else f"{100 * low:+.3f} to {100 * high:+.3f}"


def percent(share: float) -> str:
    return f"{100 * share:.2f}%"


COMMANDS: dict[str, Callable[..., None]] = {
    "study": study_command,
    "collect": collect_command,
    "train": train_command,
    "calibrate": calibrate_command,
    "eval": eval_command,
}
