"""`dejavu convert`: a model in another form that computes the same."""

from pathlib import Path
from typing import Annotated, Any

import typer

from dejavu.launch.options import Device, DType, Model, bar, load_engine
from dejavu.launch.pipeline import (
    AsJson,
    Tokens,
    Window,
    check_folder,
    conditions_of,
    corpus_of,
    make_table,
    percent,
    show_tables,
)
from dejavu.parallel.groups import global_rank
from dejavu.predictors.balance import PREDICTORS, balance, blocks_of
from dejavu.profiles.records import command_line, write_record
from dejavu.runtime.sparsity import find_predictors
from dejavu.runtime.weights import DEMO, find_model


def convert_command(
    predictors: Annotated[str, typer.Option(help="The model's calibrated predictors: a directory, or demo.")],
    balance_text: Annotated[
        Path,
        typer.Option(
            "--balance",
            metavar="TEXT",
            help="Deal neurons and heads into equal blocks by how often they are chosen on this text.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="The model's directory to make; its predictors are in it.")],
    model: Model = "demo",
    part: Annotated[str, typer.Option(help="Which part of the text to count on.")] = "1/2",
    report_part: Annotated[str, typer.Option(help="Which part to measure the spread over ranks on.")] = "2/2",
    window: Window = 512,
    tokens: Tokens = 32768,
    results: Annotated[Path | None, typer.Option(help="Directory for NAME.json and NAME.md.")] = None,
    name: Annotated[str | None, typer.Option(help="NAME of the record; by default balance-MODEL.")] = None,
    dtype: DType = "auto",
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """The same model and its predictors with neurons and heads in an order that loads all ranks alike.

    Each rank computes what it chooses of its own neurons and heads, and the slowest sets the pace.
    OUT computes what the model does, OUT/predictors choose what PREDICTORS choose, on any number of ranks.
    """
    directory = find_predictors(DEMO) if predictors == DEMO else Path(predictors).expanduser()
    engine = load_engine(model, dtype, device)
    name = name or f"balance-{engine.name}"
    check_folder(results, name)
    counted = corpus_of(engine, balance_text, window, part, tokens)
    reported = corpus_of(engine, balance_text, window, report_part, tokens)
    with bar("balancing") as progress:
        found = balance(
            engine,
            find_model(model),
            directory,
            out,
            counted,
            reported,
            command=command_line(),
            on_progress=progress,
        )
    if global_rank() != 0:
        return
    where = f"{out}, with its predictors in {out / PREDICTORS}"
    if results is not None:
        config = engine.model.config
        conditions = {
            **conditions_of(engine, reported),
            "predictors": found.manifest.method,
            "counted_characters": [counted.start, counted.stop],
            "counted_tokens": counted.tokens,
            "blocks": {"mlp": blocks_of(config.ffn_dim), "heads": blocks_of(config.num_heads)},
        }
        where += f"; {write_record(results, name, found.rows, **conditions)} and .md"
    show_tables([_ranks_table(found.rows), _tokens_table(found.rows)], as_json, {"rows": found.rows}, where)


def _ranks_table(rows: list[dict[str, Any]]) -> Any:
    columns = ["kind", "ranks", "before", "after", "floor"]
    cells = [
        [row["kind"], row["ranks"], *(f"{row[c]:.3f}" for c in columns[2:])] for row in rows if "ranks" in row
    ]
    return make_table("the slowest rank over the mean", columns, cells)


def _tokens_table(rows: list[dict[str, Any]]) -> Any:
    columns = ["p5", "p95", "layer_p5", "layer_p95"]
    cells = [
        [row["tokens of"], row["layers"], percent(row["density"]), *(f"{row[c]:.3f}" for c in columns)]
        for row in rows
        if "tokens of" in row
    ]
    titles = ["kind", "layers", "density", "p5", "p95", "p5 of a layer", "p95 of a layer"]
    return make_table("what a token chooses over the mean token", titles, cells)
