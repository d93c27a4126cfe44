"""A real pipeline run executes the simulated order, respects cause and effect, and holds what is in flight."""

import gc

from tests import builders
from tests.distributed_utils import run_ranks


def pipelines_of(stages, *overrides):
    """A step of four micro-batches on this stage: its pipeline, and how many `Thinker`s there were after each pass."""
    from unittest import mock

    import torch

    from ebt_megatron.data.loader import MicroBatch
    from ebt_megatron.tasks.text import Text
    from ebt_megatron.thinking.dual_stream import Thinker
    from ebt_megatron.thinking.pipeline import Pipeline
    from ebt_megatron.training.trainer import Trainer

    sizes = "model.num_layers=4", "thinking.max_steps=2", "training.global_batch_size=8"
    recipe = builders.small_recipe(*sizes, f"parallel.pipeline={stages}", *overrides)
    trainer = Trainer(recipe, Text(recipe, builders.VOCAB), builders.state(recipe))
    tokens = torch.randint(builders.VOCAB, (8, 11), generator=torch.Generator().manual_seed(0))
    batches = [MicroBatch(sample_ids=torch.arange(i, i + 2), samples=tokens[i : i + 2]) for i in range(0, 8, 2)]
    seen, held, run_pass = [], [], Pipeline._run

    def watched(pipeline, work, batch):
        run_pass(pipeline, work, batch)
        seen.append(pipeline)
        gc.collect()
        held.append(sum(isinstance(found, Thinker) for found in gc.get_objects()))

    with mock.patch.object(Pipeline, "_run", watched):
        trainer.train_step(batches, 0)
    pipeline = seen[0]
    left = sum(isinstance(found, Thinker) for found in gc.get_objects())
    return pipeline, held, left


def events_of(stages):
    """This stage's micro-batches in order, and events (micro-batch, index, stage, begin, end), of one step."""
    pipeline, *_ = pipelines_of(stages)
    order = pipeline.schedule.order[pipeline.stage]
    return [w.micro_batch for w in order], [(w.micro_batch, w.index, w.stage, b, e) for w, b, e in pipeline.events]


def held_by(stages):
    """(`Thinker`s after each pass, those left after the step, the most contexts the schedule says are live here)."""
    pipeline, held, left = pipelines_of(stages, "parallel.micro_batches_in_flight=2")
    return held, left, pipeline.schedule.live[pipeline.stage]


def test_a_micro_batch_is_held_while_it_is_in_flight():
    for held, left, live in run_ranks(held_by, 2, 2):
        assert max(held) == live == 2  # of four
        assert left == 0


def test_events_follow_the_simulation():
    results = run_ranks(events_of, 2, 2)
    every = {}
    for order, events in results:
        assert [m for m, *_ in events] == order
        every |= {(m, index, stage): (begin, end) for m, index, stage, begin, end in events}
    forward = {0, 1, 3, 5, 7}  # context, then propose and learn of two steps
    for (m, index, stage), (_, end) in every.items():
        downstream = stage == 1
        source = (m, index, 0 if index in forward else 1)
        if (index in forward) == downstream:
            begin_of_source = every[source][0]
            assert begin_of_source <= end, "a task cannot end before what it waits for has begun"
