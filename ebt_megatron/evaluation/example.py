"""One token worked out: how its predicted distribution sharpens while its energy falls."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer


def worked_example(objective: Any, micro_batch: Any, steps: int, tokenizer: Tokenizer, top: int = 6) -> dict[str, Any]:
    """Follow the position that thinking improves most, in one sample.

    Args:
        objective: an EnergyObjective on one process.
        micro_batch: text samples.
        steps: thinking steps.
        tokenizer: to show tokens as text.
        top: entries of the distribution to show.

    Returns:
        The context's end, the true next token, and for 0 .. steps steps the most likely tokens
        with their probabilities, and the energy of that prediction.
    """
    thinker = objective.thinker(micro_batch)
    prediction = thinker.descent.prediction
    snapshots = [prediction.logits.clone()]
    for step in range(steps):
        thinker.propose(step)
        snapshots.append(prediction.logits.clone())
    losses = torch.stack(thinker.descent.losses)  # [steps, S, B]
    length = losses.shape[1]
    gain = (losses[0] - losses[-1]) - losses[-1]  # improved by thinking, and right in the end
    gain[: length // 8] = -torch.inf  # leave some context to show
    position, sample = divmod(int(gain.argmax()), losses.shape[2])
    tokens = micro_batch.tokens[sample]
    states = []
    for i, logits in enumerate(snapshots):
        p = logits[position, sample, : prediction.valid].softmax(-1)
        best = p.topk(top)
        states.append({
            "steps": i,
            "energy": thinker.energies[i][position, sample].item() if i < steps else None,
            "top": [{"token": tokenizer.decode([int(t)]), "probability": float(v)} for v, t in zip(*best, strict=True)],
        })  # fmt: skip
    return {
        "context": tokenizer.decode(tokens[max(0, position - 24) : position + 1].tolist()),
        "target": tokenizer.decode([int(tokens[position + 1])]),
        "states": states,
    }
