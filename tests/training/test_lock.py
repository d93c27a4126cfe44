"""One run at a time in a folder: who holds it is said, and the dead hold nothing."""

import json
import multiprocessing
import os
import time

import pytest

from ebt_megatron.config import RecipeError
from ebt_megatron.training import lock
from ebt_megatron.training.lock import RunLock


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(lock, "WATCH_SECONDS", 0.4)


def take(folder, change=None):
    """A lock that is held, what it says changed as if another held it."""
    holder = RunLock(folder)
    holder.acquire()
    if change:
        holder._stop.set()
        holder.path.write_text(json.dumps(json.loads(holder.path.read_text()) | change))
    return holder


def test_a_held_folder_is_refused_with_one_line_that_names_the_holder(tmp_path):
    holder = take(tmp_path / "run")
    refused = RunLock(tmp_path / "run")
    with pytest.raises(RecipeError) as error:
        refused.acquire()
    refused.release()
    assert holder.path.exists()
    assert f"run is in use by process {os.getpid()} on " in str(error.value) and " since 20" in str(error.value)
    holder.release()
    take(tmp_path / "run").release()
    assert not list((tmp_path / "run").iterdir())


def _die(folder):
    RunLock(folder).acquire()
    os._exit(9)


def test_the_lock_of_a_dead_process_is_taken_over_at_once(tmp_path):
    process = multiprocessing.get_context("fork").Process(target=_die, args=(tmp_path,))
    process.start()
    process.join()
    assert (tmp_path / "run.lock").exists()
    begin = time.monotonic()
    take(tmp_path).release()
    assert time.monotonic() - begin < lock.BEAT_SECONDS


def test_a_process_number_that_was_given_again_is_another_process(tmp_path):
    take(tmp_path, {"started": 1.0})
    take(tmp_path).release()


@pytest.mark.parametrize("content", ["", "half a li", '{"host": "n7"}'])
def test_what_a_killed_write_left_is_taken_over(tmp_path, content, quick):
    (tmp_path / "run.lock").write_text(content)
    take(tmp_path).release()


def test_another_machines_lock_holds_as_long_as_it_is_touched(tmp_path, quick):
    holder = take(tmp_path, {"machine": "another boot", "host": "node7", "pid": 1})
    holder._stop.clear()
    import threading

    beat = threading.Thread(target=holder._beat, daemon=True)
    beat.start()
    with pytest.raises(RecipeError, match="in use by process 1 on node7"):
        RunLock(tmp_path).acquire()
    holder._stop.set()
    beat.join()
    take(tmp_path).release()


def test_a_lock_that_changed_hands_is_not_given_back_by_who_had_it(tmp_path):
    first = take(tmp_path, {"pid": 1})
    first.release()
    assert (tmp_path / "run.lock").exists()


def _hold(folder, results):
    try:
        RunLock(folder).acquire()
        results.put("held")
        time.sleep(1)
    except RecipeError:
        results.put("refused")
    results.close()
    results.join_thread()
    os._exit(0)


def test_of_several_that_come_at_once_one_gets_it(tmp_path):
    take(tmp_path, {"started": 1.0})  # and the one before is dead
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=_hold, args=(tmp_path, results)) for _ in range(6)]
    for process in processes:
        process.start()
    assert sorted(results.get(timeout=20) for _ in processes) == ["held"] + 5 * ["refused"]
    for process in processes:
        process.join()
