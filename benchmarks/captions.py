"""Benchmark pictures from captions: do they show what the caption says? An EBT and a DiT, several seeds each.

    python -m benchmarks.captions                       # the table of docs/images.md
    python -m benchmarks.captions --seeds 1 --steps 100

Fashion-MNIST's captions are generated from its labels, so a classifier can tell: logistic regression on the pixels of
real pictures says what each made picture shows. Beside the share that is what was asked for stands the share of
held-out real pictures that it gets right. The DiT is trained for as many FLOPs as the EBT. A run that is done is not
repeated.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import track
from sklearn.linear_model import LogisticRegression

from benchmarks.images import flops
from benchmarks.seeds import Interval, Model, resolved_recipe, run_folder, train, write_results
from benchmarks.step import machine
from ebt_megatron.config import Recipe, load_recipe
from ebt_megatron.core.cli import guarded
from ebt_megatron.core.files import write_whole
from ebt_megatron.evaluation.sheet import sheet
from ebt_megatron.evaluation.tables import Table
from ebt_megatron.tools.pictures import make
from examples.images import DATA, SIDE
from examples.media import PICTURES, found
from examples.steps import Steps

MODELS = {"EBT": Model("quickstart_captions"), "DiT": Model("quickstart_captions_dit", flops_of="EBT")}
PASSES = {"EBT": 3, "DiT": 50}
GUIDANCE = (0.0, 1.0, 3.0)
NAMES = (
    "a T-shirt",
    "trousers",
    "a pullover",
    "a dress",
    "a coat",
    "a sandal",
    "a shirt",
    "a sneaker",
    "a bag",
    "an ankle boot",
)
CAPTIONED = Path("data/captions")
EACH = 32  # pictures of each caption
FITTED, HELD_OUT = 6000, 2000  # real pictures


def prepare(step: Steps, pictures: Path) -> None:
    """Pictures and generated captions as shards at CAPTIONED, unless they are there."""
    if not (CAPTIONED / "train" / "manifest.json").exists():
        step(
            "prepare",
            "pictures and captions to shards",
            "ebt_megatron.data_prep.images",
            "--input",
            str(pictures),
            "--output",
            str(CAPTIONED),
            "--height",
            str(SIDE),
            "--width",
            str(SIDE),
            "--patch",
            "4",
            "--captions-from-labels",
            "--class-names",
            ",".join(NAMES),
            "--resume",
        )


def recipe_of(name: str, seed: int, runs: Path, steps: int | None) -> Recipe:
    """The recipe of one run, its number of steps resolved."""

    def load(model: Model, steps: int | None) -> Recipe:
        given = () if steps is None else (f"training.steps={steps}",)
        return load_recipe(
            f"images/{model.recipe}",
            [
                f"data.train=[{CAPTIONED / 'train'}]",
                f"data.validation=[{CAPTIONED / 'validation'}]",
                "training.micro_batch_size=32",
                f"training.seed={1234 + seed}",
                f"training.output_dir={run_folder(runs, name, seed)}",
                *given,
            ],
        )

    return resolved_recipe(MODELS, name, load, flops, steps)


class Judge:
    """Says which class a picture shows.

    Attributes:
        real: the share of held-out real pictures that it gets right.
    """

    def __init__(self, path: Path):
        from ebt_megatron.data_prep.images import read_array

        pictures, labels = read_array(str(path))
        assert labels is not None
        chosen = np.random.default_rng(0).permutation(len(pictures))[: FITTED + HELD_OUT]
        rows = pictures[chosen].reshape(len(chosen), -1) / 255
        self._classifier = LogisticRegression(max_iter=300).fit(rows[:FITTED], labels[chosen[:FITTED]])
        self.real = float(self._classifier.score(rows[FITTED:], labels[chosen[FITTED:]]))
        real = [rows[labels[chosen] == label] for label in range(len(NAMES))]
        self._spread = float(np.mean([of.std(0).mean() for of in real]))

    def of(self, made: np.ndarray) -> dict[str, float]:
        """Judge pictures [classes, each, height, width, 3]: how many show their class, how they differ in one."""
        grey = made.mean(-1).reshape(*made.shape[:2], -1) / 255
        said = self._classifier.predict(grey.reshape(-1, grey.shape[-1])).reshape(made.shape[:2])
        shown = (said == np.arange(len(made))[:, None]).mean()
        return {"shown": float(shown), "variety": float(grey.std(1).mean()) / self._spread}


def run(recipe: Recipe, judge: Judge, passes: int) -> tuple[dict[str, Any], Any]:
    """Train, unless that is done; what the judge says by guidance, and the pictures of the first guidance."""
    from ebt_megatron.data_prep.captions import TEMPLATES

    train(recipe)
    captions = [TEMPLATES[1].format(name) for name in NAMES]
    said, first = {}, None
    for guidance in GUIDANCE:
        made = make(Path(recipe.training.output_dir), captions, [], EACH, passes, guidance)
        first = made if first is None else first
        said[f"{guidance:g}"] = judge.of(made.numpy())
    return said, first


def markdown(results: dict[str, Any]) -> str:
    """The table, for people."""
    where = results["machine"]
    begin = (
        f"Pictures from captions on {where['machine']}, torch {where['torch']}, {where['date']}; mean ± half-width of "
        "the 95 % interval over seeds. Shown: the share of made pictures that a classifier of real ones takes for what "
        f"their caption says, in % (of held-out real pictures it gets {100 * results['real']:.1f} % right). Variety: "
        "the deviation of pixels between pictures of one caption, in % of that between real ones of its class.\n"
    )
    header = ["model", "steps of 32 pictures", "passes", "guidance", "shown", "variety"]
    rows = [
        [
            m["name"],
            f"{m['steps']:,}",
            str(m["passes"]),
            guidance,
            *(Interval.of([seed[guidance][what] for seed in m["seeds"]]).text(1, 100) for what in ("shown", "variety")),
        ]
        for m in results["models"]
        for guidance in m["seeds"][0]
    ]
    return f"{begin}\n{Table('Pictures', header, rows).markdown()}\n"


def main(
    seeds: int = typer.Option(3, min=1, max=10, help="Runs of each model."),
    steps: int | None = typer.Option(None, min=1, help="Optimizer steps of the EBT; default: its recipe's."),
    runs: Path = typer.Option(Path("runs/bench-captions"), help="Where the runs go; what is done is not repeated."),
    output: Path | None = typer.Option(None, help="Folder for the results; default: only printed and in --runs."),
) -> None:
    """Train both models with every seed, make pictures of every caption, and write a table and the pictures."""

    def work() -> None:
        path = found(PICTURES, DATA / "pictures", "pictures")[0]
        prepare(Steps("python -m benchmarks.captions"), path)
        judge, console, models, rows = Judge(path), Console(width=160), [], []
        for name in track(MODELS, description="train", console=console, transient=True):
            recipes = [recipe_of(name, seed, runs, steps) for seed in range(seeds)]
            said, pictures = zip(*(run(recipe, judge, PASSES[name]) for recipe in recipes), strict=True)
            rows += list(pictures[0][:, :8].float())
            models.append({"name": name, "steps": recipes[0].training.steps, "passes": PASSES[name], "seeds": said})
        results = {"machine": machine(), "real": judge.real, "captions": NAMES, "models": models}
        text = markdown(results)
        console.print(text, markup=False, highlight=False)
        write_results(output or runs, "captions", results, text, lambda _, at: write_whole(at, sheet(rows)))

    guarded(work)


if __name__ == "__main__":
    typer.run(main)
