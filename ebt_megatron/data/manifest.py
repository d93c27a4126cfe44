"""The manifest of a folder of shards: what its samples are, and what made them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ebt_megatron.core.errors import DataError
from ebt_megatron.core.files import write_whole
from ebt_megatron.data.remote import content_of

SCHEMA_VERSION = 2


def index_name(shard: str) -> str:
    """The name of the offset index beside a tar."""
    return shard.removesuffix(".tar") + ".index.json"


@dataclass
class ShardInfo:
    """What the manifest says of one tar."""

    name: str
    samples: int
    bytes: int
    sha256: str
    index_sha256: str

    @property
    def index_name(self) -> str:
        """The offset index beside the tar."""
        return index_name(self.name)


@dataclass
class Manifest:
    """What a folder of shards holds.

    Attributes:
        kind: a name of `data.kinds.KINDS`, or package.module:NAME of one's own.
        shape: of one sample: [sequence_length + 1] tokens, [frames, patches, channels] of a clip,
            [patches, channels] of a picture, [2, cells] of a puzzle and its answer.
        dtype: of the stored samples.
        samples: in all shards.
        provenance: where the data came from and how it was made.
        tokenizer: of text: {"file", "sha256", "end_of_text", "vocab_size", "bytes_per_token"}; the
            file lies beside the manifest.
        encoder: of frames and pictures: {"file", "sha256", "kind", "patch", "height", "width", "mean",
            "std"}; samples are (encoding - mean) / std, by channel. Of puzzles: {"file", "sha256", "kind", "height",
            "width", "symbols"}, what their cells are.
        classes: names of the labels, where pictures have labels.
        captions: where pictures have captions: {"kind", "shape", "sha256", "origin", ...}; see `data.captions`.
        facts: what else is true of all samples: of text with answers "answers_after", what they follow; for a kind of
            one's own whatever it needs. Folders that are read together share it.
    """

    kind: str
    shape: list[int]
    dtype: str
    samples: int
    shards: list[ShardInfo]
    provenance: dict[str, Any]
    tokenizer: dict[str, Any] = field(default_factory=dict)
    encoder: dict[str, Any] = field(default_factory=dict)
    classes: list[str] = field(default_factory=list)
    captions: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    @property
    def sequence_length(self) -> int:
        """Tokens or frames predicted per sample."""
        return self.shape[0] - 1

    @property
    def vocab_size(self) -> int:
        """Entries of the tokenizer; 0 without one."""
        return self.tokenizer.get("vocab_size", 0)

    @property
    def sidecar(self) -> dict[str, Any]:
        """The tokenizer or the encoder: what turns samples back into text or pixels; empty where there is none."""
        return self.tokenizer or self.encoder

    @property
    def files(self) -> list[dict[str, Any]]:
        """What is recorded of each file beside the manifest: its name ("file") and "sha256"; also those of facts."""
        facts = [fact for fact in self.facts.values() if isinstance(fact, dict) and {"file", "sha256"} <= fact.keys()]
        return [recorded for recorded in (self.tokenizer, self.encoder, self.captions, *facts) if "file" in recorded]

    @property
    def caption_key(self) -> list[Any]:
        """What captions must have in common to be given to one model."""
        return [self.captions.get(key) for key in ("kind", "shape", "sha256")]

    def write(self, folder: Path) -> None:
        """Publish: written last and renamed into place, so that a folder with a manifest is complete."""
        data = asdict(self)
        if not self.facts:
            del data["facts"]
        data["checksum"] = _checksum(data)
        write_whole(folder / "manifest.json", json.dumps(data, indent=1) + "\n")


def _checksum(manifest: dict[str, Any]) -> str:
    """Return the checksum of everything else that a manifest says."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: str) -> Manifest:
    """Read a shard folder's manifest (a path or a URL).

    Raises:
        DataError: if there is none, or it is not one of ours.
    """
    path = f"{folder.rstrip('/')}/manifest.json"
    again = "copy it again, or prepare the data again"
    try:
        raw = json.loads(content_of(path))
        recorded = raw.pop("checksum", None)
    except FileNotFoundError:
        raise DataError(f"no shards at {folder}: manifest.json is missing; ebt-prepare makes them") from None
    except OSError as error:
        raise DataError(f"no shards at {folder}: {error}") from None
    except (ValueError, AttributeError, TypeError) as error:
        raise DataError(f"{path} is not a manifest ({' '.join(str(error).split())}); {again}") from None
    version = raw.get("schema_version")
    if version != SCHEMA_VERSION:
        raise DataError(
            f"{path} has schema version {version}, this program reads {SCHEMA_VERSION}; prepare the data again"
        )
    if recorded != _checksum(raw):
        raise DataError(f"{path} does not match its own checksum: it was damaged or edited; {again}")
    try:
        shards = [ShardInfo(**_checked(s, ShardInfo, "shard")) for s in raw.pop("shards", [])]
        return Manifest(**_checked({**raw, "shards": shards}, Manifest, "manifest"))
    except (TypeError, AttributeError, ValueError) as error:
        raise DataError(f"{path} is not a manifest ({error}); {again}") from None


_TYPES = {"int": int, "str": str, "list[int]": list, "list[str]": list, "list[ShardInfo]": list, "dict[str, Any]": dict}


def _checked(values: dict[str, Any], of: type[Any], what: str) -> dict[str, Any]:
    """The values of a dataclass's fields.

    Raises:
        ValueError: a key that is unknown or missing, or a value of another type.
    """
    known = {field.name: field for field in fields(of)}
    needed = {name for name, f in known.items() if f.default is MISSING and f.default_factory is MISSING}
    if wrong := sorted((set(values) - set(known)) | (needed - set(values))):
        raise ValueError(f"{what} keys that are unknown or missing: {', '.join(wrong)}")
    for name, value in values.items():
        if not isinstance(value, _TYPES[str(known[name].type)]) or isinstance(value, bool):
            raise ValueError(f"{name} of a {what} is {value!r}")
    return values
