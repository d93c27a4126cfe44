"""A tiny Megatron model with every kind of parameter a real one has, and a step of training on it."""

from __future__ import annotations

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer import MegatronModule

from ebt_megatron.config import Recipe, load_recipe
from ebt_megatron.model.sharding import StageModule
from ebt_megatron.parallel import setup
from ebt_megatron.parallel.parameters import mark_tensor_parallel
from ebt_megatron.training import optimizer as optim

WIDTH, HIDDEN, VOCAB, BATCH = 8, 12, 16, 8


def toy_recipe(*overrides: str) -> Recipe:
    return load_recipe(
        None,
        [
            "model.num_layers=2",
            "model.num_attention_heads=2",
            f"model.hidden_size={WIDTH}",
            f"model.ffn_hidden_size={HIDDEN}",
            "optimizer.lr=1e-2",
            "optimizer.warmup_steps=2",
            "training.steps=10",
            "optimizer.weight_decay=0.1",
            "optimizer.clip_grad=0.5",
            *overrides,
        ],
    )


class Block(MegatronModule):
    """A normalised MLP; sequence-parallel between its linear layers if the config says so."""

    def __init__(self, config):
        super().__init__(config)
        options = {"config": config, "init_method": config.init_method, "bias": False}
        self.norm = torch.nn.Parameter(torch.ones(WIDTH, dtype=config.params_dtype))
        self.norm.sequence_parallel = config.sequence_parallel
        self.up = tensor_parallel.ColumnParallelLinear(WIDTH, HIDDEN, gather_output=False, **options)
        self.down = tensor_parallel.RowParallelLinear(
            HIDDEN, WIDTH, input_is_parallel=True, skip_bias_add=False, **options
        )

    def forward(self, h):
        n = torch.nn.functional.rms_norm(h, (WIDTH,)) * self.norm
        return h + self.down(torch.tanh(self.up(n)[0]))[0]


class Toy(StageModule):
    """This stage's share of two blocks, with an embedding and a learned scalar on the first stage."""

    def __init__(self, config, state: setup.ParallelState):
        super().__init__(config)
        if state.is_first_stage:
            self.embedding = tensor_parallel.VocabParallelEmbedding(
                VOCAB,
                WIDTH,
                init_method=config.init_method,
                config=config,
                reduce_scatter_embeddings=config.sequence_parallel,
            )
            self.scale = torch.nn.Parameter(torch.tensor(2.0))
            self.lr_multipliers["scale"] = 10.0
            self.scale.sequence_parallel = config.sequence_parallel  # it reads this rank's positions
        self.layers = torch.nn.ModuleList(Block(config) for _ in range(2 // state.pipeline_size))
        mark_tensor_parallel(self)
        self._initialize(state)

    @torch.no_grad()
    def _initialize(self, state):
        """The same whole tensors on every layout."""
        offset = len(self.layers) * state.pipeline_rank
        for name, parameter in self.named_parameters():
            if not getattr(parameter, "tensor_model_parallel", False):
                continue
            if name.startswith("layers."):
                _, number, rest = name.split(".", 2)
                name = f"layers.{int(number) + offset}.{rest}"
            dim = parameter.partition_dim
            shape = list(parameter.shape)
            shape[dim] *= state.tensor_size
            generator = torch.Generator().manual_seed(sum(map(ord, name)))
            parameter.copy_(
                torch.randn(shape, generator=generator).chunk(state.tensor_size, dim)[state.tensor_rank] / 3
            )

    def forward(self, tokens):
        """tokens [S, B] -> the sum over this rank's positions of a made-up loss."""
        h = self.embedding(tokens)  # [S(/TP), B, D]
        for layer in self.layers:
            h = layer(h)
        return (torch.sin(h.float() * self.scale)).square().sum()


class Run:
    """A model with its optimizer and schedule on this rank's place in the layout."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.state = setup.initialize(recipe.parallel, recipe.training.seed)
        config = setup.transformer_config(recipe)
        self.chunks = optim.wrap([Toy(config, self.state)], recipe)
        self.optimizer = optim.build_optimizer(self.chunks, recipe, self.model.lr_multipliers)
        self.scheduler = optim.build_scheduler(self.optimizer, recipe)
        self.step = 0

    @property
    def model(self) -> Toy:
        return self.chunks[0].module

    def train(self, steps: int, skip_at: int | None = None, nan_at: int | None = None):
        """Returns per step: this layout's global loss and what the optimizer did."""
        history = []
        for _ in range(steps):
            generator = torch.Generator().manual_seed(self.step)
            tokens = torch.randint(VOCAB, (4, BATCH), generator=generator)
            mine = tokens.chunk(self.state.data_size, 1)[self.state.data_rank]
            optim.zero_gradients(self.chunks, self.optimizer)
            total = torch.zeros(())
            for micro_batch in mine.chunk(2, 1):  # several backwards a step
                loss = self.chunks[0](micro_batch) / tokens.numel()
                if self.step == nan_at:
                    loss = loss * float("nan")
                loss.backward()
                total += loss.detach()
            if self.recipe.parallel.sequence_parallel:
                torch.distributed.all_reduce(total, group=self.state.tensor_group)
            torch.distributed.all_reduce(total, group=self.state.data_group)
            update = optim.apply_gradients(self.chunks, self.optimizer, self.scheduler, self.step == skip_at)
            history.append((total.item(), update))
            self.step += 1
        return history
