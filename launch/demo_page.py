"""What `dejavu demo` shows: the same prompt, dense and sparse, side by side."""

import sys

from rich.console import Console
from rich.table import Table

from dejavu.predictors.files import Manifest, read_manifest
from dejavu.runtime.engine import Engine, Generation
from dejavu.runtime.sampling import SamplingParams
from dejavu.runtime.sparsity import DENSE, LOSSLESS, find_predictors, load_policy
from dejavu.runtime.weights import DEMO

PROMPTS = ("It was a dark and stormy night", "The old man looked at the sea")
_PARAMS = SamplingParams(max_new_tokens=64, temperature=0.8, top_p=0.95, seed=1)
_TITLES = {DENSE: "dense", LOSSLESS: "lossless", DEMO: "predicted"}


def show_demo(engine: Engine) -> None:
    """Prints a table for each prompt, and where the predictors come from."""
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    policies = {
        name: engine.tp.agree(lambda name=name: load_policy(name, engine.model, engine.fingerprint))  # type: ignore[misc]
        for name in _TITLES
    }
    for prompt in PROMPTS:
        runs: dict[str, Generation] = {}
        agreement = {DENSE: 1.0}
        for name, policy in policies.items():
            engine.policy = policy
            runs[name] = engine.generate([prompt], _PARAMS)
            if (
                policy is not None
            ):  # once more, every step beside its dense step; the run above is the timed one
                drift = engine.generate([prompt], _PARAMS, verify_every=1).drift
                agreement[name] = drift["top1_agreement"] if drift is not None else 1.0
        console.print(_table(prompt, runs, agreement))
    console.print(_origin(read_manifest(find_predictors(DEMO))))


def _table(prompt: str, runs: dict[str, Generation], agreement: dict[str, float]) -> Table:
    table = Table(title=prompt + " ...", title_justify="left", show_lines=True)
    table.add_column("")
    for name in runs:
        table.add_column(_TITLES[name], ratio=1)
    dense = runs[DENSE].results[0].token_ids
    rows = {
        "text": [run.results[0].text.strip() for run in runs.values()],
        "tokens before it leaves dense's text": [
            f"{_common(dense, run.results[0].token_ids)} of {len(dense)}" for run in runs.values()
        ],
        "likeliest token is dense's": [f"{100 * agreement[name]:.1f}% of steps" for name in runs],
        "neurons, heads computed": [
            f"{100 * run.density['mlp']:.1f}%, {100 * run.density['heads']:.1f}%" for run in runs.values()
        ],
        "weights read a step": [f"{run.weight_bytes / 1e6:.1f} MB" for run in runs.values()],
        "time a token": [
            f"{run.ms_per_token['mean']:.1f} ms" if run.ms_per_token else "-" for run in runs.values()
        ],
    }
    for title, cells in rows.items():
        table.add_row(title, *cells)
    return table


def _common(a: list[int], b: list[int]) -> int:
    """How many tokens two texts begin with in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _origin(manifest: Manifest) -> str:
    point = manifest.points[manifest.default or 0]
    made = "\n".join(f"  {command}" for command in manifest.commands)
    return (
        "On a model this small choosing costs more time than it saves.\n"
        f"The predictors, calibrated to {manifest.target} "
        f"(measured {100 * point.ppl_increase:+.2f}%), were made by\n{made}"
    )
