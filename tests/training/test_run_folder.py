"""What a run does to its folder: saves that fail, streaks of bad steps, earlier runs, other data, another schedule."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from ebt_megatron.config import RecipeError
from ebt_megatron.core.errors import DataError
from tests.builders import small_recipe, text_shards
from tests.distributed_utils import run_ranks
from tests.training import runs

ALL, KEPT_SCHEDULE = ("training.keep_checkpoints=0",), ("optimizer.decay_steps=12",)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return text_shards(tmp_path_factory.mktemp("data"), runs.DOCUMENTS[:60], 10, 200, vocab=300)


def _one_after_another(data, root, plan):
    """What `runs.train` gives, or the error it raises, for every (folder, overrides, trouble) or function of `plan`."""
    from ebt_megatron.checkpoint import checkpoints as checkpoint

    answers, write = [], checkpoint._write
    for step in plan:
        checkpoint._write = write
        if isinstance(step[0], str):
            folder, overrides, trouble = step
            try:
                answers.append(runs.train(data, root / folder, ("training.micro_batch_size=4", *overrides), trouble))
            except (RecipeError, DataError, runs.StoppedHere) as error:
                answers.append({"error": str(error), "said": []})
            answers[-1]["saved"] = saved(root / folder)
        else:
            function, *arguments = step
            function(*(root / a for a in arguments))
    return answers


def saved(folder: Path) -> list[int]:
    return sorted(int(p.name[5:]) for p in folder.glob("checkpoints/step-????????"))


def life(data, root, *plan):
    return run_ranks(_one_after_another, 1, data, root, plan, timeout=200)[0]


def has(answer, *words):
    return any(all(w in line for w in words) for line in answer["said"])


def test_what_is_saved_at_a_stop_at_the_end_and_in_a_streak_of_bad_steps(data, tmp_path):
    plan = [
        (t, ALL, t)
        for t in (
            "full_at_the_end",
            "full_when_told_to_stop",
            "sigterm",
            "ctrl_c",
            "bad_streak",
            "sigterm_in_a_bad_streak",
            "bad_end",
        )
    ]
    end, stop, sigterm, ctrl_c, streak, stopped_in_streak, bad_end = life(data, tmp_path, *plan)
    for answer, step, newest in ((end, 12, "step-00000009"), (stop, 5, "step-00000003")):
        assert f"step {step} is not saved" in answer["stopped"] and "the disk is full" in answer["stopped"]
        assert answer["stopped"].endswith(newest)
        assert not has(answer, "told to stop") and not has(answer, "training goes on")
    assert (end["saved"], stop["saved"]) == ([3, 6, 9], [3])
    for answer in (sigterm, ctrl_c):
        assert answer["saved"] == [3, 5] and has(answer, "told to stop: saved step 5")
    assert streak["saved"] == [3, 8, 9, 12], "the save of step 6 waits for a good step"
    assert stopped_in_streak["saved"] == [3, 8] and has(stopped_in_streak, "told to stop: saved step 8")
    assert bad_end["saved"] == [3, 6, 9, 12] and has(bad_end, "step 12 is saved with the weights of step 10")


def test_the_save_after_bad_steps_deletes_nothing(data, tmp_path):
    (answer,) = life(data, tmp_path, ("run", ("training.keep_checkpoints=1",), "bad_end"))
    assert answer["saved"] == [9, 12]


def test_a_folder_that_was_used_before(data, tmp_path):
    longer = ("training.steps=15", "training.keep_checkpoints=1")
    first, again, anew, extended, kept, checkpoints_gone = life(
        data,
        tmp_path,
        ("run", (), ""),
        ("run", (), ""),
        ("run", (*KEPT_SCHEDULE, "training.resume=false", "training.steps=3"), ""),
        (shutil.copytree, "run/earlier/1", "longer"),
        ("longer", longer, ""),
        (shutil.copytree, "run/earlier/1", "kept"),
        ("kept", (*longer, *KEPT_SCHEDULE), ""),
        (shutil.rmtree, "kept/checkpoints"),
        ("kept", ("training.steps=3",), ""),
    )
    assert again["after"] == [] and again["digest"] == first["digest"] and again["saved"] == [9, 12]
    assert anew["after"] == first["after"][:3] and anew["saved"] == [3] and has(anew, "is moved to", "earlier/1")
    assert saved(tmp_path / "run/earlier/1") == [9, 12]
    assert [r["step"] for r in runs.rows(tmp_path / "run/earlier/1")] == list(range(1, 13))
    replaced = [json.loads(x) for x in (tmp_path / "kept/metrics-replaced.jsonl").read_text().splitlines()]
    words = "optimizer.decay_steps 12 -> 15", "at step 12 it goes from 0.0001 to", "optimizer.decay_steps=12 keeps it"
    assert has(extended, *words) and extended["saved"] == [15]
    assert not has(kept, "schedule") and len(kept["after"]) == 3
    assert [r["lr"] for r in replaced[11:]] == pytest.approx([1e-4] * 4)
    assert has(checkpoints_gone, "no checkpoint in", "metrics.jsonl goes to step 15", "kept in metrics-replaced.jsonl")
    assert [r["step"] for r in replaced] == list(range(1, 16))


def test_fewer_steps_than_were_taken_change_nothing(data, tmp_path):
    short = ("training.steps=3", "training.async_save=false")
    _, fewer, same = life(
        data, tmp_path, ("run", short, ""), ("run", (*short, "training.steps=2"), ""), ("run", short, "")
    )
    assert "run is at step 3, past training.steps=2: nothing is changed" in fewer["error"]
    assert fewer["saved"] == same["saved"] == [3] and same["after"] == []
    assert "steps: 3" in (tmp_path / "run/recipe.yaml").read_text()


def _restarts(count):
    """As torchrun --max-restarts sets it."""
    os.environ["TORCHELASTIC_RESTART_COUNT"] = count.name


def test_a_run_begun_anew_goes_on_after_a_restart(data, tmp_path):
    anew = ("training.resume=false", *ALL)
    earlier, begun, restarted, again = life(
        data,
        tmp_path,
        ("run", ALL, ""),
        (_restarts, "0"),
        ("run", anew, "sigterm"),
        (_restarts, "1"),
        ("run", anew, ""),
        (_restarts, "0"),
        ("run", (*anew, "training.steps=3"), ""),
    )
    assert begun["saved"] == [3, 5] and has(begun, "run it with training.resume=true to go on")
    assert restarted["saved"] == [3, 5, 6, 9, 12] and has(restarted, "resumed from") and not has(restarted, "moved")
    assert begun["after"] + restarted["after"] == earlier["after"]
    assert [r["step"] for r in runs.rows(tmp_path / "run/earlier/2")] == list(range(1, 13))
    assert again["saved"] == [3] and len(list((tmp_path / "run/earlier").iterdir())) == 2


def _damage(folder):
    for path in folder.glob("step-*/common.pt"):
        path.write_bytes(b"?")


def _leave_a_lock(folder):
    from ebt_megatron.training.lock import RunLock

    RunLock(folder).acquire()


def test_what_does_not_fit_is_refused_and_left_as_it_is(data, tmp_path):
    two = "data.train=[{0}/train,{0}/validation]".format(data)  # noqa: UP032
    turned = "data.train=[{0}/validation,{0}/train]".format(data)  # noqa: UP032
    short = ("training.steps=3", "training.async_save=false")
    _, order, other, _, damaged, held = life(
        data,
        tmp_path,
        ("run", (*short, two), ""),
        ("run", (*short, turned), ""),
        ("run", short, ""),
        ("damaged", short, ""),
        (_damage, "damaged/checkpoints"),
        ("damaged", short, ""),
        (_leave_a_lock, "held"),
        ("held", short, ""),
    )
    assert "the folders of data.train in another order" in order["error"] and order["saved"] == [3]
    assert "made with" in other["error"] or "samples_per_epoch" in other["error"]
    assert "every checkpoint in" in damaged["error"] and "training.resume=false" in damaged["error"]
    assert damaged["saved"] == [3]
    assert "is in use by process" in held["error"] and not (tmp_path / "held/recipe.yaml").exists()


def test_validation(data, tmp_path):
    never = ("training.steps=3", "data.validation=[]")
    every = (
        "training.async_save=false",
        "training.validation_interval=4",
        "training.validation_samples=5",
        "training.save_interval=4",
    )
    none, _, resumed, plain, empty = life(
        data,
        tmp_path,
        ("none", never, ""),
        ("killed", every, "killed_between_saving_and_recording"),
        ("killed", every, ""),
        ("plain", every, ""),
        ("empty", (*every, "training.validation_samples=0"), ""),
    )
    assert len(none["after"]) == 3 and not any("validation_loss" in r for r in runs.rows(tmp_path / "none"))
    # Saved first, so nothing is lost; and the row of the step, with its validation, is made up for.
    assert len(resumed["after"]) == 4 and resumed["digest"] == plain["digest"]
    wanted = [(r["step"], r["loss"], r.get("validation_loss")) for r in runs.rows(tmp_path / "plain")]
    assert [(r["step"], r["loss"], r.get("validation_loss")) for r in runs.rows(tmp_path / "killed")] == wanted
    assert [s for s, _, loss in wanted if loss] == [4, 8, 12]
    assert "training.validation_samples=0: must be at least 1" in empty["error"]


def test_thinking_that_does_nothing_is_said(data, tmp_path):
    context = "thinking.initial=context", "thinking.step_rule=mirror_descent", "thinking.learn_step_size=false"
    short = *context, "model.initialization=paper", "training.steps=2", "training.validation_interval=2"
    idle, busy = life(
        data,
        tmp_path,
        ("idle", (*short, "thinking.step_size=1e-6"), ""),
        ("busy", (*short, "thinking.step_size=30"), ""),
    )
    words = "leaves the context's prediction as it is, with a step size of 1e-06"
    assert sum(words in text for text in idle["said"]) == 1
    assert not any("leaves the context's prediction" in text for text in busy["said"])


def _best(data, root):
    """Validated at every step, with losses that fall and rise; then gone on with from step 6."""
    from ebt_megatron.session import load_run
    from ebt_megatron.training import hooks
    from ebt_megatron.training.run import Run

    found, folder, saves = {}, root / "run", []
    write = Run.write_checkpoint
    Run.write_checkpoint = lambda run, row, among=None: saves.append((run.step, among)) or write(run, row, among)
    real, losses = hooks.validate, [5.0, 3.0, 4.0, float("nan"), 2.0, 6.0, 1.0, 3.5]

    def validate(objective, batches, steps, measure):
        made = real(objective, batches, steps, measure)
        made.losses[:] = losses.pop(0)
        return made

    hooks.validate = validate
    often = ("training.micro_batch_size=4", "training.validation_interval=1", "training.keep_best=2")
    for steps in (6, 8):
        runs.train(data, folder, (*often, f"training.steps={steps}", "training.keep_checkpoints=1"))
        found[steps] = sorted(p.name for p in folder.glob("best/step-*"))
    found["saves"] = [step for step, among in saves if among is not None]
    found["losses"] = json.loads((folder / "best/losses.json").read_text())
    for name in ("", "best", "best/step-00000005", "checkpoints/step-00000008"):
        found[name] = load_run(folder / name, splits=(), alone=True).step
    (folder / "best/step-00000007/common.pt").write_bytes(b"")
    with pytest.raises(RecipeError, match=r"damaged checkpoint: .*best/step-00000007"):
        load_run(folder / "best", splits=(), alone=True)
    return found


def test_the_best_checkpoints_are_kept_beside_the_newest(data, tmp_path):
    (found,) = run_ranks(_best, 1, data, tmp_path, timeout=200)
    assert found[6] == ["step-00000002", "step-00000005"], "the lowest losses, of finite ones"
    assert found[8] == ["step-00000005", "step-00000007"]
    assert found["saves"] == [1, 2, 3, 5, 7], "no others are written"
    assert found["losses"] == {"step-00000007": 1.0, "step-00000005": 2.0}
    assert saved(tmp_path / "run") == [8]
    assert [found[n] for n in ("", "best", "best/step-00000005", "checkpoints/step-00000008")] == [8, 7, 5, 8]
    with pytest.raises(RecipeError, match=r"training.keep_best=2 goes by validation losses"):
        runs.recipe_of(data, tmp_path, "training.keep_best=2")


@pytest.mark.parametrize(("steps", "warned"), [(20, False), (21, True)])
def test_more_than_four_epochs_are_warned_of(steps, warned):
    from ebt_megatron.training.run import Run

    said: list[str] = []
    run = SimpleNamespace(
        recipe=small_recipe(f"training.steps={steps}", "training.validation_samples=9"),
        warn=said.append,
        say=said.append,
        validation_data=SimpleNamespace(validation_samples=5),
        train_data=SimpleNamespace(most_repeated=lambda samples: (samples / 10, "data/train")),
    )
    Run._look_at_amounts(run)
    *warnings, validation = said
    assert "validation is on all 5 samples" in validation and len(warnings) == warned
    assert all("training.steps=21 goes 4.2 times through data/train" in line for line in warnings)


def test_epochs_are_shown(data, tmp_path):
    (answer,) = life(data, tmp_path, ("run", ("training.steps=3", "training.validation_samples=4000"), ""))
    rows = runs.rows(tmp_path / "run")
    samples = json.loads((data / "train/manifest.json").read_text())["samples"]
    assert [r["epoch"] for r in rows] == pytest.approx([4 * s / samples for s in (1, 2, 3)])
    assert has(answer, "step  3/3 ", "epoch 0.0") or has(answer, "step 3/3", "epoch 0.0")
    assert [len(r["step_losses"]) for r in rows] == [len(r["step_energies"]) for r in rows] == [2, 2, 2]
    assert all(r["step_losses"][-1] == r["final_step_loss"] for r in rows)
