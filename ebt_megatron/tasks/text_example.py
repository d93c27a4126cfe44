"""Tokens worked out: how predictions sharpen while their energy falls."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer

from ebt_megatron.model.energy import EnergyTransformer
from ebt_megatron.prediction.logits import TextPrediction
from ebt_megatron.tasks.interface import Sample
from ebt_megatron.thinking.dual_stream import Thinker
from ebt_megatron.thinking.plan import Plan


@torch.no_grad()
def worked_example(
    sample: Sample, thinker: Thinker, steps: int, trained: int, tokenizer: Tokenizer, top: int = 6
) -> dict[str, Any]:
    """Follow the position that thinking improves most, and the mean energy of all, in one micro-batch.

    Every step descends a landscape of its own, and energies of different landscapes do not
    compare; so each step's energy is given before and after it.

    Args:
        sample: text, on one process.
        thinker: of it, ready to think.
        steps: thinking steps to follow, as many as were trained at least.
        trained: steps that were trained.
        tokenizer: to show tokens as text.
        top: entries of the distribution to show.

    Returns:
        The context's end, the true next token; for each step the most likely tokens after it with their
        probabilities, and the prediction's energy before and after (step 0: the start); and the same
        energies as means over all positions.
    """
    prediction, model = thinker.descent.prediction, thinker.model
    assert isinstance(prediction, TextPrediction) and isinstance(model, EnergyTransformer)
    sweeps = Plan.thinking(steps, model.starts_thinking).sweeps(model.context_sees_step)
    if model.starts_thinking:
        first = sweeps.index(("propose_forward", 0))
        thinker.run(sweeps[:first])
        sweeps = sweeps[first:]
    snapshots, before, after = [prediction.logits.clone()], [], []
    for step in range(steps):
        thinker.run(sweep for sweep in sweeps if sweep[1] == step)
        snapshots.append(prediction.logits.clone())
        before.append(thinker.energies[-1])
        key_values = thinker.key_values(constant=True)
        after.append(model.predict(prediction.embed(), key_values, thinker.length, None, step, tangent=False))
    losses = torch.stack(thinker.descent.losses)  # [steps, S, B]
    length = losses.shape[1]
    final = losses[trained - 1]
    gain = (losses[0] - final) - final  # improved by thinking, and right in the end
    gain[: length // 8] = -torch.inf  # leave some context to show
    position, row = divmod(int(gain.argmax()), losses.shape[2])
    tokens = torch.cat([sample.observed[row], sample.targets[row, -1:]])
    states = []
    for i in range(trained + 1):
        p = snapshots[i][position, row, : prediction.valid].softmax(-1)
        named = [
            {"token": tokenizer.decode([int(t)]), "probability": float(v)} for v, t in zip(*p.topk(top), strict=True)
        ]
        pair = [e[i - 1][position, row].item() for e in (before, after)] if i else None
        states.append({"steps": i, "energies": pair, "top": named})
    return {
        "context": tokenizer.decode(tokens[max(0, position - 24) : position + 1].tolist()),
        "target": tokenizer.decode([int(tokens[position + 1])]),
        "states": states,
        "mean_energies": [[b.mean().item(), a.mean().item()] for b, a in zip(before, after, strict=True)],
    }
