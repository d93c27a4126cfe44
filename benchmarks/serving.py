"""Benchmark ebt-serve: requests a second one at a time and several at a time, over a socket, from a process of its own.

Weights are random: the time does not depend on them. Every request has its own prompt of 4 to 19 tokens; greedy.

    python -m benchmarks.serving
    python -m benchmarks.serving --model runs/x --requests 50 --tokens 8
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from ebt_megatron.core.files import write_whole
from ebt_megatron.core.machine import machine

ROOT = Path(__file__).parents[1]
ARCHITECTURES = {"ebt": "EBT, 2 steps", "baseline": "Transformer++"}


def write_model(folder: Path, size: str, architecture: str) -> Path:
    """An exported model of random weights, whose tokenizer is of the documentation."""
    from ebt_megatron.config import load_recipe
    from ebt_megatron.data_prep.documents import Part
    from ebt_megatron.data_prep.text import prepare_text
    from ebt_megatron.data_prep.text_passes import TextSettings
    from ebt_megatron.parallel.setup import shutdown
    from ebt_megatron.sharing.export import export_folder
    from ebt_megatron.training.run import Run

    texts = [[Part(str(path))] for path in sorted((ROOT / "docs").glob("*.md"))]
    for part in texts:  # Markdown is no kind of input: as text
        copy = folder / Path(part[0].path).with_suffix(".txt").name
        copy.write_bytes(Path(part[0].path).read_bytes())
        part[0] = Part(str(copy))
    prepare_text(folder / "data", texts, TextSettings(train_bpe=4096, sequence_length=256), "a benchmark")
    run = Run(
        load_recipe(
            "text/s1_xxs",
            [
                f"model.size={size}",
                f"model.architecture={architecture}",
                "data.sequence_length=256",
                f"data.train=[{folder}/data/train]",
                f"data.validation=[{folder}/data/validation]",
                f"training.output_dir={folder}/run",
                "training.global_batch_size=1",
                "training.micro_batch_size=1",
                "training.validation_interval=0",
            ],
        )
    )
    run.begin()
    run.write_checkpoint(None)
    run.checkpoints.wait()
    run.close()
    export_folder(folder / "run", folder / "model")
    shutdown()
    return folder / "model"


@contextlib.contextmanager
def served(model: Path, rows: int) -> Iterator[str]:
    """The address of a server in a process of its own."""
    command = [sys.executable, "-m", "ebt_megatron.serve.command", str(model), "--port", "0", "--rows", str(rows)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        line = server.stderr.readline()
        found = re.search(r"http://\S+?:\d+", line)
        if found is None:
            server.kill()
            raise RuntimeError(line + server.stderr.read())
        try:
            yield found[0]
        finally:
            server.terminate()


async def ask(address: str, prompts: list[str], tokens: int, at_a_time: int) -> dict[str, Any]:
    """Ask for all continuations; requests and tokens a second, seconds of a request, and how many were lost."""
    import httpx

    turn, seconds, made, lost = asyncio.Semaphore(at_a_time), list[float](), 0, 0
    async with httpx.AsyncClient(timeout=600, limits=httpx.Limits(max_connections=at_a_time)) as client:

        async def one(prompt: str) -> None:
            nonlocal made, lost
            async with turn:
                begin = time.perf_counter()
                body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0}
                answer = await client.post(f"{address}/v1/completions", json=body)
                seconds.append(time.perf_counter() - begin)
            if answer.status_code == 200:
                made += answer.json()["usage"]["completion_tokens"]
            else:
                lost += 1

        begin = time.perf_counter()
        await asyncio.gather(*map(one, prompts))
        whole = time.perf_counter() - begin
    return {
        "requests": len(prompts),
        "lost": lost,
        "seconds": whole,
        "requests a second": len(prompts) / whole,
        "tokens a second": made / whole,
        "median seconds of a request": statistics.median(seconds),
        "longest seconds of a request": max(seconds),
    }


def measure(model: Path, requests: int, tokens: int, at_a_time: list[int]) -> dict[str, Any]:
    """Each number of requests at a time, of one server; the first some requests warm it up."""
    words = re.findall(r"[A-Za-z]{3,}", (ROOT / "README.md").read_text())
    prompts = [" ".join(words[i : i + 3 + i % 10]) for i in range(requests)]
    with served(model, max(at_a_time)) as address:
        asyncio.run(ask(address, prompts[:16], tokens, max(at_a_time)))
        return {str(n): asyncio.run(ask(address, prompts, tokens, n)) for n in at_a_time}


def main(
    model: Path | None = typer.Option(None, help="A run or an exported folder; default: random weights."),
    size: str = typer.Option("4xs", help="Of random weights, a model.size."),
    requests: int = typer.Option(200, min=1),
    tokens: int = typer.Option(16, min=1, help="Of a continuation, at most."),
    at_a_time: list[int] = typer.Option([1, 16], help="Requests under way; give it again for more."),
    output: Path | None = typer.Option(None, help="Also write the numbers as JSON."),
) -> None:
    """Throughput of ebt-serve one at a time and several at a time."""
    console, facts = Console(width=140), machine()
    console.print(facts)
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        for architecture, title in ARCHITECTURES.items() if model is None else [("", str(model))]:
            folder = Path(scratch, architecture)
            folder.mkdir(exist_ok=True)
            which = model or write_model(folder, size, architecture)
            found[title] = measure(which, requests, tokens, at_a_time)
    table = Table("model", "at a time", "requests/s", "tokens/s", "median s", "longest s", "lost")
    for title, rows in found.items():
        for n, row in rows.items():
            numbers = [f"{row[key]:.3g}" for key in list(row)[3:]]
            table.add_row(title, n, *numbers, str(row["lost"]))
    console.print(table)
    if output:
        about = {"machine": facts, "size": str(model or size), "tokens": tokens, "models": found}
        write_whole(output, json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
