"""What a prepared folder says of its samples: what they are, and the tokenizer or encoder that made them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ebt_megatron.core.errors import DataError
from ebt_megatron.core.files import sha256_of, write_whole
from ebt_megatron.data.manifest import read_manifest


class Description:
    """A manifest and the tokenizer or encoder beside it; of a folder on this machine, which may have no samples.

    Args:
        folder: path; what is a `ShardFolder` may be at a URL, too.

    Raises:
        DataError: if there is no manifest, or it is damaged.
    """

    def __init__(self, folder: str):
        self.folder, self.manifest = folder.rstrip("/"), read_manifest(folder)

    def sidecar(self) -> Path:
        """The tokenizer or encoder file, verified.

        Raises:
            DataError: if it is missing or not the one the shards were made with.
        """
        return self.verified(self.manifest.sidecar)

    def verified(self, recorded: dict[str, Any]) -> Path:
        """A file beside the manifest, which has recorded its name ("file") and "sha256"; raises as `sidecar`."""
        name, expected = recorded["file"], recorded["sha256"]
        path = self._local(name, expected)
        if not path.exists():
            raise DataError(f"{path} is missing: copy it beside the manifest again")
        if sha256_of(path) != expected:
            raise DataError(
                f"{self.folder}/{name} does not match the manifest beside it: put back the one the shards "
                "were made with, or prepare the data again"
            )
        return path

    def _local(self, name: str, sha256: str) -> Path:
        """The sidecar on this machine, if it is there."""
        return Path(self.folder, name)

    def copy_to(self, folder: Path) -> None:
        """Write the manifest, and the files it names, to a folder, which then describes the samples and holds none."""
        folder.mkdir(parents=True, exist_ok=True)
        for recorded in self.manifest.files:
            write_whole(folder / recorded["file"], self.verified(recorded).read_bytes())
        replace(self.manifest, shards=[]).write(folder)
