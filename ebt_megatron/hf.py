"""Exported folders in transformers: `import ebt_megatron.hf`, then `AutoModelForCausalLM.from_pretrained(FOLDER)`.

The logits are those that thinking ends with, so that what transformers and its friends do with logits (generation,
perplexity, lm-eval's stock `hf` model) works. Nothing is trained through them: training is `ebt-train`'s.
A Transformer++ needs none of this, its folder is a Llama's.

Keys and values are kept by the model itself, not in a cache of transformers: texts that each go on from one of the last
call's cost what is new in them. So greedy and drawn generation and beam search read a token once. One model is for one
thread at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from ebt_megatron.core.errors import RecipeError
from ebt_megatron.inference.options import ThinkingOptions

if TYPE_CHECKING:  # when a model is loaded, and not before: importing Megatron warns of what is not there
    from ebt_megatron.api.text import TextModel
    from ebt_megatron.inference.cache import Context
    from ebt_megatron.inference.predictor import EnergyPredictor, FeedForwardPredictor


class EBTConfig(PretrainedConfig):
    """What an exported folder's config.json says.

    Args:
        thinking: fields of `ThinkingOptions`, e.g. {"steps": 8}; default: as trained.
        others: see `sharing/export.py`.
    """

    model_type = "ebt"

    def __init__(self, thinking: dict[str, Any] | None = None, **others: Any):
        self.thinking = thinking or {}
        super().__init__(**others)


@dataclass
class _Kept:
    """The context of the last texts that were continued.

    Attributes:
        predictor: whose it is.
        context: a row for each text.
        texts: their tokens that are in it.
        chunk: the most tokens of a row that may be added at once.
    """

    predictor: EnergyPredictor | FeedForwardPredictor
    context: Context
    texts: list[list[int]]
    chunk: int

    def rows_of(self, texts: Sequence[list[int]]) -> list[int] | None:
        """For each text the row that it goes on from, by at most `chunk` tokens; None where one has none."""
        found = []
        for text in texts:
            before = (i for i, old in enumerate(self.texts) if len(old) < len(text) and old == text[: len(old)])
            row = next(before, None)
            if row is None or len(text) - len(self.texts[row]) > self.chunk:
                return None
            found.append(row)
        return found


class EBTForCausalLM(PreTrainedModel, GenerationMixin):
    """An exported EBT of text.

    Args:
        config: the folder's.
        loaded: the model; default: loaded from the folder that the config was read from.
    """

    config_class = EBTConfig
    base_model_prefix = "ebt"
    main_input_name = "input_ids"
    _supports_cache_class = False

    def __init__(self, config: EBTConfig, loaded: TextModel | None = None):
        from ebt_megatron.api.loading import load

        super().__init__(config)
        self.loaded: TextModel = load(str(config.name_or_path)) if loaded is None else loaded
        self.ebt: nn.Module = self.loaded.run.model
        self.predictor = self.loaded.predictor(ThinkingOptions.of(config.thinking))
        self._kept: _Kept | None = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **given: Any) -> EBTForCausalLM:
        """Load an exported folder, or a model of the Hub.

        Args:
            pretrained_model_name_or_path: a folder, or USER/MODEL.
            args: none are known.
            given: config, device_map (one device), dtype or torch_dtype, revision, and fields of `EBTConfig`.

        Raises:
            RecipeError: where it is none of text, or its loading is told something that does not do.
        """
        from ebt_megatron.api.loading import load

        name = pretrained_model_name_or_path
        config = given.pop("config", None)
        known = {f: given.pop(f) for f in ("thinking",) if f in given}
        if config is None:
            config = EBTConfig.from_pretrained(name, revision=given.get("revision") or "main")
        for key, value in known.items():
            setattr(config, key, value)
        dtype = given.get("dtype", given.get("torch_dtype"))
        if isinstance(dtype, str) and dtype == "auto":
            dtype = None
        place = given.get("device_map")
        if isinstance(place, dict):
            if len(set(place.values())) != 1:
                raise RecipeError("device_map: an EBT is on one device: give its name")
            place = next(iter(place.values()))
        if isinstance(place, int):
            place = f"cuda:{place}"
        if place in ("auto", "balanced", "sequential"):
            place = None
        loaded = load(Path(name) if Path(name).is_dir() else name, place, dtype, given.get("revision"))
        from ebt_megatron.api.text import TextModel  # now that Megatron is there

        if not isinstance(loaded, TextModel):
            raise RecipeError(f"{name} is a model of {loaded.recipe.data.modality}, which predicts no tokens")
        return cls(config, loaded).eval()

    def save_pretrained(self, *_: Any, **__: Any) -> None:
        """Refused: a folder of weights that transformers cut is none of ours; copy the exported folder."""
        raise RecipeError("nothing was trained here: copy the exported folder, or export the run again")

    def get_input_embeddings(self) -> nn.Module:
        """The tokens' table."""
        return self.ebt.modality.context.table  # type: ignore[union-attr,return-value]

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
        goes_on: bool = False,
        **_: Any,
    ) -> Any:
        """Log-probabilities of what follows every token: logits that thinking ended with, normalised.

        Args:
            input_ids: int64 [B, S].
            attention_mask: [B, S], 0 where there is padding, at whichever side; positions count without it.
            labels: int64 [B, S], -100 where none: also the mean cross-entropy of what follows, which has no gradient.
            logits_to_keep: of how many of the last positions; 0: all.
            return_dict: False: a tuple.
            goes_on: of the last position alone; the next call may continue these texts.

        Returns:
            Loss (or None) and logits [B, S or logits_to_keep, V]; zeros at padding.
        """
        batch, length = input_ids.shape
        there = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        if goes_on:
            logits_to_keep = 1
        kept = length if not logits_to_keep or labels is not None else min(logits_to_keep, length)
        positions = there.long().cumsum(1) - 1
        wanted = there.clone()
        wanted[:, : length - kept] = False
        logits = torch.zeros(batch, length, self.predictor.vocab_size, device=input_ids.device)
        if goes_on:
            context, done = self._continued([ids[mask].tolist() for ids, mask in zip(input_ids, there, strict=True)])
            new = there & (positions >= torch.tensor(done, device=positions.device)[:, None])
        else:
            context, new = self.predictor.context(batch, int(there.sum(1).max()), length), there
        ids = torch.zeros(batch, dtype=torch.int64, device=input_ids.device)
        rows = torch.arange(batch, device=input_ids.device)[:, None].expand_as(input_ids)
        found = self.predictor(context, rows[new], positions[new], input_ids[new], wanted[new], ids, 0)
        logits[wanted] = found.log_p.to(logits)
        logits = logits[:, length - kept :]
        loss = None
        if labels is not None:
            targets = labels[:, 1:].masked_fill(~there[:, :-1], -100)  # padding predicts nothing
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), ignore_index=-100)
        if return_dict is False:
            return (logits,) if loss is None else (loss, logits)
        return CausalLMOutput(loss=loss, logits=logits)

    def _continued(self, texts: list[list[int]]) -> tuple[Context, list[int]]:
        """A context for texts, and how many tokens of each are in it: those of the last call, or none."""
        kept = self._kept if self._kept is not None and self._kept.predictor is self.predictor else None
        rows = None if kept is None else kept.rows_of(texts)
        if kept is None or rows is None:
            self._kept = None  # its memory is free before the next is taken
            chunk = max(map(len, texts))
            context = self.predictor.context(len(texts), self.predictor.window + chunk, chunk)
            self._kept = _Kept(self.predictor, context, texts, chunk)
            return context, [0] * len(texts)
        done = [len(kept.texts[row]) for row in rows]
        if rows != list(range(len(kept.texts))):
            kept.context.select(torch.tensor(rows, device=self.predictor.device))
        kept.texts = texts
        return kept.context, done

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool | None = True, **_: Any
    ) -> dict[str, Any]:
        """Everything so far: what of it is in the context already, `forward` finds out."""
        goes_on = {"goes_on": True} if use_cache or use_cache is None else {"logits_to_keep": 1}
        return {"input_ids": input_ids, "attention_mask": attention_mask, **goes_on}

    def _prepare_cache_for_generation(self, *_: Any, **__: Any) -> bool:
        """None of transformers'."""
        return False


AutoConfig.register("ebt", EBTConfig, exist_ok=True)
AutoModelForCausalLM.register(EBTConfig, EBTForCausalLM, exist_ok=True)
