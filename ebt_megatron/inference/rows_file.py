"""A file of JSON lines that is written as they come, and gone on with by the same command after an end in between."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

from ebt_megatron.core.files import replacing, write_whole


class RowsFile:
    """PATH.partial, which becomes PATH when all rows are there; its first line says what the rows are of.

    Attributes:
        done: how many rows an earlier call left, whole batches.

    Args:
        path: of the file.
        made_of: all that decides the rows, in words; those that anything else made are thrown away.
        batch: rows that are made together.
    """

    def __init__(self, path: Path, made_of: str, batch: int):
        self.path, self.partial = path, self.partial_of(path)
        head = json.dumps({"rows of": hashlib.sha256(made_of.encode("utf-8", "backslashreplace")).hexdigest()})
        rows: list[str] = []
        if self.partial.exists():
            first, *rest = self.partial.read_text("utf-8", "replace").split("\n")
            rows = rest[:-1] if first == head else []  # the last one is empty, or half a row
        self.done = len(rows) // batch * batch
        write_whole(self.partial, "".join(f"{line}\n" for line in [head, *rows[: self.done]]))
        self._stream = self.partial.open("ab", buffering=0)

    @staticmethod
    def partial_of(path: Path) -> Path:
        """The name until all rows are there."""
        return path.with_name(f"{path.name}.partial")

    def add(self, row: str) -> None:
        """Write a row; raises OSError, naming the file, where it cannot be."""
        data = row.encode() + b"\n"
        try:
            while data:
                data = data[self._stream.write(data) :]
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.partial)) from None

    def finish(self) -> None:
        """Give the file its name."""
        self._stream.close()
        with self.partial.open("rb") as rows, replacing(self.path) as whole:
            rows.readline()
            with whole.open("wb") as stream:
                shutil.copyfileobj(rows, stream)
        self.partial.unlink()
