"""A linear probe: how well one linear layer tells the class of a picture from what a frozen network makes of it.

The rule is the same for an EBT and a DiT: a picture with noise of a level, told that level where the model is told one
and neither class nor caption, goes through the network once; its features are the mean over patches of a layer's
output. Layer and level are chosen on a fifth of the training pictures.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from ebt_megatron.core.errors import DataError
from ebt_megatron.data.loader import MicroBatch
from ebt_megatron.session import TrainedRun
from ebt_megatron.tasks import task_as
from ebt_megatron.tasks.build import build_model
from ebt_megatron.tasks.images import Images

_BATCH = 256  # pictures that go through a network at once


@torch.no_grad()
def features(task: Images, model: Any, batch: MicroBatch, level: int) -> Tensor:
    """The mean over patches of every layer's output, [layers, B, D].

    Args:
        task: the run's.
        model: of an EBT (its first step) or a DiT, on one process.
        batch: pictures.
        level: of the noise in them.
    """
    device = next(model.parameters()).device
    sample = task.sample(batch, device, level)
    observed = task.unconditional(sample.observed)
    ids = sample.sample_ids
    noised = task.schedule.noised(batch.samples.to(device), task.noise(ids), torch.full_like(ids, level))
    if task.recipe.model.architecture == "ebt":
        h = model.modality(noised)
        _, modulations = model.context(model.modality.context(observed), task.length, None, 0)
    else:
        h, modulations = model.embedding(noised), model.modulations(model.condition(observed))
    out = []
    for layer, modulation in zip(model.layers, modulations, strict=False):
        h = layer(h, modulation)
        out.append(h.mean(0))
    return torch.stack(out)


def accuracy(train: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray]) -> float:
    """Return the accuracy of logistic regression on standardised numbers [N, D] with classes [N]."""
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    return float(classifier.fit(*train).score(*test))


def probe(run: TrainedRun, levels: Sequence[int], training: int = 4000, test: int = 2000) -> dict[str, Any]:
    """Test accuracies of linear classifiers on the run's features, and on what they stand beside.

    Args:
        run: opened with training and validation data that have labels, on one process.
        levels: of noise to choose from.
        training, test: how many pictures of each, at most.

    Returns:
        "features" (with the "layer", from 1, and "level" chosen), "last layer" (at the first of the levels),
        "untrained" (chosen likewise, of the network as it begins with its layers' gates open) and "numbers" (those that
        the pictures are made of, which a linear encoder has from pixels).

    Raises:
        DataError: if there are no labels.
    """
    if not run.data["validation"].sources[0].manifest.classes:
        raise DataError(f"{run.recipe.data.validation[0]} has no labels, which a probe needs: prepare it with them")
    data = [(run.data["train"], training), (run.data["validation"], test)]
    pictures = [loader.read(list(range(min(count, len(loader.blend))))) for loader, count in data]
    labels, task = [_labels(batch) for batch in pictures], task_as(run.task, Images)
    fitted = len(labels[0]) * 4 // 5

    def chosen(model: Any) -> tuple[float, int, int, float]:
        """Accuracy, layer and level, and the accuracy of the last layer at the first level."""
        made = {level: [_features(task, model, batch, level) for batch in pictures] for level in levels}

        def on(layer: int, level: int, held_out: bool) -> float:
            train, other = (f[layer] for f in made[level])
            if held_out:
                return accuracy((train[:fitted], labels[0][:fitted]), (train[fitted:], labels[0][fitted:]))
            return accuracy((train, labels[0]), (other, labels[1]))

        places = itertools.product(range(len(made[levels[0]][0])), levels)
        layer, level = max(places, key=lambda place: on(place[0], place[1], True))
        return on(layer, level, False), layer + 1, level, on(-1, levels[0], False)

    best, layer, level, last = chosen(run.model)
    flat = [batch.samples.flatten(1).numpy() for batch in pictures]  # type: ignore[union-attr]
    return {
        "features": best,
        "layer": layer,
        "level": level,
        "last layer": last,
        "untrained": chosen(_untrained(run))[0],
        "numbers": accuracy((flat[0], labels[0]), (flat[1], labels[1])),
        "training pictures": len(labels[0]),
        "test pictures": len(labels[1]),
    }


def _labels(batch: MicroBatch) -> np.ndarray:
    return batch.beside["labels"].numpy()


def _features(task: Images, model: Any, batch: MicroBatch, level: int) -> np.ndarray:
    parts = [batch.part(i, i + _BATCH) for i in range(0, len(batch.sample_ids), _BATCH)]
    return torch.cat([features(task, model, part, level) for part in parts], 1).float().cpu().numpy()


def _untrained(run: TrainedRun) -> Any:
    """The run's network before training; its gates are opened, as layers that are shut would do nothing."""
    model: Any = build_model(run.recipe, run.task).to(run.state.device)
    with torch.no_grad():
        for layer in model.layers:
            for gate in layer.modulation.bias.chunk(layer.modulation.parts)[2::3]:
                gate.fill_(1.0)
    return model
