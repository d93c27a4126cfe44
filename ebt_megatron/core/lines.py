r"""Lines of text files that users and other programs write: UTF-8, a byte-order mark or none, each ended by \n.

Python's own `splitlines` also ends a line at U+2028, U+0085, form feeds and five more, which are characters of a text.
"""

from __future__ import annotations

import codecs
import json
import re
from typing import Any

from ebt_megatron.core.errors import DataError

_SURROGATES = re.compile("[\ud800-\udfff]")  # what JSON's \u escapes and non-UTF-8 arguments may leave in a string


def encodable(text: str) -> tuple[str, int]:
    """A text whose lone surrogates, which no encoding has, are U+FFFD; and how many there were."""
    return _SURROGATES.subn("\ufffd", text)


def text_of(data: bytes, name: str) -> str:
    """The text of a file's bytes, without the byte-order mark that it may begin with.

    Args:
        data: all of the file.
        name: of the file, for the message.

    Raises:
        DataError: if it is not UTF-8.
    """
    try:
        return data.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(f"{name}, line {line}: not UTF-8 ({error}): convert the file") from None


def lines_of(text: str) -> list[str]:
    r"""The lines of a text: they end at \n or \r\n and at nothing else, the last one also at the text's end."""
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    return lines if lines[-1] else lines[:-1]


def value_of(line: str, where: str) -> Any:
    """What a line says: itself, or, where it begins as an object, an array or a string of JSON, that.

    Args:
        line: without its end.
        where: file and line, for the message.

    Returns:
        the line as it is; or the dict, list or str of its JSON.

    Raises:
        DataError: if it begins like JSON and is none.
    """
    if not line.lstrip().startswith(("{", "[", '"')):
        return line
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        why = "a comma at its end" if line.rstrip().endswith(",") else str(error)
        raise DataError(
            f"{where}: it begins like JSON and is none ({why}); mend it, or write the text as a JSON string"
        ) from None
