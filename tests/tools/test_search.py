"""A search finds what fits, the quickest first, and says why the rest does not do."""

from collections import Counter
from dataclasses import replace

import pytest
from rich.progress import Progress
from typer.testing import CliRunner

from ebt_megatron.config import load_recipe
from ebt_megatron.tasks.text import Text
from ebt_megatron.thinking.schedule import simulate
from ebt_megatron.tools import plan, search
from ebt_megatron.tools.candidates import Candidate, Refusals, candidates, fixed_by
from ebt_megatron.tools.hardware import Hardware
from ebt_megatron.tools.ledger import PARTS, Account, Traffic
from ebt_megatron.tools.simulation import Simulated
from ebt_megatron.tools.step_time import step_time, sweeps_of
from tests.distributed_utils import run_ranks
from tests.tools.test_simulation import account

RATES = Hardware(tflops=1, bandwidth=10, network=1, hbm=100, launch=1, latency=0)


def recipe_of(*overrides):
    given = ["model.size=xxs", "training.global_batch_size=32", "training.micro_batch_size=4", *overrides]
    return load_recipe(None, given)


def all_candidates(recipe, gpus=8, node=4, fixed=()):
    refusals = Refusals()
    return list(candidates(recipe, gpus, node, fixed, refusals)), refusals


# --- what is tried --------------------------------------------------------------------------------


def test_every_layout_that_the_sizes_allow_is_tried_and_no_other():
    found, refusals = all_candidates(recipe_of())
    shapes = {c.shape for c in found}
    assert {(t, p) for t, p, _ in shapes} == {(1, 1), (1, 2), (2, 1), (2, 2)}  # of 6 heads and 6 layers
    assert {size for t, p, size in shapes if (t, p) == (1, 1)} == {1, 2, 4}
    assert all(c.data * c.micro_batches * c.shape[2] == 32 for c in found)
    reasons = {reason for _, reason, _ in refusals.rows()}
    assert reasons == {
        "model.num_attention_heads is not divisible by parallel.tensor",
        "model.num_layers is not divisible by parallel.pipeline",
    }


def test_what_the_command_line_says_stays():
    given = ["parallel.tensor=2", "thinking.reuse=true", "parallel.micro_batches_in_flight=null", "data.prefetch=4"]
    fixed = fixed_by(given)
    assert fixed == {"parallel.tensor", "thinking.reuse", "parallel.micro_batches_in_flight"}
    found, _ = all_candidates(recipe_of(*given), fixed=fixed)
    kept = {(c.shape[0], c.recipe.thinking.reuse, c.recipe.parallel.micro_batches_in_flight) for c in found}
    assert kept == {(2, True, None)}
    assert {c.recipe.model.recompute_layers for c in found} == {True, False}


def test_a_baseline_has_no_thinking_to_reuse():
    found, _ = all_candidates(recipe_of("model.architecture=baseline"))
    assert {c.recipe.thinking.reuse for c in found} == {False}


def test_overrides_make_the_candidate_of_the_recipe():
    for candidate in all_candidates(recipe := recipe_of())[0][::9]:
        assert recipe_of(*candidate.overrides(recipe)) == candidate.recipe


# --- how long it takes ----------------------------------------------------------------------------


def made_up(micro_batches, work, held=1e9, messages=0):
    """An account in which each phase does one operation of (FLOPs, bytes) a micro-batch."""
    out = Account(dict.fromkeys(PARTS, 0) | {"logits": int(held)})
    for phase, (flops, moved) in work.items():
        out.work[phase, int(flops), int(moved)] += micro_batches
    if messages:
        out.messages["send", 1] = Traffic(messages, messages * 10**6)
    return out


def test_an_operation_takes_what_holds_it_up_longest():
    found = Account(work=Counter({("learn", 10**12, 1): 2, ("propose", 1, 10**11): 3, ("context", 1, 1): 4}))
    assert RATES.compute_seconds(found) == pytest.approx({"learn": 2, "propose": 3, "context": 4e-6})


