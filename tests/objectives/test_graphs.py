"""A recorded micro-batch does for any data what the unrecorded one does, and waits for no result.

Without a GPU a stand-in takes the place of CUDA graphs: it notes every torch operation with the memory it reads and
writes, refuses what a stream that is recorded refuses, and repeats the operations on the same memory.
"""

from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ebt_megatron.data.loader import MicroBatch
from ebt_megatron.objectives.graphs import Graphs
from tests import builders
from tests.cases import slow

aten = torch.ops.aten
WAITS = {  # for the device
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
    aten.unique_dim.default,
    aten._unique2.default,
    aten.bincount.default,
}


def tensors(tree):
    return [t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]


class StandIn(TorchDispatchMode):
    """Notes operations while it is active, and takes back what they did to memory that was there before."""

    def __init__(self):
        super().__init__()
        self.calls, self.made, self.before, self.replays = [], set(), {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        mask = function in (aten.index.Tensor, aten.index_put_.default) and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        )
        if function in WAITS or (mask and not (function == aten.index_put_.default and args[2].numel() == 1)):
            raise RuntimeError(f"operation not permitted when stream is capturing: {function}")
        for storage in (t.untyped_storage() for t in tensors((args, kwargs))):
            if storage.data_ptr() not in self.made | self.before.keys():
                self.before[storage.data_ptr()] = storage, storage.clone()
        out = function(*args, **(kwargs or {}))
        self.made |= {t.untyped_storage().data_ptr() for t in tensors(out)} - self.before.keys()
        self.calls.append((function, *tree_map_only(torch.Tensor, torch.Tensor.detach, (args, kwargs or {}, out))))
        return out

    def __exit__(self, *error):
        super().__exit__(*error)
        for storage, content in self.before.values():
            storage.copy_(content)

    @torch.no_grad()
    def replay(self):
        self.replays += 1
        for function, args, kwargs, out in self.calls:
            for held, made in zip(tensors(out), tensors(function(*args, **kwargs)), strict=True):
                if made.untyped_storage().data_ptr() != held.untyped_storage().data_ptr():
                    held.copy_(made)


def from_host(*_, **__):
    raise RuntimeError("operation not permitted when stream is capturing: a copy of pageable memory")


@contextmanager
def recording(graph, *_, **__):
    with graph, pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "tensor", from_host)
        yield


@pytest.fixture
def graphs(monkeypatch):
    monkeypatch.setattr(torch.cuda, "CUDAGraph", StandIn)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    for name in ("Stream", "graph_pool_handle"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: None)
    return Graphs()


def micro_batch(number, documents):
    generator = torch.Generator().manual_seed(number)
    tokens = torch.randint(builders.VOCAB, (2, 11), generator=generator)
    starts = torch.randint(2, (2, 11), generator=generator).cumsum(1) if documents else None
    return MicroBatch(torch.arange(2) + 2 * number, tokens, starts)


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        slow(("thinking.reuse=true",)),
        ("thinking.reuse=true", "thinking.logits_dtype=bfloat16"),
        slow(("thinking.gradient=full", "model.recompute_layers=true")),
        (
            "thinking.regenerate=6",
            "thinking.langevin_noise=0.5",
            "thinking.step_size_scale=2",
            "data.document_mask=true",
        ),
        slow(("thinking.loss=last", "thinking.gradient=truncated", "model.conditioning=adaln_zero")),
        ("thinking.initial=context", "thinking.step_rule=mirror_descent", "thinking.reuse=true"),
        ("model.architecture=baseline",),
    ],
    ids=" ".join,
)
def test_a_recording_serves_any_data(overrides, graphs):
    recipe = builders.small_recipe(
        "model.kernels=torch",
        "training.global_batch_size=4",
        "thinking.min_steps=2",
        "thinking.max_steps=3",
        *overrides,
    )
    model = builders.build(recipe, torch.float32)
    objectives = [builders.objective(model, recipe) for _ in range(2)]
    objectives[1].graphs = graphs
    for p in model.parameters():
        p.grad = torch.zeros_like(p)  # graphs write where they were recorded
    for iteration in range(4):
        batch = [micro_batch(2 * iteration + i, recipe.data.document_mask) for i in range(2)]
        results = []
        for objective in objectives:
            for p in model.parameters():
                p.grad.zero_()
            totals = objective.train_batch(batch, iteration)
            results.append([totals.loss, totals.losses, totals.energies, *builders.gradients(model).values()])
        assert any(t.abs().max() > 0 for t in results[0][3:])
        for ours, expected in zip(results[1], results[0], strict=True):
            assert torch.equal(ours, expected)
    recorded = [r for r in graphs._recordings.values() if r is not None]
    plans = 1 if recipe.model.architecture == "baseline" else 2  # two steps and three
    assert len(recorded) == len(graphs._recordings) == plans
    assert sum(r.graph.replays for r in recorded) == 8 - plans


def test_other_shapes_are_recorded_apart(graphs):
    def double(x):
        return (2 * x,)

    for size in (3, 5, 3, 5, 3):
        x = torch.rand(size)
        assert torch.equal(graphs.run("double", double, x)[0], 2 * x)
    assert len(graphs._recordings) == 2


def test_results_are_not_overwritten_by_the_next_run(graphs):
    kept = [graphs.run("copy", lambda x: (x + 0,), torch.full((2,), float(i)))[0] for i in range(4)]
    assert [int(t[0]) for t in kept] == [0, 1, 2, 3]


def test_work_that_waits_for_a_result_is_refused(graphs):
    def work(x):
        return (x * x.sum().item(),)

    graphs.run("work", work, torch.ones(2))
    with pytest.raises(RuntimeError, match=r"set training\.cuda_graphs=false"):
        graphs.run("work", work, torch.ones(2))
