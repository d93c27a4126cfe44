"""Commands run one after another, each shown with its output; what the quickstarts are made of."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import typer
from rich.console import Console

from ebt_megatron.core.cli import guarded, quiet_libraries

OVERRIDE: list[str] = typer.Option([], help="key=value for every recipe, e.g. training.seed=2.")
PROCESSES: int = typer.Option(2, help="Ranks: data parallel.")


_WORDS_SHOWN = 24  # of each end of a command


def shown(command: Sequence[str]) -> str:
    """A command for people: of a very long one both ends."""
    left_out = len(command) - 2 * _WORDS_SHOWN
    if left_out <= 1:
        return " ".join(command)
    return " ".join([*command[:_WORDS_SHOWN], f"[{left_out} words more]", *command[-_WORDS_SHOWN:]])


class Steps:
    """Runs commands, and ends the program where one fails.

    Args:
        again: the command that goes on from there.

    Attributes:
        seconds: that each step took, by name.
    """

    def __init__(self, again: str):
        self.console, self.again = Console(), again
        self.seconds: dict[str, float] = {}

    @classmethod
    def run(cls, again: str, work: Callable[[Steps], None]) -> None:
        """Do the work of a quickstart, whose command is `again`; an error of the user's is one line."""
        quiet_libraries()
        guarded(lambda: work(cls(again)))

    def __call__(self, name: str, title: str, module: str, *arguments: str, ranks: int = 0) -> None:
        """Run `python -m MODULE ...`, its output shown; exits with its code if it fails.

        Args:
            name: of the step, for the summary.
            title: shown above its output.
            module, arguments: the command.
            ranks: under torchrun, so many; 0: as it is.
        """
        launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"] if ranks else []
        command = [sys.executable, "-m", *launcher, module, *arguments]
        self.console.rule(title, align="left")
        self.console.print(shown(command), style="dim", soft_wrap=True, highlight=False, markup=False)
        begin = time.perf_counter()
        env = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "TOKENIZERS_PARALLELISM": "true"} | dict(os.environ)
        code = subprocess.run(command, env=env, check=False).returncode
        if code:
            self.console.print(f"[red]error:[/red] this step ended with code {code}; run `{self.again}` again to retry")
            sys.exit(code)
        self.seconds[name] = self.seconds.get(name, 0) + time.perf_counter() - begin

    def train(self, number: int, name: str, recipe: str, ranks: int, *overrides: str) -> None:
        """Pretrain a recipe on so many ranks."""
        self(f"train {name}", f"{number}. pretrain: {name}", "ebt_megatron.train", recipe, *overrides, ranks=ranks)

    def evaluate(self, number: int, name: str, run_dir: Path, *arguments: str) -> None:
        """Evaluate a run."""
        self(f"evaluate {name}", f"{number}. evaluate: {name}", "ebt_megatron.evaluate", str(run_dir), *arguments)

    def done(self, paths: Mapping[str, Path], next_steps: str) -> None:
        """Say how long everything took, where the report is, and how to go on."""
        self.console.rule("done", align="left")
        self.console.print(", ".join(f"{name} {s:.0f} s" for name, s in self.seconds.items()))
        self.console.print(f"report: {paths['html']} and {paths['markdown']}\n\nhow to go on:", highlight=False)
        self.console.print(next_steps, highlight=False, markup=False, soft_wrap=True)
