"""Text in and out of a run: its tokenizer, and what it cannot say, which is read as unknown and counted."""

from __future__ import annotations

import codecs
import json
import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

from tokenizers import Tokenizer

from ebt_megatron.core.errors import DataError, RecipeError
from ebt_megatron.core.lines import encodable
from ebt_megatron.session import TrainedRun
from ebt_megatron.tasks import task_as
from ebt_megatron.tasks.text import Text

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_WITNESSES = 4  # tokens that tell how one after them is spelled; a character has at most so many


class Texts:
    """The run's tokenizer.

    Attributes:
        end: the token that separates documents; None: there is none.
        lacking: how often each character, or word, was met that the tokenizer has no token for.
        replaced: how many surrogates (what is left of bytes that are no UTF-8) were read as U+FFFD.

    Args:
        run: of text.

    Raises:
        RecipeError: for a run whose data has no tokenizer.
    """

    def __init__(self, run: TrainedRun):
        file = task_as(run.task, Text).tokenizer_file
        if file is None:
            raise RecipeError(f"{run.recipe.training.output_dir}: its data has no tokenizer, so no text can be read")
        self.tokenizer = Tokenizer.from_file(str(file))
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.tokenizer.encode_special_tokens = True  # spelled in a text, they are text
        self.end: int | None = run.source.manifest.tokenizer["end_of_text"]
        self.lacking: Counter[str] = Counter()
        self.replaced = 0
        self._known: dict[str, bool] = {}
        made_of = json.loads(self.tokenizer.to_str())
        model, decoder = made_of["model"], made_of["decoder"]
        unknown = model.get("unk_token")
        self._unknown = model.get("unk_id") if unknown is None else self.tokenizer.token_to_id(unknown)
        parts = decoder["decoders"] if decoder and decoder["type"] == "Sequence" else [decoder] if decoder else []
        self._in_bytes = any(part["type"] == "ByteLevel" for part in parts)

    def encode(self, text: str) -> list[int]:
        """The tokens of a text; what is `lacking` is the unknown token, or left out by a tokenizer without."""
        text, replaced = encodable(text)
        self.replaced += replaced
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        if self._unknown is not None and self._unknown in encoding.ids:
            for token, (begin, end) in zip(encoding.ids, encoding.offsets, strict=True):
                if token == self._unknown:
                    of = [c for c in text[begin:end] if not self._knows(c)]
                    self.lacking.update(of or [text[begin:end]])  # or a word, each character of which is known
        self.lacking.update(c for c in text if self._drops(c))
        return encoding.ids

    def _knows(self, character: str) -> bool:
        return self._unknown not in self.tokenizer.encode(character, add_special_tokens=False).ids

    def _drops(self, character: str) -> bool:
        if character not in self._known:
            ids = self.tokenizer.encode(character, add_special_tokens=False).ids
            self._known[character] = bool(ids) or character.isspace()
        return not self._known[character]

    def prompt(self, text: str, number: int) -> list[int]:
        """The tokens of a prompt, the number-th; an empty one begins a text.

        Raises:
            DataError: for one of which no token is left, or an empty one where the tokenizer has no end of text.
        """
        if text == "":
            if self.end is None:
                raise DataError(
                    f"prompt {number} is empty, and the tokenizer has no end of text that a text could begin after: "
                    "give at least one token to go on from"
                )
            return [self.end]
        tokens = self.encode(text)
        if not tokens:
            raise DataError(f"prompt {number}: the run's tokenizer has no token for any of {text[:20]!r}")
        return tokens

    def losses(self) -> list[str]:
        """A line for each way in which texts were not read as they were given."""
        lines = []
        if self.replaced:
            lines.append(f"{self.replaced} bytes or surrogates that are no UTF-8 were read as U+FFFD")
        if self.lacking:
            which = " ".join(c for c, _ in self.lacking.most_common(20))
            how = "left out" if self._unknown is None else "read as its unknown token"
            lines.append(
                f"{self.lacking.total()} characters or words that the run's tokenizer lacks were {how}: {which}"
            )
        return lines

    def decode(self, tokens: Sequence[int], before: int) -> str:
        """The text of tokens that follow the token `before`."""
        head, whole = self.tokenizer.decode([before]), self.tokenizer.decode([before, *tokens])
        return whole[len(head) :] if whole.startswith(head) else self.tokenizer.decode(list(tokens))

    def ends_within_a_character(self, tokens: Sequence[int]) -> bool:
        """Whether the last of the tokens has some bytes of a character, whose others are to follow."""
        tail = b"".join(self._spelled(token) for token in tokens[-_WITNESSES:])
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        decoder.decode(tail)
        return bool(decoder.getstate()[0])

    def _spelled(self, token: int) -> bytes:
        written = self.tokenizer.id_to_token(token) or ""
        if (byte := _BYTE.fullmatch(written)) is not None:
            return bytes.fromhex(byte[1])
        if self._in_bytes:
            bytes_of = _byte_alphabet()
            if all(c in bytes_of for c in written):
                return bytes(bytes_of[c] for c in written)
        return written.encode("utf-8", "replace")


@lru_cache
def _byte_alphabet() -> dict[str, int]:
    """The bytes by the characters that byte-level vocabularies write (GPT-2): printable ones are themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


class Spelling:
    """The text of tokens as they come: each costs the same, however many there were.

    Attributes:
        text: of the tokens so far, but a character that is not whole.

    Args:
        texts: the tokenizer.
        before: the token before the first one.
    """

    def __init__(self, texts: Texts, before: int):
        self.texts, self.text = texts, ""
        self._groups, self._new = [[before]], list[int]()  # of whole characters; of one that may not be whole

    def add(self, token: int) -> str:
        """The text that a token makes known; "" within a character."""
        self._new.append(token)
        context = [t for group in self._groups for t in group]
        if self.texts.ends_within_a_character([*context, *self._new]):
            return ""
        head, whole = (self.texts.tokenizer.decode(tokens) for tokens in (context, context + self._new))
        new = whole[len(head) :] if whole.startswith(head) else self.texts.tokenizer.decode(self._new)
        self._groups, self._new = [*self._groups[1 - _WITNESSES :], self._new], []
        self.text += new
        return new
