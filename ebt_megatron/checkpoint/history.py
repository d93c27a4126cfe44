"""The folder of a run's checkpoints: which are good, which go, and which are set aside.

A checkpoint is a folder `step-00000200`, written under another name and renamed when complete, with its
files' checksums. A save deletes only older checkpoints than itself, and none that it cannot replace. What
would sort above the newest one of this run (left by another history, or damaged) is moved to `aside/`,
never deleted. One process calls this, that of rank 0.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from ebt_megatron.core.files import write_whole

_NAME = re.compile(r"step-(\d{8,})")
BEST = "best"  # in a run's folder: its checkpoints of the lowest validation losses
_RUN_FILES = (
    "checkpoints",
    BEST,
    "metrics.jsonl",
    "metrics-replaced.jsonl",
    "tensorboard",
    "recipe.yaml",
    "evaluation.json",
    "trace",
    "wandb",
    "wandb-id",
)


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read; the message says which and why."""


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write(path: Path, data: bytes) -> None:
    """Write a file through to the disk."""
    with path.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def verify(folder: Path) -> None:
    """Compare every file of a checkpoint with its recorded checksum.

    Raises:
        CheckpointError: naming the first file that is missing or differs.
    """
    try:
        recorded = dict(json.loads((folder / "checksums.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{folder}: checksums.json cannot be read ({error})") from None
    for name, expected in recorded.items():
        path = folder / name
        if not path.exists():
            raise CheckpointError(f"{folder}: {name} is missing")
        try:
            same = digest(path) == expected
        except OSError as error:
            raise CheckpointError(f"{folder}: {name} cannot be read ({error})") from None
        if not same:
            raise CheckpointError(f"{folder}: {name} does not match its checksum")


def step_of(folder: Path) -> int:
    """The optimizer steps that a checkpoint's name says."""
    found = _NAME.fullmatch(folder.name)
    assert found, folder
    return int(found[1])


def losses_of(folder: Path) -> dict[str, float]:
    """The validation losses of checkpoints in RUN/best, by name; infinite where losses.json does not say one."""
    known: dict[str, float] = {}
    with contextlib.suppress(OSError, ValueError, TypeError):
        known = dict(json.loads((folder / "losses.json").read_text()))
    return {path.name: known.get(path.name, math.inf) for path in History(folder, 0).published()}


def located(path: Path) -> tuple[Path, Path | None]:
    """A run's folder, and which of its checkpoints is meant.

    Args:
        path: RUN, for its newest good one (None); RUN/best, for that of the lowest loss; or a checkpoint's own folder,
            RUN/best/step-00000200 or RUN/checkpoints/step-00000200.
    """
    if (path / "recipe.yaml").exists():
        return path, None
    if _NAME.fullmatch(path.name) and (path.parent.parent / "recipe.yaml").exists():
        return path.parent.parent, path
    losses = losses_of(path) if path.name == BEST and (path.parent / "recipe.yaml").exists() else {}
    return (path.parent, path / min(losses, key=lambda name: losses[name])) if losses else (path, None)


def _free(parent: Path, name: str) -> Path:
    """A name in `parent` that nothing has."""
    names = itertools.chain([name], (f"{name}.{i}" for i in itertools.count(2)))
    return next(parent / n for n in names if not (parent / n).exists())


class History:
    """The checkpoints in a folder.

    Args:
        folder: holds one folder for each checkpoint; need not exist.
        keep: how many of the newest stay; 0: all.
    """

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder, keep

    def published(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return sorted((p for p in self.folder.glob("step-*") if _NAME.fullmatch(p.name) and p.is_dir()), key=step_of)

    def newest_good(self, report: Callable[[str], None]) -> Path | None:
        """The newest checkpoint whose checksums hold; reports those that do not."""
        for folder in reversed(self.published()):
            try:
                verify(folder)
            except CheckpointError as error:
                report(f"damaged checkpoint skipped: {error}")
                continue
            return folder
        return None

    def set_aside_after(self, step: int, report: Callable[[str], None]) -> None:
        """Move checkpoints of later steps than `step` to aside/, and clear what a killed save left."""
        for folder in self.published():
            if step_of(folder) > step:
                self._set_aside(folder, report)
        for partial in self.folder.glob("step-*.partial"):
            shutil.rmtree(partial, ignore_errors=True)

    def _set_aside(self, folder: Path, report: Callable[[str], None]) -> None:
        aside = self.folder / "aside"
        aside.mkdir(exist_ok=True)
        target = _free(aside, folder.name)
        folder.rename(target)
        report(f"{folder} is damaged or of another history: moved to {target}")

    def start_partial(self, step: int) -> Path:
        """An empty folder to write the checkpoint of `step` in."""
        partial = self.folder / f"step-{step:08d}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        return partial

    def publish(self, partial: Path, sums: dict[str, str], prune: bool, report: Callable[[str], None]) -> None:
        """Give a complete checkpoint its name; older ones than the newest `keep` go.

        Args:
            partial: from `start_partial`, with all its files.
            sums: their checksums.
            prune: False: nothing goes.
            report: told of what is set aside.
        """
        final = partial.with_suffix("")
        write(partial / "checksums.json", json.dumps(sums, indent=1).encode())
        _sync_folder(partial)
        self._clear_way(step_of(final), report)
        os.replace(partial, final)
        _sync_folder(self.folder)
        if prune and self.keep > 0:
            for old in self.published()[: -self.keep]:
                shutil.rmtree(old, ignore_errors=True)

    def _clear_way(self, step: int, report: Callable[[str], None]) -> None:
        for other in self.published():
            if step_of(other) >= step:
                self._set_aside(other, report)


def begin_anew(run: Path, launches: dict[str, int]) -> Path | None:
    """Move what an earlier run left in its folder to RUN/earlier/N, unless this very run left it.

    Args:
        run: the folder.
        launches: that this process is of, and how often each has started it again (`core.launch.attempts`).

    Returns:
        Where it is; None if there is nothing, or it is this run's own.
    """
    record = run / "launches.json"
    with contextlib.suppress(OSError, ValueError):
        if any(launches.get(name) for name in json.loads(record.read_text())):
            return None
    moved = move_earlier_run(run)
    run.mkdir(parents=True, exist_ok=True)
    write_whole(record, json.dumps(list(launches)))
    return moved


def move_earlier_run(run: Path) -> Path | None:
    """Move what a run left in its folder to RUN/earlier/N; None if there is nothing."""
    left = [run / name for name in _RUN_FILES if (run / name).exists()]
    if not left:
        return None
    numbers = (run / "earlier" / str(i) for i in itertools.count(1))
    target = next(n for n in numbers if not n.exists())
    target.mkdir(parents=True)
    for path in left:
        with contextlib.suppress(FileNotFoundError):
            path.rename(target / path.name)
    return target
