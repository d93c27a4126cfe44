"""Models as the public code has them, written from its description: Lightning's names of weights, plain formulas.

The sequences' Transformer sees the whole sequence at once: 2S queries (one more with a step token), one mask, autograd
through everything.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

VOCAB, WIDTH, HEADS, LAYERS, STEPS = 61, 32, 4, 2, 3
HYPER = {
    "modality": "NLP",
    "model_name": "ebt",
    "embedding_dim": WIDTH,
    "num_transformer_blocks": LAYERS,
    "multiheaded_attention_heads": HEADS,
    "ffn_dim_multiplier": 1.5,
    "mcmc_num_steps": STEPS,
    "mcmc_step_size": 5.0,
    "mcmc_step_size_learnable": True,
    "normalize_initial_condition": True,
    "context_length": 10,
    "denoising_initial_condition": "random_noise",
    "peak_learning_rate": 0.0012,
    "tokenizer": "EleutherAI/gpt-neox-20b",
}


def linear(inputs, outputs):
    return nn.Linear(inputs, outputs, bias=False)


class Norm(nn.Module):
    def __init__(self, epsilon):
        super().__init__()
        self.weight, self.epsilon = nn.Parameter(torch.ones(WIDTH)), epsilon

    def forward(self, x):
        return self.weight * x / (x.pow(2).mean(-1, keepdim=True) + self.epsilon).sqrt()


def rotated(x, positions):
    """x [B, T, N, H]: the pair (2i, 2i + 1) turned by position / 10000^(2i / H)."""
    size = x.shape[-1]
    angle = positions[:, None] / 10000 ** (torch.arange(0, size, 2, dtype=torch.float64) / size)
    cos, sin = angle.cos().to(x)[:, None], angle.sin().to(x)[:, None]
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.wq, self.wk, self.wv, self.wo = (linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x, positions, mask):
        q, k, v = (w(x).unflatten(-1, (HEADS, -1)) for w in (self.wq, self.wk, self.wv))
        scores = torch.einsum("bqnh,bknh->bnqk", rotated(q, positions), rotated(k, positions))
        p = (scores / math.sqrt(q.shape[-1])).masked_fill(~mask, -math.inf).softmax(-1)
        return self.wo(torch.einsum("bnqk,bknh->bqnh", p, v).flatten(2))


class FeedForward(nn.Module):
    def __init__(self):
        super().__init__()
        hidden = int(WIDTH * HYPER["ffn_dim_multiplier"])
        self.w1, self.w2, self.w3 = linear(WIDTH, hidden), linear(hidden, WIDTH), linear(WIDTH, hidden)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


def adaptive(parts):
    return nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, parts * WIDTH))


class Block(nn.Module):
    def __init__(self, epsilon, adaln=False):
        super().__init__()
        self.attention, self.feed_forward = Attention(), FeedForward()
        self.attention_norm, self.ffn_norm = Norm(epsilon), Norm(epsilon)
        if adaln:
            self.adaLN_modulation = adaptive(6)

    def forward(self, x, positions, mask, time=None):
        """With the time's embedding [B, D]: normalised inputs are shifted and scaled by it, branches gated."""
        shift1, scale1, gate1, shift2, scale2, gate2 = 0, 0, 1, 0, 0, 1
        if time is not None:
            shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(time)[:, None].chunk(6, -1)
        x = x + gate1 * self.attention(self.attention_norm(x) * (1 + scale1) + shift1, positions, mask)
        return x + gate2 * self.feed_forward(self.ffn_norm(x) * (1 + scale2) + shift2)


class FinalLayer(nn.Module):
    """The energy head of adaLN: shifted and scaled by the time as well."""

    def __init__(self):
        super().__init__()
        self.linear, self.adaLN_modulation = linear(WIDTH, 1), adaptive(2)

    def forward(self, x, time):
        shift, scale = self.adaLN_modulation(time)[:, None].chunk(2, -1)
        return self.linear(x * (1 + scale) + shift)


class Trunk(nn.Module):
    def __init__(self, kind, epsilon):
        super().__init__()
        self.kind, adaln = kind, kind.startswith("adaln")
        self.layers = nn.ModuleList(Block(epsilon, adaln) for _ in range(LAYERS))
        self.norm, self.final_layer = Norm(epsilon), FinalLayer() if adaln else linear(WIDTH, 1)
        if kind != "default":
            self.time_embeddings = nn.Embedding(STEPS, WIDTH)

    def forward(self, context, predictions, step):
        """Energies [B, S] of predictions [B, S, D]."""
        time = None
        if self.kind.startswith("adaln"):
            time = self.time_embeddings(torch.full((len(context),), step))
        if self.kind == "time_embed":
            token = self.time_embeddings(torch.full((len(context), 1), step))
            context = torch.cat([token, context], 1)
        originals, count = context.shape[1], predictions.shape[1]
        extra = originals - count  # 1 with a step token
        mask = torch.zeros(originals + count, originals + count, dtype=torch.bool)
        mask[:originals, :originals] = torch.ones(originals, originals).tril().bool()
        mask[originals:, :originals] = torch.ones(count, originals).tril(extra).bool()
        mask[originals:, originals:] = torch.eye(count).bool()
        positions = torch.cat([torch.arange(originals), torch.arange(count) + 1 + extra]).double()
        x = torch.cat([context, predictions], 1)
        for layer in self.layers:
            x = layer(x, positions, mask, time)
        x = self.norm(x)
        return (self.final_layer(x) if time is None else self.final_layer(x, time))[:, originals:, 0]


def randomize(model):
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim():
                p.add_(0.2 * torch.randn(p.shape, generator=generator))
                if "norm" not in name:
                    p.mul_(2 / p.shape[-1] ** 0.5)


def save(original, path, hyper=HYPER, **changes):
    state = original.state_dict() | changes
    torch.save(
        {
            "state_dict": {k: v for k, v in state.items() if v is not None},
            "hyper_parameters": hyper,
            "epoch": 0,
            "global_step": 7,
            "pytorch-lightning_version": "2.4.0",
        },
        path,
    )
    return path


TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}
KINDS = pytest.mark.parametrize("kind", ["default", "time_embed", "adaln"])
PRECISIONS = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)


def close(ours, theirs, dtype):
    return torch.testing.assert_close(ours, theirs, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
