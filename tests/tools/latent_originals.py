"""Models of video and pictures as the public code has them, written from its description, beside `originals`."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from tests.tools.originals import HEADS, LAYERS, STEPS, WIDTH, Block, Norm, Trunk, adaptive, linear, randomize

SIDE, LATENTS = 2, 4  # of a frame of 16 x 16 pixels: 2 x 2 places of four numbers each
PATCH, GRID = 2, 3  # pictures of 6 x 6 pixels


def patches(pictures):
    """[B, 3, 6, 6] -> [B, GRID^2, 12], by place in the patch and then channel."""
    grid = pictures.unflatten(3, (GRID, PATCH)).unflatten(2, (GRID, PATCH))  # B, channel, row, y, column, x
    return grid.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def pictures_of(patches):
    """The inverse of `patches`."""
    grid = patches.unflatten(1, (GRID, GRID)).unflatten(3, (PATCH, PATCH, 3))  # B, row, column, y, x, channel
    return grid.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def descend(energies_of, y, alpha, steps, loss):
    """Yield energies before each step and losses after it, detached between the steps."""
    for step in range(steps):
        y = y.detach().requires_grad_()
        energies = energies_of(y, step)
        (gradient,) = torch.autograd.grad(energies.sum(), y, create_graph=True)
        y = y - alpha.clamp(min=1e-4) * gradient
        yield y, energies, loss(y)


class VideoEbt(nn.Module):
    """One token a frame [B, S, 16], the numbers of a frame by channel and then place."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(1)
        self.model = nn.Module()
        self.model.alpha = nn.Parameter(torch.tensor(4.0))
        self.model.langevin_dynamics_noise_std = nn.Parameter(torch.tensor(0.0), requires_grad=False)
        self.model.image_encoder = nn.Linear(3, 3)  # stands for a VAE
        self.model.encoder_down_projection = nn.Linear(LATENTS * SIDE**2, WIDTH)
        self.model.transformer = Trunk(kind, 1e-5)
        randomize(self)

    def think(self, frames, y, noise=(0.0,) * STEPS):
        """With noise [B, S, D] on the embedded frames of each step."""
        down = self.model.encoder_down_projection
        observed, targets = frames[:, :-1], frames[:, 1:]
        energies = lambda y, step: self.model.transformer(down(observed), down(y) + noise[step], step)  # noqa: E731
        loss = lambda y: F.smooth_l1_loss(y, targets, reduction="none").mean(-1)  # noqa: E731
        return descend(energies, y, self.model.alpha, STEPS, loss)


class VideoBaseline(nn.Module):
    """Transformer++ of frames; its map back has the same weight as the map there if `tied`, and neither a bias."""

    def __init__(self, tied):
        super().__init__()
        torch.manual_seed(1)
        numbers = LATENTS * SIDE**2
        self.model = nn.Module()
        self.model.encoder_down_projection = nn.Linear(numbers, WIDTH, bias=not tied)
        self.model.encoder_up_projection = nn.Linear(WIDTH, numbers, bias=not tied)
        self.model.output = linear(WIDTH, WIDTH)
        trunk = self.model.transformer = nn.Module()
        trunk.layers, trunk.norm = nn.ModuleList(Block(1e-5) for _ in range(LAYERS)), Norm(1e-5)
        randomize(self)
        if tied:
            self.model.encoder_up_projection.weight.data = self.model.encoder_down_projection.weight.data.t().clone()

    def forward(self, observed):
        model, length = self.model, observed.shape[1]
        x, mask = model.encoder_down_projection(observed), torch.ones(length, length).tril().bool()
        for layer in model.transformer.layers:
            x = layer(x, torch.arange(length).double(), mask)
        return model.encoder_up_projection(model.output(model.transformer.norm(x)))


class PictureAttention(nn.Module):
    """All to all; the rows of qkv are all queries, all keys, all values."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).unbind(2)
        p = (torch.einsum("bqnh,bknh->bnqk", q, k) / math.sqrt(WIDTH // HEADS)).softmax(-1)
        return self.proj(torch.einsum("bnqk,bknh->bqnh", p, v).flatten(2))


def normalized(x):
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()


class PictureBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn, self.mlp, self.adaLN_modulation = PictureAttention(), nn.Module(), adaptive(6)
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(WIDTH, 48), nn.Linear(48, WIDTH)

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c)[:, None].chunk(6, -1)
        x = x + gate1 * self.attn(normalized(x) * (1 + scale1) + shift1)
        hidden = F.gelu(self.mlp.fc1(normalized(x) * (1 + scale2) + shift2), approximate="tanh")
        return x + gate2 * self.mlp.fc2(hidden)


def fixed_positions():
    """[1, GRID^2, WIDTH]: of each axis, columns first, sines and then cosines of a quarter of the width each."""
    rows = []
    for place in range(GRID**2):
        row = []
        for at in (place % GRID, place // GRID):
            angles = [at / 10000 ** (k / (WIDTH // 4)) for k in range(WIDTH // 4)]
            row += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)[None]


class PictureTrunk(nn.Module):
    """DiT's layers over pictures [B, 3, 6, 6], and an output of `outputs` numbers for each patch."""

    def __init__(self, outputs, bias):
        super().__init__()
        self.x_embedder, self.final_layer = nn.Module(), nn.Module()
        self.x_embedder.proj = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.pos_embed = nn.Parameter(fixed_positions(), requires_grad=False)
        self.blocks = nn.ModuleList(PictureBlock() for _ in range(LAYERS))
        self.final_layer.linear = nn.Linear(WIDTH, outputs, bias=bias)
        self.final_layer.adaLN_modulation = adaptive(2)

    def forward(self, pictures, c):
        x = self.x_embedder.proj(pictures).flatten(2).mT + self.pos_embed
        for block in self.blocks:
            x = block(x, c)
        shift, scale = self.final_layer.adaLN_modulation(c)[:, None].chunk(2, -1)
        return self.final_layer.linear(normalized(x) * (1 + scale) + shift)


