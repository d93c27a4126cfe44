"""A real pipeline run executes the simulated order, and its events respect cause and effect."""

from tests import builders
from tests.distributed_utils import run_ranks


def events_of(stages):
    """(kind, step, micro-batch, stage, begin, end) of one optimizer step on this stage."""
    import torch

    from ebt_megatron.data.loader import MicroBatch
    from ebt_megatron.tasks.text import Text
    from ebt_megatron.training.trainer import Trainer

    recipe = builders.small_recipe(
        "model.num_layers=4", f"parallel.pipeline={stages}", "thinking.max_steps=2", "training.global_batch_size=8"
    )
    trainer = Trainer(recipe, Text(recipe, builders.VOCAB), builders.state(recipe))
    tokens = torch.randint(builders.VOCAB, (8, 11), generator=torch.Generator().manual_seed(0))
    batches = [MicroBatch(sample_ids=torch.arange(i, i + 2), samples=tokens[i : i + 2]) for i in range(0, 8, 2)]
    trainer.train_step(batches, 0)
    pipeline = trainer.objective.pipeline
    order = pipeline.schedule.order[pipeline.stage]
    return [w.micro_batch for w in order], [(w.micro_batch, w.index, w.stage, b, e) for w, b, e in pipeline.events]


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