def test_collectives_take_a_rings_time_over_their_link():
    found = Account(
        collectives={("allreduce", "data"): Traffic(2, 10**9), ("allgather_base", "tensor"): Traffic(1, 10**9)}
    )
    seconds = replace(RATES, latency=1000).collective_seconds(found, {"data": 4, "tensor": 2})
    assert seconds == pytest.approx({"data": 2 * 3 / 4 + 0.002, "tensor": 0.05 + 0.001})


WORK = {"context": (3e12, 1), "propose": (4e12, 1), "learn": (12e12, 1), "optimizer": (1e12, 1)}


def test_a_step_on_one_stage_is_its_micro_batches_and_what_is_done_once():
    recipe = recipe_of()
    two = made_up(2, WORK)
    two.work["optimizer", 10**12, 1] = 1
    two.collectives["allreduce", "data"] = Traffic(1, 10**9)
    time = step_time(recipe, 8, [two], 2, 5, RATES)
    assert time.seconds == pytest.approx(5 * 19 + 1 + 2 * 7 / 8)
    assert time.bubble == pytest.approx(0) and time.once == pytest.approx(1 + 2 * 7 / 8)


def test_tensor_parallel_ranks_exchange_in_every_micro_batch():
    two = made_up(2, {phase: work for phase, work in WORK.items() if phase != "optimizer"})
    two.collectives["allreduce", "tensor"] = Traffic(4, 2 * 10**10)
    assert step_time(recipe_of("parallel.tensor=2"), 8, [two], 2, 5, RATES).seconds == pytest.approx(5 * (19 + 1))


def test_stages_wait_as_the_schedule_has_it():
    recipe = recipe_of("parallel.pipeline=2")
    ends = [made_up(2, WORK | {"learn": (12e12 * more, 1)}) for more in (2, 1)]
    for account_ in ends:
        del account_.work["optimizer", 10**12, 1]
    time = step_time(recipe, 8, ends, 2, 4, RATES)
    sweeps = sweeps_of(recipe)
    assert [kind for kind, _ in sweeps].count("learn_forward") == 2
    each = {"context_forward": 1, "context_backward": 2, "propose_forward": 1, "propose_backward": 1}
    each |= {"learn_forward": 2, "learn_backward": 4}
    schedule = simulate(2, 4, sweeps, each, {"learn_forward": 2, "learn_backward": 4})
    assert time.seconds == pytest.approx(schedule.makespan) and time.bubble == pytest.approx(schedule.bubble)


def whole_and_continued():
    """Memory of the first stage in a step of 9 micro-batches: simulated, and continued from 2 and 4 of them."""
    pairs = []
    for stage in (0, 1):
        few, more, whole = (
            account("parallel.pipeline=2", f"training.global_batch_size={count}", size=2, rank=stage)
            for count in (2, 4, 9)
        )
        assert whole.flops["learn"] * 2 == more.flops["learn"] * 4.5
        pairs.append((plan.memory_of(whole), search.memory_of_many([few, more], [2, 4], 9)))
    return pairs


def test_memory_of_many_micro_batches_follows_from_few():
    (pairs,) = run_ranks(whole_and_continued, 1)
    for whole, continued in pairs:
        assert continued == pytest.approx(whole, rel=0.03)


# --- what is found --------------------------------------------------------------------------------


class Told:
    """Stands for `Simulator`: a rank holds `held(recipe)` bytes, and works less on more tensor-parallel ranks."""

    held = staticmethod(lambda recipe: 10**9)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def begin(self, recipe, task, size, ranks):
        assert task.recipe is recipe  # a task keeps the recipe that it is of
        Told.begun.append(recipe)
        layout, training = recipe.parallel, recipe.training
        count = training.global_batch_size * layout.tensor * layout.pipeline // (size * training.micro_batch_size)
        work = {p: (f * training.micro_batch_size / layout.tensor / layout.pipeline, 1) for p, (f, _) in WORK.items()}
        done = made_up(count, work, Told.held(recipe), messages=layout.pipeline - 1)
        return [Done(Simulated(done, 0, 0, 0)) for _ in ranks]


