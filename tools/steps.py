"""Commands run one after another, each shown with its output; what the quickstarts are made of."""

from __future__ import annotations

import os
import subprocess
import sys
import time

from rich.console import Console


class Steps:
    """Runs commands, and ends the program where one fails.

    Args:
        console: where titles go.
        again: the command that goes on from there.
    """

    def __init__(self, console: Console, again: str):
        self.console, self.again = console, again

    def __call__(self, title: str, command: list[str]) -> float:
        """Run a command, its output shown; exits with its code if it fails. Returns seconds."""
        self.console.rule(title, align="left")
        self.console.print(" ".join(command), style="dim", soft_wrap=True, highlight=False)
        begin = time.perf_counter()
        env = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "TOKENIZERS_PARALLELISM": "true"} | dict(os.environ)
        code = subprocess.run(command, env=env, check=False).returncode
        if code:
            self.console.print(f"[red]error:[/red] this step ended with code {code}; run `{self.again}` again to retry")
            sys.exit(code)
        return time.perf_counter() - begin
