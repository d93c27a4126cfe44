"""Checkpoints of many histories in one folder: the newest good save of a run is never deleted, what is said is true."""

import errno
import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ebt_megatron.checkpoint import checkpoints as checkpoint
from ebt_megatron.checkpoint.checkpoints import Checkpoints
from ebt_megatron.checkpoint.history import CheckpointError, History, begin_anew, move_earlier_run, step_of, verify
from ebt_megatron.config import RecipeError
from ebt_megatron.core.launch import attempts
from tests.training.toy import Run, toy_recipe


@pytest.fixture(scope="module")
def toy():
    from ebt_megatron.parallel import setup

    setup.shutdown()
    yield Run(toy_recipe())
    setup.shutdown()


def good(folder: Path) -> bool:
    try:
        verify(folder)
    except CheckpointError:
        return False
    return True


class World:
    """A folder, the runs in it one after another, and what a person or another program does to it."""

    def __init__(self, toy, root: Path, keep: int):
        self.toy, self.run, self.keep = toy, root / "run", keep
        self.away, self.said, self.saves, self.full = root / "away", [], 0, False
        self.checkpoints: Checkpoints | None = None
        self.step = 0

    def everything(self) -> dict[str, list[Path]]:
        """Good checkpoints anywhere in the folder, by what is in them."""
        found: dict[str, list[Path]] = {}
        for sums in self.run.rglob("checksums.json"):
            if good(sums.parent) and not sums.parent.name.endswith(".partial"):
                found.setdefault(json.loads(sums.read_text())["common.pt"], []).append(sums.parent)
        return found

    def published(self) -> list[Path]:
        return History(self.run / "checkpoints", 0).published()

    # --- what the program does -----------------------------------------------------------------

    def start(self, resume: bool) -> None:
        before, published, self.said = self.everything(), self.published(), []
        expected = next((p for p in reversed(published) if good(p)), None)
        left = (self.run / "checkpoints").exists()  # a save that failed leaves its folder
        moved = None if resume else move_earlier_run(self.run)
        self.checkpoints = Checkpoints(self.run / "checkpoints", self.keep, {}, report=self.said.append)
        if not resume:
            assert (moved is not None) == left and (left or not published) and not self.published()
            expected, published = None, []
        try:
            newest = self.checkpoints.resume_point()
        except RecipeError as error:
            assert published and expected is None and "every checkpoint" in str(error)
            self.checkpoints = None
        else:
            assert newest == expected
            self.step = 0
            if newest:
                self.step, _, _ = self.checkpoints.load(newest, self.toy.model, self.toy.optimizer, self.toy.scheduler)
            self.checkpoints.go_on_from(self.step)
            assert [step_of(p) for p in self.published()] == [step_of(p) for p in published if step_of(p) <= self.step]
        assert set(self.everything()) == set(before), "a start deletes nothing"
        self.what_was_said_is_true(published)

    def save(self) -> None:
        if self.checkpoints is None:
            return
        before, published, self.said = self.everything(), self.published(), []
        self.step, self.saves = self.step + 1, self.saves + 1
        t, extra = self.toy, {"save": self.saves}
        error = self.checkpoints.save(self.step, t.model, t.optimizer, t.scheduler, extra)
        after = self.everything()
        if self.full:
            assert "No space left" in error and "the disk is full" in error and "\n" not in error
            assert set(after) == set(before), "a save that fails deletes nothing"
            assert self.published() == published
            return
        assert error is None
        newest = self.checkpoints.newest_good()
        assert self.checkpoints.load(newest, t.model)[:2] == (self.step, extra), "the save just made is the newest"
        kept = [p for p in published if step_of(p) < self.step][-(self.keep - 1) :] if self.keep != 1 else []
        assert self.published() == [*(kept if self.keep else [p for p in published if step_of(p) < self.step]), newest]
        gone = set(before) - set(after)
        assert all(step_of(p) < self.step and p in published for name in gone for p in before[name])
        self.what_was_said_is_true(published)

    def what_was_said_is_true(self, published: list[Path]) -> None:
        for line in self.said:
            if "moved to " in line:
                assert good_or_bad_exists(line.rpartition("moved to ")[2])
            else:
                assert "damaged checkpoint skipped" in line
                assert any(f"{p}:" in line for p in published), line

    # --- what others do ------------------------------------------------------------------------

    def damage(self, which: int) -> None:
        if folders := self.published():
            victim = folders[-1 - which % len(folders)] / "common.pt"
            if victim.exists():
                victim.write_bytes(victim.read_bytes()[:-1] + b"?")

    def lose(self, which: int) -> None:
        if folders := self.published():
            (folders[-1 - which % len(folders)] / "checksums.json").unlink(missing_ok=True)

    def older_run(self, later: int) -> None:
        """Another history has a checkpoint of a later step here."""
        if folders := self.published():
            target = folders[-1].with_name(f"step-{step_of(folders[-1]) + later:08d}")
            if not target.exists():
                shutil.copytree(folders[-1], target)

    def move(self) -> None:
        """The checkpoints are moved away, or back again."""
        there = self.run / "checkpoints"
        if self.away.exists():
            for folder in self.away.iterdir():
                if not (there / folder.name).exists():
                    there.mkdir(parents=True, exist_ok=True)
                    folder.rename(there / folder.name)
            shutil.rmtree(self.away)
        elif there.exists():
            there.rename(self.away)

    def fill_disk(self) -> None:
        self.full = not self.full