class Done:
    def __init__(self, value):
        self.value = value

    def result(self):
        return self.value


@pytest.fixture
def told(monkeypatch):
    monkeypatch.setattr(search, "Simulator", Told)
    monkeypatch.setattr(Told, "begun", [], raising=False)
    return lambda held: monkeypatch.setattr(Told, "held", staticmethod(held))


def searched(memory=80.0, recipe=None, fixed=(), gpus=8):
    recipe = recipe or recipe_of()
    with Progress(disable=True) as progress:
        return search.Searcher(recipe, lambda r: Text(r, 500), gpus, 8, RATES, memory, fixed).run(progress)


def test_the_quickest_that_fit_come_first_one_of_each_shape(told):
    out = searched()
    times = [found.time.seconds for found in out.found]
    assert len(times) >= search.SHOWN and times == sorted(times)
    assert len({found.candidate.shape for found in out.found}) == len(times)


def test_what_the_simulation_finds_too_large_is_not_offered(told):
    told(lambda recipe: 10**9 if recipe.parallel.tensor == 2 else 10**11)
    out = searched()
    assert {found.candidate.shape[0] for found in out.found} == {2}
    assert any("too large (simulated), most of it activations" in reason for reason in out.refusals.counts)


def test_a_search_is_few_short_steps(told):
    searched(recipe=recipe_of("training.global_batch_size=256"), fixed={"thinking.reuse", "model.recompute_layers"})
    steps = [r.training.global_batch_size // r.training.micro_batch_size for r in Told.begun]
    assert len(Told.begun) <= 2 * 2 * 18 and max(steps) <= 2 * 8


COMMAND = ["text/s1_xxs", "--gpus", "8", "--search", "training.global_batch_size=64", "parallel.pipeline=1"]


def test_the_command_shows_five_with_overrides_to_paste(told):
    done = CliRunner().invoke(plan.app, COMMAND)
    assert done.exit_code == 0, done.output
    lines = [line for line in done.output.splitlines() if line[:2] in {f"{i}:" for i in range(1, 6)}]
    assert len(lines) == 5
    for line in lines:
        load_recipe("text/s1_xxs", line.split()[1:])
        assert "training.global_batch_size=64 parallel.pipeline=1" in line
    assert "model.num_attention_heads is not divisible by parallel.tensor" in done.output


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--memory", "0.01"], "nothing fits 0.01 GB on 8 GPUs; the nearest, TP 2"),
        (["--gpus", "7", "parallel.tensor=2"], "no layout of 7 GPUs is possible: number of ranks=7 is not divisible"),
        (["--simulate"], "leave --simulate out"),
    ],
)
def test_what_cannot_be_found_is_said_in_one_line(told, arguments, says):
    refused = CliRunner().invoke(plan.app, [*COMMAND, *arguments])
    assert refused.exit_code == 2 and says in refused.output
    assert len(refused.output.strip().splitlines()) == 1


def test_nothing_fits_says_what_came_closest_and_what_to_change(told):
    told(lambda recipe: (9 - recipe.parallel.tensor) * 10**9)
    error = search.nothing_fits(searched(5.0), 8, 5.0, {"parallel.pipeline"})
    assert "the nearest, TP 2" in str(error) and "needs 7.0 GB, most of it activations" in str(error)
    assert "more --gpus" in str(error) and "parallel.pipeline" in str(error)


@pytest.mark.slow
def test_a_thousand_gpus_are_searched_by_a_command():
    done = CliRunner().invoke(plan.app, ["text/s1_xl", "--gpus", "1024", "--memory", "80", "--search"])
    assert done.exit_code == 0 and "5: " in done.output


def test_a_candidate_says_what_it_is():
    assert Candidate(recipe_of("parallel.tensor=2"), 4, 2).name == "TP 2 x PP 1 x DP 4, micro-batches of 4"