def keep_positions(model):
    randomize(model)
    for module in model.modules():
        if isinstance(module, PictureTrunk):
            module.pos_embed.data = fixed_positions()


class Denoiser(nn.Module):
    """The EBT: the energy of a picture is the mean over its patches, its condition a learned vector or a caption's."""

    def __init__(self, captions=False):
        super().__init__()
        torch.manual_seed(1)
        self.model = nn.Module()
        self.model.alpha = nn.Parameter(torch.tensor(4.0))
        self.model.langevin_dynamics_noise_std = nn.Parameter(torch.tensor(0.0), requires_grad=False)
        self.model.transformer = PictureTrunk(1, bias=False)
        if captions:
            self.model.text_encoder = nn.Linear(3, 3)  # stands for a CLIP
            self.model.text_embeddings_projector = nn.Linear(6, WIDTH)
        else:
            self.model.learned_adaln_condition = nn.Embedding(1, WIDTH)
        keep_positions(self)

    def think(self, noised, clean, captions=None):
        model = self.model
        c = model.learned_adaln_condition.weight if captions is None else model.text_embeddings_projector(captions)
        energies = lambda y, step: self.model.transformer(y, c.expand(len(y), -1))[..., 0].mean(1)  # noqa: E731
        loss = lambda y: F.smooth_l1_loss(patches(y), patches(clean), reduction="none").mean(-1)  # noqa: E731
        return descend(energies, noised, self.model.alpha, 2, loss)


class Diffuser(nn.Module):
    """The DiT: noise, and variances besides if `variances`, channel by channel of each pixel of a patch."""

    def __init__(self, variances, captions=False):
        super().__init__()
        torch.manual_seed(1)
        self.model, self.parts = nn.Module(), 1 + variances
        dit = self.model.diffusion_transformer = PictureTrunk(self.parts * 3 * PATCH**2, bias=True)
        dit.t_embedder = nn.Module()
        dit.t_embedder.mlp = nn.Sequential(nn.Linear(256, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        if captions:
            self.model.text_embeddings_projector = nn.Linear(6, WIDTH)
        keep_positions(self)

    def forward(self, pictures, level, captions=None):
        """The noise of each patch, by place and then channel, [B, GRID^2, 12]; or [2, ...], noise and variances."""
        dit = self.model.diffusion_transformer
        angles = level[:, None] * torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float64) / 128)
        c = dit.t_embedder.mlp(torch.cat([angles.cos(), angles.sin()], -1).to(pictures))
        c = c if captions is None else c + self.model.text_embeddings_projector(captions)
        out = dit(pictures, c).unflatten(-1, (PATCH**2, self.parts, 3)).movedim(-2, 0).flatten(-2)
        return out if self.parts == 2 else out[0]


def _cdf(x):
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


class Diffusion:
    """DDPM's noise, and what a DiT learns by: the mean squared error of the noise, and of variances the bound in bits.

    Arrays are of levels; pictures [B, GRID^2, 12].
    """

    def __init__(self, steps):
        self.beta = torch.linspace(0.1 / steps, 20 / steps, steps, dtype=torch.float64)
        self.kept = (1 - self.beta).cumprod(0)

    def noised(self, clean, noise, level):
        kept = self.kept[level][:, None, None]
        return kept.sqrt() * clean + (1 - kept).sqrt() * noise

    def loss(self, clean, noise, level, predicted, v=None):
        """The mean over pictures and numbers."""
        error = (predicted - noise).square()
        return (error if v is None else error + self._bits(clean, noise, level, predicted.detach(), v)).mean()

    def _bits(self, clean, noise, level, predicted, v):
        before = torch.cat([torch.ones(1, dtype=torch.float64), self.kept[:-1]])
        least = self.beta * (1 - before) / (1 - self.kept)
        least = torch.cat([least[1:2], least[1:]]).log()  # level 0 takes that of level 1
        of_clean = self.beta * before.sqrt() / (1 - self.kept)
        of_noised = (1 - before) * (1 - self.beta).sqrt() / (1 - self.kept)
        low, high, c, n, kept = (
            x[level][:, None, None] for x in (least, self.beta.log(), of_clean, of_noised, self.kept)
        )
        noised = self.noised(clean, noise, level)
        seen = (noised - (1 - kept).sqrt() * predicted) / kept.sqrt()
        true, mean, share = c * clean + n * noised, c * seen + n * noised, (v + 1) / 2
        log_variance = share * high + (1 - share) * low
        kl = (log_variance - low - 1 + (low - log_variance).exp() + (true - mean) ** 2 / log_variance.exp()) / 2
        above, below = (_cdf((clean - mean + half) / (log_variance / 2).exp()) for half in (1 / 255, -1 / 255))
        bins = torch.where(clean > 0.999, 1 - below, torch.where(clean < -0.999, above, above - below))
        return torch.where((level == 0)[:, None, None], -bins.clamp(min=1e-12).log(), kl) / math.log(2)
