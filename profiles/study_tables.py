"""The study as tables: rows of a record, and what a terminal shows."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table

from dejavu.predictors.selection import KINDS
from dejavu.predictors.study import POLICIES, SHARES


def study_rows(study: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The study as rows of a record: one a layer, then one a policy and density, then the optional ones."""
    return [
        *(dict(_flat(layer)) for layer in study["layers"]),
        *(row for name in (*KINDS, "optional") for row in study[name]),
    ]


def _flat(row: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in row.items():
        if isinstance(value, Mapping):
            yield from ((f"{key}_{inner}", figure) for inner, figure in value.items())
        else:
            yield key, value


def study_tables(study: Mapping[str, Any]) -> list[Table]:
    """What a terminal shows: the layers, the costs of leaving out neurons and heads, and of blocks."""
    text = study["text"]
    title = f"{text['file']}, {text['tokens']:,} tokens; dense perplexity {study['dense_ppl']:.2f}"
    tables = [
        _layer_table(study, title),
        _cost_table(study["mlp"], "Perplexity increase with so large a share of the neurons"),
        _cost_table(study["heads"], "Perplexity increase with so large a share of the heads"),
    ]
    return [*tables, _block_table(study["optional"])] if study["optional"] else tables


def _layer_table(study: Mapping[str, Any], title: str) -> Table:
    def shares(row: Mapping[str, Any], kind: str) -> str:
        return " / ".join(_percent(row[f"{kind}_{share}"]) for share in SHARES)

    largest = list(study["union"])[-1]
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "layer": lambda row: str(row["layer"]),
        "live neurons (p5 - p95)": lambda row: (
            f"{_percent(row['live_mean'])} ({_percent(row['live_p5'])} - {_percent(row['live_p95'])})"
        ),
        "neurons with 90/95/99%": lambda row: shares(row, "neurons"),
        "heads with 90/95/99%": lambda row: shares(row, "heads"),
        "overlap (other text, chance)": lambda row: (
            f"{_percent(row['overlap'])} ({_percent(row['overlap_unrelated'])}, "
            f"{_percent(row['overlap_by_chance'])})"
        ),
        f"union of {largest}": lambda row: _percent(row["union"][largest]),
        "cosine same/+1/+2": lambda row: " / ".join(
            "-" if x is None else f"{x:.2f}" for x in row["cosine"].values()
        ),
        "|F|/|x| attn, MLP": lambda row: f"{row['attention_ratio']:.2f}, {row['mlp_ratio']:.2f}",
    }
    table = _table(columns, title)
    for row in study["layers"]:
        table.add_row(*(column(row) for column in columns.values()))
    return table


def _cost_table(rows: Sequence[Mapping[str, Any]], title: str) -> Table:
    cells = {(row["policy"], row["density_asked"]): row for row in rows}
    table = _table(["share asked", *POLICIES], title)
    for density in sorted({density for _, density in cells}):
        table.add_row(_percent(density), *(_cost(cells.get((policy, density))) for policy in POLICIES))
    return table


def _cost(row: Mapping[str, Any] | None) -> str:
    if row is None:  # a smaller density was exact
        return "-"
    return f"{_signed(row)} at {_percent(row['density'])}"


def _block_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    cells = {(row["kind"], row["policy"], row["layer"]): row for row in rows}
    title = "Perplexity increase with a block skipped, or with the MLP beside attention"
    table = _table(["layer", "no attention", "no MLP", "MLP in parallel"], title)
    for layer in dict.fromkeys(row["layer"] for row in rows):
        ways = (("heads", "skip"), ("mlp", "skip"), ("mlp", "parallel"))
        costs = [_signed(cells[*way, layer]) if (*way, layer) in cells else "" for way in ways]
        table.add_row("all" if layer is None else str(layer), *costs)
    return table


def _table(columns: Iterable[str], title: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _signed(row: Mapping[str, Any]) -> str:
    """The increase and half its 95% interval's width; from tenfold on, how often dense's perplexity."""
    if row["ppl_increase"] > 9:
        return f"x {1 + row['ppl_increase']:,.0f}"
    if row["low"] is None:
        return f"{row['ppl_increase']:+.2%}"
    return f"{row['ppl_increase']:+.2%} ± {(row['high'] - row['low']) / 2:.2%}"
