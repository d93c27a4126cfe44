"""Benchmark pictures from captions: do they show what the caption says? An EBT and a DiT, several seeds each.

    python -m benchmarks.captions                       # the table of docs/images.md
    python -m benchmarks.captions --seeds 1 --steps 100

Fashion-MNIST's captions are generated from its labels, so a classifier can tell: logistic regression on the pixels of
real pictures says what each made picture shows. Beside the share that is what was asked for stands the share of
held-out real pictures that it gets right. The DiT is trained for as many FLOPs as the EBT. A run that is done is not
repeated.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import typer
from sklearn.linear_model import LogisticRegression

from benchmarks.seeds import Interval
from benchmarks.study import OUTPUT, SEEDS, Model, Study, runs_option, train
from ebt_megatron.config import Recipe
from ebt_megatron.core.cli import guarded
from ebt_megatron.evaluation.sheet import sheet
from ebt_megatron.evaluation.tables import Table
from ebt_megatron.tools.pictures import make
from examples.images import DATA, SIDE
from examples.media import PICTURES, found
from examples.steps import Steps

MODELS = {
    "EBT": Model("images/quickstart_captions"),
    "DiT": Model("images/quickstart_captions_dit", flops_of="EBT"),
}
PASSES, BASELINE_PASSES = 3, 50  # that a picture is made in: by the EBT, by the DiT
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
        where = "--input", str(pictures), "--output", str(CAPTIONED)
        options = f"--height {SIDE} --width {SIDE} --patch 4 --captions-from-labels --resume".split()
        words = "pictures and captions to shards", "ebt_megatron.data_prep.images"
        step("prepare", *words, *where, *options, "--class-names", ",".join(NAMES))


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


class Captions(Study):
    """Whether made pictures show what their captions say.

    Args:
        pictures: real ones, with labels.
    """

    name, title = "captions", "Pictures from captions"
    models = MODELS
    given = (
        f"data.train=[{CAPTIONED / 'train'}]",
        f"data.validation=[{CAPTIONED / 'validation'}]",
        "training.micro_batch_size=32",
    )

    def __init__(self, runs: Path, steps: int | None, pictures: Path):
        super().__init__(runs, steps)
        self.judge = Judge(pictures)
        self.notes = (
            "Shown: the share of made pictures that a classifier of real ones takes for what their caption says, in % "
            f"(of held-out real pictures it gets {100 * self.judge.real:.1f} % right). Variety: the deviation of "
            "pixels between pictures of one caption, in % of that between real ones of its class."
        )
        self._first: list[Any] = []  # pictures of each model's first run, a row a caption

    @staticmethod
    def passes(recipe: Recipe) -> int:
        """Return the passes that a picture is made in."""
        return PASSES if recipe.model.architecture == "ebt" else BASELINE_PASSES

    def run(self, recipe: Recipe) -> dict[str, Any]:
        """Train, unless that is done; what the judge says by guidance, and the pictures of the first guidance."""
        from ebt_megatron.data_prep.captions import TEMPLATES

        train(recipe)
        captions = [TEMPLATES[1].format(name) for name in NAMES]
        made = {
            f"{guidance:g}": make(
                Path(recipe.training.output_dir), captions, [], EACH, self.passes(recipe), guidance
            ).numpy()
            for guidance in GUIDANCE
        }
        return {"said": {g: self.judge.of(pictures) for g, pictures in made.items()}, "made": next(iter(made.values()))}

    def said(self, result: dict[str, Any]) -> str:
        """The share that shows its caption, by guidance."""
        return ", ".join(f"{100 * by['shown']:.1f} % shown with guidance {g}" for g, by in result["said"].items())

    def summary(self, name: str, results: list[dict[str, Any]], recipe: Recipe) -> dict[str, Any]:
        """What the judge says of each seed; the first seed's pictures are kept for `plot`."""
        self._first += list(results[0]["made"][:, :8])
        seeds = [result["said"] for result in results]
        return {"name": name, "steps": recipe.training.steps, "passes": self.passes(recipe), "seeds": seeds}

    def results(self, names: Sequence[str], seeds: int) -> dict[str, Any]:
        """What was found, and how often the judge is right."""
        return super().results(names, seeds) | {"real": self.judge.real, "captions": NAMES}

    def tables(self, results: dict[str, Any]) -> list[Table]:
        """What is shown, by model and guidance."""
        header = ["model", "steps of 32 pictures", "passes", "guidance", "shown", "variety"]
        rows = [
            [
                m["name"],
                f"{m['steps']:,}",
                str(m["passes"]),
                guidance,
                *(Interval.of([seed[guidance][of] for seed in m["seeds"]]).text(1, 100) for of in ("shown", "variety")),
            ]
            for m in results["models"]
            for guidance in m["seeds"][0]
        ]
        return [Table("Pictures", header, rows)]

    def plot(self, results: dict[str, Any]) -> bytes:
        """Made pictures, a row a caption."""
        import torch

        return sheet([torch.from_numpy(row).float() for row in self._first])


def main(
    seeds: int = SEEDS,
    steps: int | None = typer.Option(None, min=1, help="Optimizer steps of the EBT; default: its recipe's."),
    runs: Path = runs_option("runs/bench-captions"),
    output: Path | None = OUTPUT,
) -> None:
    """Train both models with every seed, make pictures of every caption, and write a table and the pictures."""

    def work() -> None:
        path = found(PICTURES, DATA / "pictures", "pictures")[0]
        prepare(Steps("python -m benchmarks.captions"), path)
        Captions(runs, steps, path).conduct(list(MODELS), seeds, output)

    guarded(work)


if __name__ == "__main__":
    typer.run(main)
