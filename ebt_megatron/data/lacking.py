"""What of a text a tokenizer has no token for."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
from tokenizers import Tokenizer


class Lacking:
    """How much of a text a tokenizer has no token for: that becomes its unknown token, or, without one, nothing.

    Attributes:
        unknown: the unknown token's id; None: there is none.
    """

    def __init__(self, tokenizer: Tokenizer):
        model = json.loads(tokenizer.to_str())["model"]
        name = model.get("unk_token")
        self.unknown: int | None = model.get("unk_id") if name is None else tokenizer.token_to_id(name)
        self.tokenizer = tokenizer
        self._dropped: dict[str, bool] = {}

    def count(self, document: str, tokens: Sequence[int] | np.ndarray) -> int:
        """Unknown tokens among a document's, or the characters of it that have none."""
        if self.unknown is not None:
            return int((np.asarray(tokens) == self.unknown).sum())
        return sum(document.count(c) for c in set(document) if self._drops(c))

    def share(self, count: int, tokens: int) -> float:
        """The share of a text that is lacking, of so many tokens in all."""
        if self.unknown is None:
            tokens += count  # which are none of them
        return count / max(tokens, 1)

    def _drops(self, character: str) -> bool:
        if character not in self._dropped:
            ids = self.tokenizer.encode(character, add_special_tokens=False).ids
            self._dropped[character] = not ids and not character.isspace()
        return self._dropped[character]
