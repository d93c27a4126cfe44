"""The first hour on a GPU: is everything right there, and how fast is it? Pieces of at most nine minutes, resumable.

    python -m benchmarks.gpu_validate                          # all pieces, or those that are not done
    python -m benchmarks.gpu_validate --piece gradients --piece "training xxs"
    python -m benchmarks.gpu_validate --again                  # forget what is done

Every piece runs in a process of its own, so that a kernel that breaks its device costs no other piece. Rows are written
as they come, to RESULTS/DEVICE/PIECE.json; a piece that ran out of time or failed keeps the rows that it has, and
is run again next time. The table of all of them is RESULTS/DEVICE.md. On a CPU machine the checks take a tiny case in
Triton's interpreter, and the rest says "not measured".
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console

from benchmarks.gpu import checks, speed
from ebt_megatron.core.cli import guarded
from ebt_megatron.core.files import write_whole
from ebt_megatron.evaluation.tables import Table

LIMIT = 540  # seconds of a piece
RESULTS = Path("benchmarks/results")
# What is checked takes nothing; what is measured takes the measured rates, and there is none without a GPU.
CHECKS: dict[str, Callable[[], Any]] = {
    **{f"kernels {str(t).removeprefix('torch.')}": partial(checks.kernels_right, t) for t in checks.TOLERANCE},
    "gradients": checks.whole_model,
    "losses": checks.golden,
    "collectives": checks.nccl,
}
SPEEDS: dict[str, Callable[[speed.Rates], speed.Rows]] = {
    "attention with tangents": speed.tangent_attention,
    "causal attention": speed.causal_attention,
    "elementwise": speed.elementwise,
    "vocabulary": speed.vocabulary,
    **{f"training {size}": partial(speed.training, size=size) for size in ("xxs", "small", "medium")},
    "generation": speed.generation,
}
PIECES = (*CHECKS, *SPEEDS)


def device() -> str:
    """The name of what is validated."""
    return torch.cuda.get_device_name() if checks.GPU else "CPU interpreter"


def facts() -> dict[str, Any]:
    """What it was run on, and when."""
    import triton

    versions = {"torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda}
    return {"device": device(), "date": date.today().isoformat(), **versions, "python": platform.python_version()}


def rows_of(piece: str) -> Iterator[dict[str, Any]]:
    """What a piece finds, as it comes."""
    if piece in CHECKS:
        yield from CHECKS[piece]()
    elif checks.GPU:
        yield from SPEEDS[piece](speed.device_rates())


def run(piece: str, path: Path) -> None:
    """Run a piece in this process; rows are in the file as soon as they are known."""
    found: dict[str, Any] = {**facts(), "done": False, "rows": []}
    for row in rows_of(piece):
        found["rows"].append(row)
        write_whole(path, json.dumps(found, indent=1) + "\n")
    write_whole(path, json.dumps(found | {"done": True}, indent=1) + "\n")


def run_apart(piece: str, path: Path, limit: float) -> str:
    """Run a piece in a process of its own; returns why it did not end well, or nothing."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu_validate", "--child", "--piece", piece]
    try:
        done = subprocess.run(
            [*command, "--output", str(path)], timeout=limit, stderr=subprocess.PIPE, text=True, check=False
        )
    except subprocess.TimeoutExpired:
        return f"stopped after {limit:.0f} s"
    return "" if done.returncode == 0 else f"ended with code {done.returncode}: {done.stderr.strip()[-300:]}"


def read(path: Path) -> dict[str, Any]:
    """What there is of a piece."""
    return json.loads(path.read_text()) if path.exists() else {"done": False, "rows": []}


def markdown(folder: Path) -> str:
    """The tables of all pieces."""

    def cell(value: Any) -> str:
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    out = [f"# Validation on {device()}", "Each piece says when and with what it ran; commands: `make validate-gpu`."]
    for piece in PIECES:
        found = read(folder / f"{piece}.json")
        rows = found["rows"]
        what = ", ".join(str(found[key]) for key in ("date", "torch", "triton", "cuda") if found.get(key))
        said = found.get("ended badly", "") or ("" if found["done"] else "not run")
        out.append(f"## {piece}\n\n{', '.join(filter(None, (what, said)))}")
        if rows:
            head = list(dict.fromkeys(key for row in rows for key in row))
            out.append(Table(piece, head, [[cell(row.get(key, "")) for key in head] for row in rows]).markdown())
        else:
            out.append("not measured")
    return "\n\n".join(out) + "\n"


def main(
    piece: list[str] = typer.Option(list(PIECES), help="Which, in this order."),
    again: bool = typer.Option(False, "--again", help="Also those that are done."),
    limit: float = typer.Option(LIMIT, min=1, help="Seconds that a piece may take."),
    output: Path = typer.Option(RESULTS, help="Folder of the results."),
    child: bool = typer.Option(False, "--child", hidden=True),
) -> None:
    """Check and measure; exits with 1 if something is wrong."""
    if child:
        run(piece[0], output)
        return

    def work() -> None:
        if unknown := [name for name in piece if name not in PIECES]:
            raise typer.BadParameter(f"no piece '{unknown[0]}': choose of {', '.join(PIECES)}")
        slug = "".join(c if c.isalnum() else "-" for c in device().lower()).strip("-")
        folder, console = output / f"gpu-{slug}", Console(width=160)
        folder.mkdir(parents=True, exist_ok=True)
        wrong = 0
        for name in piece:
            path, begin = folder / f"{name}.json", time.monotonic()
            if read(path)["done"] and not again:
                console.print(f"{name}: done before", highlight=False)
            else:
                path.unlink(missing_ok=True)
                if why := run_apart(name, path, limit):
                    write_whole(path, json.dumps({**facts(), **read(path), "ended badly": why}, indent=1) + "\n")
                    wrong += 1
                said = why or f"{len(read(path)['rows'])} rows in {time.monotonic() - begin:.0f} s"
                console.print(f"{name}: {said}", highlight=False, markup=False)
            failed = [row for row in read(path)["rows"] if row.get("passed") is False]
            for row in failed:
                console.print(f"  wrong: {row}", style="red", highlight=False, markup=False)
            wrong += len(failed)
            write_whole(folder.with_suffix(".md"), markdown(folder))
        console.print(f"{folder.with_suffix('.md')}: {'all is right' if not wrong else f'{wrong} went wrong'}")
        if wrong:
            raise typer.Exit(1)

    guarded(work)


if __name__ == "__main__":
    typer.run(main)