def good_or_bad_exists(path: str) -> bool:
    return Path(path).is_dir()


ACTIONS = st.one_of(
    st.tuples(st.just("start"), st.booleans()),
    st.tuples(st.just("save")),
    st.tuples(st.just("save")),
    st.tuples(st.sampled_from(["damage", "lose"]), st.integers(0, 2)),
    st.tuples(st.just("older_run"), st.integers(1, 3)),
    st.tuples(st.sampled_from(["move", "fill_disk"])),
)
START, SAVE = ("start", True), ("save",)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(ACTIONS, max_size=12), st.integers(0, 3))
@example([SAVE, SAVE, ("older_run", 3), START, SAVE, ("older_run", 1), SAVE], 1)  # later ones of another history
@example([SAVE, SAVE, ("damage", 0), START, SAVE, SAVE, SAVE], 1)
@example([SAVE, SAVE, ("start", False), SAVE, ("start", False), SAVE], 1)
@example([SAVE, ("fill_disk",), SAVE, SAVE, ("fill_disk",), SAVE], 1)
@example([SAVE, SAVE, ("move",), START, SAVE, ("move",), SAVE], 2)
@example([SAVE, ("lose", 0), START, SAVE, ("start", False), SAVE], 2)
def test_the_newest_good_save_of_a_run_is_never_deleted(toy, actions, keep):
    original = checkpoint._write

    def write(path, data):
        if world.full:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        original(path, data)

    with tempfile.TemporaryDirectory() as root, pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "_write", write)
        world = World(toy, Path(root), keep)
        for name, *arguments in [START, *actions]:
            getattr(world, name)(*arguments)


def test_steps_past_eight_digits_sort_by_number(tmp_path):
    for step in (99999999, 100000000, 5):
        (tmp_path / f"step-{step:08d}").mkdir()
    (tmp_path / "step-00000007.partial").mkdir()
    assert [step_of(p) for p in History(tmp_path, 1).published()] == [5, 99999999, 100000000]


def test_nothing_of_an_earlier_run_stays_but_earlier_ones(tmp_path):
    left = ["checkpoints", "metrics.jsonl", "metrics-replaced.jsonl", "tensorboard", "recipe.yaml"]
    left += ["evaluation.json", "trace", "wandb", "wandb-id"]
    for number in (1, 2):
        for name in left:
            (tmp_path / name).write_text(str(number))
        (tmp_path / "run.lock").write_text("held")
        assert move_earlier_run(tmp_path) == tmp_path / "earlier" / str(number)
        assert {p.name: p.read_text() for p in (tmp_path / "earlier" / str(number)).iterdir()} == dict.fromkeys(
            left, str(number)
        )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["earlier", "run.lock"]
    assert move_earlier_run(tmp_path) is None


def test_only_a_launch_that_began_a_run_goes_on_with_it_after_a_restart(tmp_path):
    def begin(**launches):
        moved = begin_anew(tmp_path / "run", launches)
        (tmp_path / "run/checkpoints").mkdir(exist_ok=True)
        return moved and moved.name

    assert [begin(a=0), begin(a=1), begin(a=2)] == [None] * 3
    assert begin() == "1" and begin(b=1) == "2", "restarted before it began"
    assert begin(b=2, c=0) is None and begin(c=0) == "3" and begin(c=1, d=0) is None
    (tmp_path / "run/launches.json").write_text("{")
    assert begin(c=1) == "4"


def test_how_often_a_launcher_started_this_again(monkeypatch):
    monkeypatch.setattr(os, "environ", {"PATH": "x", "SLURM_JOB_ID": "7"})
    assert attempts() == {"slurm 7": 0}
    os.environ |= {"TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_RESTART_COUNT": "2", "SLURM_RESTART_COUNT": "1"}
    (first, second), (agent, job) = zip(*attempts().items(), strict=True)
    assert first.startswith(f"torchrun x {os.getppid()} ") and (second, agent, job) == ("slurm 7", 2, 1)
