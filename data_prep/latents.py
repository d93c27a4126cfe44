"""Frames and pictures to shards of normalised latents: what video and images share.

Passes (data_prep/latent_passes.py), each restartable (data_prep/job.py): look at a sample of the input, where the
encoder must be fitted; encode every unit; measure the mean and standard deviation of the train split; cut each
split's samples, normalised by them, into shards; publish.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from ebt_megatron.core.errors import DataError
from ebt_megatron.core.files import sha256_of
from ebt_megatron.data.captions import LONGEST
from ebt_megatron.data.manifest import Manifest, read_manifest
from ebt_megatron.data_prep.captions import Captions
from ebt_megatron.data_prep.encoders import KINDS, new_encoder
from ebt_megatron.data_prep.files import InputFile
from ebt_megatron.data_prep.ground import WHITE
from ebt_megatron.data_prep.job import Execution, Job
from ebt_megatron.data_prep.latent_passes import (
    FIT_FRAMES,
    Fitting,
    Latents,
    LatentSettings,
    Pieces,
    fitted_on,
)
from ebt_megatron.data_prep.latent_shards import LatentShards
from ebt_megatron.data_prep.passes import WorkFolder, finish, units_of
from ebt_megatron.data_prep.pieces import Source

_NAMED = 10  # classes that are said by name

LATER = {"hop": 0, "mirror": False, "least_motion": 0.0, "ground": WHITE, "pause": 2.0}  # of a source: not recorded


def _told(manifest: Manifest) -> str:
    """Classes and captions, where there are some."""
    classes, captions = manifest.classes, manifest.captions
    names = ", ".join(classes[:_NAMED]) + (", ..." if len(classes) > _NAMED else "")
    out = f"; {len(classes)} classes: {names}" if classes else ""
    if captions:
        put = f"up to {captions['shape'][0]} tokens" if captions["kind"] == "tokens" else "CLIP's vectors"
        out += f"; captions ({put}) from {captions['origin']}"
    return out


def prepare_latents(
    output: Path,
    units: list[list[InputFile]],
    source: Source,
    settings: LatentSettings,
    described: str,
    execution: Execution = Execution(),
    captions: Captions | None = None,
) -> dict[str, Manifest]:
    """Encode, normalise and write every split.

    Args:
        output: folder for train/ and validation/.
        units: the input's files, in order, in pieces of work.
        source: what reads them; a dataclass with the attributes and methods of Source.
        settings: what to make.
        described: what the input is, for the manifest.
        execution: how to run.
        captions: what is told of pictures; the pieces of `source` then have captions.

    Raises:
        DataError: an encoder that cannot be had, files that cannot be decoded (unless they are skipped), or
            input that cannot be split.
    """
    parts = units_of(units)
    encoder = new_encoder(
        settings.encoder, source.height, source.width, settings.patch, settings.channels, settings.model
    )
    given = None if settings.encoder in KINDS else sha256_of(Path(settings.encoder))
    options = {k: v for k, v in asdict(settings).items() if k != "skip_broken"}  # it changes nothing of what was made
    if settings.scale is None:
        del options["scale"]  # preparations of before had none
    elif encoder.mean is not None:
        raise DataError(f"--scale {settings.scale:g}: {settings.encoder} has a normalisation of its own: leave it out")
    about = {k: v for k, v in vars(source).items() if k != "captions" and (k not in LATER or v != LATER[k])}
    record: dict[str, Any] = {"settings": options, "source": about, "encoder": [encoder.settings(), given]}
    if captions is not None:
        record["captions"] = captions.record()
    with Job(output, record, [file for files in units for file in files], execution) as job:
        if job.complete:
            return {name: read_manifest(str(output / name)) for name in settings.splits}
        work, pieces = WorkFolder.of(output, parts), Pieces(settings, source)
        chosen = [] if encoder.fitted else fitted_on(parts, settings.seed)
        held_out = job.once(lambda: pieces.held_out(parts))
        fitting = Fitting(work, pieces, held_out, FIT_FRAMES // max(len(chosen), 1))
        job.each("sampling", fitting.sample, chosen, fitting.file)
        latents = Latents(work, pieces, job.once(lambda: fitting.fit(encoder, chosen)), captions)
        job.each("encoding", latents.encode, parts, latents.file)
        shards = LatentShards(work, latents, job.once(lambda: latents.held_out(parts)))
        job.each("measuring", shards.measure, parts, shards.moments)
        manifests = finish(job, shards, parts, job.once(lambda: shards.plan(parts)), described)
        for name, manifest in manifests.items():
            counts = ", ".join(f"{v:,} {k}" for k, v in manifest.provenance.items() if k not in ("source", "seed"))
            shape = " x ".join(map(str, manifest.shape))
            job.console.print(
                f"{name}: {counts}, {manifest.samples:,} samples of {shape} in {len(manifest.shards)} shards"
                f"{_told(manifest)}"
            )
        if captions is not None and captions.losses:
            told = ", ".join(f"{count:,} {name}" for name, count in captions.losses.items())
            job.console.print(f"of captions: {told} (no token for it; longer than {LONGEST} tokens)")
        if manifests["train"].provenance["skipped"]:
            job.console.print(f"broken files left out: {output / 'skipped.txt'}")
    return manifests
