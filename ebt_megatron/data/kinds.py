"""Kinds of sample, in one table: what the arrays of a sample are, and what their values may be.

Reading, checking, blending and rewriting shards ask this table and nothing else. So a kind of your own is a `Kind`
in a module of your own, which a manifest names as package.module:NAME. See docs/extending.md.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from ebt_megatron.core.errors import DataError
from ebt_megatron.core.own_modules import look_in
from ebt_megatron.data.description import Description
from ebt_megatron.data.manifest import Manifest


class Bounds(NamedTuple):
    """What integers may be.

    Attributes:
        what: one of them is called.
        least: the smallest.
        end: one more than the largest.
        of: what there are `end` of, for the message.
    """

    what: str
    least: int
    end: int
    of: str


def _unbounded(manifest: Manifest) -> Bounds | None:
    return None


@dataclass(frozen=True)
class Part:
    """An array of a sample: one `.npy` in a member of the tar.

    Attributes:
        name: of the array; the tar has SSSSSS-BBBBBB.NAME.npy.
        shape: of one sample, by the manifest; None: this folder has none.
        dtype: in a micro-batch, by the manifest.
        bounds: of integers, by the manifest; None: any value that is finite does.
    """

    name: str
    shape: Callable[[Manifest], list[int] | None]
    dtype: Callable[[Manifest], type[np.generic]]
    bounds: Callable[[Manifest], Bounds | None] = _unbounded

    def problem(self, block: np.ndarray, manifest: Manifest) -> str:
        """What is wrong with the values of a block: integers that the manifest knows nothing of; or ""."""
        bounds = self.bounds(manifest)
        if not block.size or bounds is None:
            return ""
        low, high = int(block.min()), int(block.max())
        if low >= bounds.least and high < bounds.end:
            return ""
        return f"{bounds.what} {low if low < bounds.least else high}, outside the {bounds.end} {bounds.of}"


@dataclass(frozen=True)
class Kind:
    """A kind of sample.

    Attributes:
        array: the name of the samples' own array in a member of a tar.
        dtype: of samples in a micro-batch: np.int64 or np.float32.
        rows: samples of one member.
        unit: what samples are sequences of, one longer than `data.sequence_length` ("tokens", "frames"); "": they are
            no sequences.
        sidecar: the manifest's field, or its fact, that says what samples were made with: "tokenizer", "encoder", a
            name in `facts`, or "" for nothing. With "file" and "sha256" it is a file beside the manifest.
        bounds: of samples that are integers, by the manifest; see `Part`.
        beside: what else a sample has.
        text: a sample as text, for `ebt-shards sample`; None: as pictures if an encoder made it, else as numbers.
    """

    array: str
    dtype: type[np.generic] = np.float32
    rows: int = 64
    unit: str = ""
    sidecar: str = ""
    bounds: Callable[[Manifest], Bounds | None] = _unbounded
    beside: tuple[Part, ...] = ()
    text: Callable[[np.ndarray, Description], str] | None = None

    @property
    def samples(self) -> Part:
        """The samples' own array."""
        return Part(self.array, lambda m: m.shape, lambda m: self.dtype, self.bounds)

    def parts(self, manifest: Manifest) -> dict[str, Part]:
        """The arrays that samples of a folder have, by name; the samples' own is the first."""
        return {p.name: p for p in (self.samples, *self.beside) if p.shape(manifest) is not None}


def part_name(member: str) -> str:
    """The name of the array in a tar's member."""
    return member.removesuffix(".npy").rpartition(".")[2]


def _tokens(manifest: Manifest) -> Bounds | None:
    size = manifest.vocab_size
    return Bounds("token", 0, size, "entries of the vocabulary") if size else None


def _decoded(row: np.ndarray, source: Description) -> str:
    tokenizer = Tokenizer.from_file(str(source.sidecar()))
    return tokenizer.decode(row.tolist(), skip_special_tokens=False)


def _labels(manifest: Manifest) -> Bounds:
    return Bounds("label", 0, len(manifest.classes), "classes")


def _caption_tokens(manifest: Manifest) -> Bounds | None:
    entries = manifest.captions.get("entries", 0)
    return Bounds("token", -1, entries, "entries of the vocabulary") if entries else None


LABELS = Part("labels", lambda m: [] if m.classes else None, lambda m: np.int64, _labels)
CAPTIONS = Part(
    "captions",
    lambda m: m.captions.get("shape"),
    lambda m: np.int64 if m.captions.get("entries") else np.float32,
    _caption_tokens,
)


def _symbols(manifest: Manifest) -> Bounds:
    return Bounds("symbol", 0, manifest.encoder["symbols"] + 1, "symbols and the blank")


ANSWERS = Part(
    "answers",
    lambda m: m.shape if "answers_after" in m.facts else None,
    lambda m: np.int64,
    lambda m: Bounds("mark", 0, 2, "marks"),
)
RATINGS = Part("ratings", lambda m: [] if m.encoder.get("rated") else None, lambda m: np.float32)

KINDS = {
    "text": Kind("tokens", np.int64, 64, "tokens", "tokenizer", _tokens, (ANSWERS,), _decoded),
    "video": Kind("latents", np.float32, 1, "frames", "encoder"),
    "images": Kind("latents", np.float32, 64, "", "encoder", beside=(LABELS, CAPTIONS)),
    "puzzles": Kind("puzzles", np.int64, 256, "", "encoder", _symbols, beside=(RATINGS,)),
}


def kind_of(name: str) -> Kind:
    """The kind of a name in KINDS, or package.module:NAME of a `Kind` of one's own.

    Raises:
        DataError: if there is none.
    """
    if name in KINDS:
        return KINDS[name]
    module, colon, attribute = name.partition(":")
    why = ""
    look_in(Path.cwd())
    try:
        found = getattr(importlib.import_module(module), attribute) if colon else None
    except (ImportError, AttributeError) as error:
        found, why = None, f" ({error})"
    if not isinstance(found, Kind):
        raise DataError(
            f"there is no kind of sample {name!r}: choose one of {', '.join(KINDS)}, or package.module:NAME "
            f"of a Kind of your own, where Python finds it{why}"
        )
    return found
