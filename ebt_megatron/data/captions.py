"""What stands for a picture's caption: token ids for an encoder that learns them, or one vector of a frozen CLIP.

A manifest's `captions` says which, and how another caption is put in the same way:

    kind       "tokens" or "clip"
    shape      of one: [length] int64 ids, -1 after the last one; or [width] float32, the pooled output
    sha256     of the tokenizer's file, or of the model's files
    origin     where the texts came from
    entries    of the vocabulary, and `file`, the tokenizer.json beside the manifest (tokens)
    model      the folder (clip)
    unknown    how much of all captions the tokenizer has no token for, and `cut`, how many are longer than the
               longest that is kept; where there are such

A caption of -1 alone, or of zeros, is one that is not told.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tokenizers import Tokenizer

from ebt_megatron.core.errors import DataError
from ebt_megatron.core.files import sha256_of_model
from ebt_megatron.data.description import Description
from ebt_megatron.data.lacking import Lacking

LONGEST = 77  # tokens, CLIP's own; longer captions are cut
NOT_TOLD = -1
_BATCH = 256


class CaptionEncoder(Protocol):
    """Texts -> what stands for them."""

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """[N, *shape], int64 tokens or float32 vectors; raises DataError for a text with nothing in it."""
        ...

    def lacking(self, texts: Sequence[str]) -> int:
        """Words or characters of texts that there is no token for."""
        ...

    def describe(self) -> dict[str, Any]:
        """What the manifest says, but for the origin."""
        ...


class CaptionTokens:
    """Ids of a tokenizer.

    Args:
        tokenizer: the text of a tokenizer.json.
        length: of the longest caption.
    """

    def __init__(self, tokenizer: str, length: int):
        self.text, self.length = tokenizer, length
        self.tokenizer = Tokenizer.from_str(tokenizer)

    def lacking(self, texts: Sequence[str]) -> int:
        """See `CaptionEncoder`."""
        lacking, found = Lacking(self.tokenizer), self.tokenizer.encode_batch(list(texts))
        return sum(lacking.count(text, encoding.ids) for text, encoding in zip(texts, found, strict=True))

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """See `CaptionEncoder`."""
        out = np.full((len(texts), self.length), NOT_TOLD, np.int64)
        for row, text, found in zip(out, texts, self.tokenizer.encode_batch(list(texts)), strict=True):
            ids = found.ids[: self.length]
            if not ids:
                raise DataError(f"the caption {text!r} has no token of the tokenizer: give another")
            row[: len(ids)] = ids
        return out

    def describe(self) -> dict[str, Any]:
        """See `CaptionEncoder`."""
        entries = max(self.tokenizer.get_vocab().values()) + 1
        digest = hashlib.sha256(self.text.encode()).hexdigest()
        return {"kind": "tokens", "shape": [self.length], "sha256": digest, "entries": entries, "file": "captions.json"}


class ClipCaptions:
    """The pooled output of a transformers CLIPTextModel in a folder on the user's disk, with its tokenizer.

    Args:
        model: the folder.
        sha256: of its files, where it is known.

    Raises:
        DataError: if it cannot be loaded, or is another model.
    """

    def __init__(self, model: str, sha256: str = ""):
        self.model, self.sha256 = model, _digest(model)
        if sha256 not in ("", self.sha256):
            raise DataError(f"the CLIP model at {model} is not the one the captions were made with: put that back")
        self.network, self.tokenizer = _load(model)

    def lacking(self, texts: Sequence[str]) -> int:
        """None: its tokens are made of bytes."""
        return 0

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """See `CaptionEncoder`."""
        import torch

        rows = [np.empty((0, self.network.config.hidden_size), np.float32)]
        for i in range(0, len(texts), _BATCH):
            given = self.tokenizer(
                list(texts[i : i + _BATCH]),
                padding="max_length",
                truncation=True,
                max_length=self.network.config.max_position_embeddings,
                return_tensors="pt",
            ).to(self.network.device)
            with torch.inference_mode():
                rows.append(self.network(**given).pooler_output.float().cpu().numpy())
        return np.concatenate(rows)

    def describe(self) -> dict[str, Any]:
        """See `CaptionEncoder`."""
        return {"kind": "clip", "shape": [self.network.config.hidden_size], "sha256": self.sha256, "model": self.model}


def _digest(folder: str) -> str:
    files = [p for p in sorted(Path(folder).glob("*")) if p.suffix in (".json", ".safetensors", ".bin", ".txt")]
    if not (Path(folder) / "config.json").exists():
        raise DataError(f"no CLIP model at {folder!r}: config.json is missing; give a folder saved by transformers")
    return sha256_of_model(files)


@functools.cache
def _load(folder: str) -> tuple[Any, Any]:
    try:
        import torch
        from transformers import AutoTokenizer, CLIPTextModel
    except ImportError as error:
        raise DataError(f"a CLIP encoder ({folder}) needs transformers ({error}): pip install transformers") from None
    try:
        network = CLIPTextModel.from_pretrained(folder, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"the CLIP model at {folder} cannot be loaded ({' '.join(str(error).split())})") from None
    return network.eval().requires_grad_(False).to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def open_captions(source: Description) -> CaptionEncoder:
    """What puts a text in the way that the captions of some data were.

    Raises:
        DataError: if the data have no captions, or the tokenizer or model is not there any more.
    """
    made = source.manifest.captions
    if not made:
        raise DataError(f"{source.folder} has no captions")
    if made["kind"] == "clip":
        return ClipCaptions(made["model"], made["sha256"])
    return CaptionTokens(source.verified(made).read_text(), made["shape"][0])
