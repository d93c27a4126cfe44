"""Text in and out of a run: its tokenizer, with what it cannot say refused."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer

from ebt_megatron.core.errors import DataError, RecipeError
from ebt_megatron.session import TrainedRun
from ebt_megatron.tasks import task_as
from ebt_megatron.tasks.text import Text


class Texts:
    """The run's tokenizer.

    Attributes:
        end: the token that separates documents.

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
        unknown = getattr(self.tokenizer.model, "unk_token", None)
        self._unknown = None if unknown is None else self.tokenizer.token_to_id(unknown)
        self.end: int = run.source.manifest.tokenizer["end_of_text"]

    def encode(self, text: str, what: str = "the text") -> list[int]:
        """The tokens of a text.

        Raises:
            DataError: for characters that the tokenizer has no tokens for; `what` names the text.
        """
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        tokens = zip(encoding.ids, encoding.offsets, strict=True)
        unknown = [text[begin:end] for token, (begin, end) in tokens if token == self._unknown]
        dropped = [c for c in dict.fromkeys(text) if not c.isspace() and not self.tokenizer.encode(c).ids]
        lacking = "".join(unknown or dropped)
        if lacking:
            raise DataError(f"{what} holds {lacking[:20]!r}, which the run's tokenizer lacks: leave it out")
        return encoding.ids

    def prompt(self, text: str, number: int) -> list[int]:
        """The tokens of a prompt, the number-th.

        Raises:
            DataError: for an empty one, too.
        """
        tokens = self.encode(text, f"prompt {number}")
        if not tokens:
            raise DataError(f"prompt {number} is empty: give at least one token to go on from")
        return tokens

    def decode(self, tokens: Sequence[int], before: int) -> str:
        """The text of tokens that follow the token `before`."""
        head, whole = self.tokenizer.decode([before]), self.tokenizer.decode([before, *tokens])
        return whole[len(head) :] if whole.startswith(head) else self.tokenizer.decode(list(tokens))
