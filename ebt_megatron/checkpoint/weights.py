"""Weights alone, as plain safetensors: whole tensors under layout-free names, and what they belong to.

A file holds each weight of the model once, uncut, under its name in a single-process model
(`layers.3.qkv.weight`), in the order of rows that the layers use (`docs/reproducing.md`). Its
metadata says which model it is, so that weights of the right shapes and the wrong meaning are refused:

    recipe       the resolved recipe, YAML
    fingerprint  JSON of what a run must have in common to use the weights (`checkpoints.fingerprint`, and
                 vocab_size where it is known)
    step         optimizer steps the weights have had, where it is known
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from ebt_megatron.checkpoint.average import PREFIX
from ebt_megatron.config import RecipeError
from ebt_megatron.core.files import replacing
from ebt_megatron.parallel.parameters import main_parameter

_MODEL, _MAIN = "model.", "optimizer.state.fp32_param."


def checkpoint_weights(folder: Path) -> dict[str, Tensor]:
    """The whole weights in a checkpoint of any layout; Megatron's process groups must exist.

    Where the run averaged its weights, these are the averages. Where it trained in bf16, they are the optimizer's fp32
    weights, of which the model's are roundings.
    """
    metadata = FileSystemReader(folder).read_metadata().state_dict_metadata
    stored = {key: kept for key, kept in metadata.items() if isinstance(kept, TensorStorageMetadata)}
    wanted = {}
    for key in stored:
        if key.startswith(_MODEL):
            name = key.removeprefix(_MODEL)
            source = next(k for k in (PREFIX + name, _MAIN + key, key) if k in stored)
            empty = torch.empty(stored[source].size, dtype=stored[source].properties.dtype, device="meta")
            whole = ShardedTensor.from_rank_offsets(source, empty, replica_id=dist.get_rank())  # every rank reads all
            wanted[name] = whole.without_data()
    loaded = dist_checkpointing.load(dict(wanted), str(folder))  # with the common state
    return {name: loaded[name] for name in wanted}


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_weights(
    path: Path, weights: dict[str, Tensor], recipe: str, fingerprint: dict[str, Any], step: int | None = None
) -> None:
    """Write a file of weights.

    Args:
        path: where to.
        weights: whole tensors by name.
        recipe: YAML.
        fingerprint, step: see the module's text.

    Raises:
        RecipeError: if it cannot be written; a file that was there stays.
    """
    metadata = {"format": "pt", "recipe": recipe, "fingerprint": json.dumps(fingerprint)}
    if step is not None:
        metadata["step"] = str(step)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with replacing(path) as partial:
            save_file({name: w.detach().cpu().contiguous() for name, w in weights.items()}, partial, metadata)
            partial.chmod(0o666 & ~_umask())  # the library lets none but the owner read it
    except (OSError, SafetensorError) as error:
        raise RecipeError(f"{path} cannot be written ({error})") from None


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A file's weights and metadata.

    Raises:
        RecipeError: if it is not a safetensors file.
    """
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise RecipeError(f"{path}: not a readable safetensors file ({error})") from None


def check_fingerprint(path: Path, metadata: dict[str, str], fingerprint: dict[str, Any]) -> None:
    """Compare what a file was written for with a run; a file without a fingerprint passes.

    Raises:
        RecipeError: naming the first key that differs.
    """
    for key, saved in json.loads(metadata.get("fingerprint", "{}")).items():
        if key in fingerprint and fingerprint[key] != saved:
            raise RecipeError(
                f"{path} was written for {key}={saved}, this run has {key}={fingerprint[key]}: use the "
                "recipe in the file's metadata, and data prepared as its were"
            )


@torch.no_grad()
def set_weights(path: Path, model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Copy whole weights into a single-process model, and into the fp32 weights of its optimizer.

    Raises:
        RecipeError: naming the first weight that is missing, unknown or of another shape; nothing is changed then.
    """
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if name not in weights:
            raise RecipeError(f"{path}: {name} is missing, which the recipe's model has")
        if weights[name].shape != parameter.shape:
            raise RecipeError(
                f"{path}: {name} is {list(weights[name].shape)}, the recipe's model has {list(parameter.shape)}"
            )
    for name in weights:
        if name not in parameters:
            raise RecipeError(f"{path}: {name} is not in the recipe's model")
    for name, parameter in parameters.items():
        parameter.copy_(weights[name])
        main_parameter(parameter).copy_(weights[name])
