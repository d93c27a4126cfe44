"""Frozen encoders: frames to patches of a few channels, and back.

`pixels` keeps the pixels; `pca` is a linear encoder fitted in seconds on the data itself; `vae` and
`dinov2` are models that the user has on disk. An encoder is kept as encoder.npz beside the shards,
with the mean and standard deviation that its latents were normalised by.
"""

from __future__ import annotations

import functools
import io
import json
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ebt_megatron.core.errors import DataError
from ebt_megatron.core.files import replacing, sha256_of_model

if TYPE_CHECKING:
    from torch import Tensor

# what DINOv2's pictures are normalised by
_IMAGENET = np.array([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], np.float32)
_BATCH = 64  # frames at once


def _batches(array: np.ndarray) -> Iterator[np.ndarray]:
    return (array[i : i + _BATCH] for i in range(0, len(array), _BATCH))


def patches_of(frames: np.ndarray, patch: int) -> np.ndarray:
    """[N, H, W, C] -> [N, H/patch * W/patch, patch * patch * C], patches row by row."""
    n, height, width, channels = frames.shape
    grid = frames.reshape(n, height // patch, patch, width // patch, patch, channels)
    return grid.transpose(0, 1, 3, 2, 4, 5).reshape(n, -1, patch * patch * channels)


def frames_of(patches: np.ndarray, height: int, width: int, patch: int) -> np.ndarray:
    """The inverse of patches_of."""
    grid = patches.reshape(len(patches), height // patch, width // patch, patch, patch, -1)
    return grid.transpose(0, 1, 3, 2, 4, 5).reshape(len(patches), height, width, -1)


def _to_pixels(values: np.ndarray) -> np.ndarray:
    """[-1, 1] -> uint8."""
    return np.clip(np.rint((values + 1) * 127.5), 0, 255).astype(np.uint8)


class Encoder(ABC):
    """Frames uint8 [N, height, width, 3] <-> latents float32 [N, patches, channels].

    Args:
        height, width: of the frames.
        patch: side of a patch in pixels.
        channels: of a patch.

    Attributes:
        mean, std: float32 [channels], what latents are normalised by; none until `normalise_by`.

    Raises:
        DataError: frames that patches do not fill.
    """

    kind: ClassVar[str]
    fitted = True

    def __init__(self, height: int, width: int, patch: int, channels: int):
        self.height, self.width, self.patch, self.channels = height, width, patch, channels
        self.mean: np.ndarray | None = None
        self.std: np.ndarray | None = None
        if height % patch or width % patch:
            raise DataError(
                f"frames of {height} x {width} cannot be cut into patches of {patch} x {patch}: change "
                "--height, --width or --patch"
            )

    @property
    def shape(self) -> list[int]:
        """[patches, channels] of a frame."""
        return [self.height * self.width // self.patch**2, self.channels]

    def fit(self, frames: np.ndarray) -> None:
        """Learn from frames uint8 [N, height, width, 3], where `fitted` is False."""
        raise NotImplementedError

    def encode(self, frames: np.ndarray) -> np.ndarray:
        """Frames uint8 [N, height, width, 3] -> latents float32 [N, patches, channels]."""
        return np.concatenate([self._encode(batch) for batch in _batches(frames)])

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Latents float32 [N, patches, channels] -> frames uint8 [N, height, width, 3].

        Raises:
            DataError: if the encoder has no decoder.
        """
        return np.concatenate([_to_pixels(self._decode(batch)) for batch in _batches(latents)])

    @abstractmethod
    def _encode(self, frames: np.ndarray) -> np.ndarray: ...

    def _decode(self, latents: np.ndarray) -> np.ndarray:
        raise DataError(f"a {self.kind} encoder has no decoder: its samples cannot be shown")

    def normalise_by(self, mean: np.ndarray, std: np.ndarray) -> None:
        """Set what latents are normalised by; a channel that hardly varies is not blown up."""
        self.mean = mean.astype(np.float32)
        self.std = np.maximum(std, 1e-3 * (std.max() or 1.0)).astype(np.float32)

    def to_samples(self, latents: np.ndarray) -> np.ndarray:
        """Latents as they are stored: normalised, float16."""
        assert self.mean is not None and self.std is not None
        return ((latents - self.mean) / self.std).astype(np.float16)

    def to_frames(self, samples: np.ndarray) -> np.ndarray:
        """Samples [N, patches, channels] as they are stored -> frames uint8 [N, height, width, 3]."""
        assert self.mean is not None and self.std is not None
        return self.decode(samples.astype(np.float32) * self.std + self.mean)

    def settings(self) -> dict[str, Any]:
        """What makes this encoder again, besides its arrays."""
        return {"height": self.height, "width": self.width, "patch": self.patch, "channels": self.channels}

    def _arrays(self) -> dict[str, np.ndarray]:
        return {}

    def save(self, path: Path) -> None:
        """Write encoder.npz: the same encoder, the same bytes."""
        arrays = {"settings": np.array(json.dumps({"kind": self.kind, **self.settings()})), **self._arrays()}
        if self.mean is not None and self.std is not None:
            arrays |= {"mean": self.mean, "std": self.std}
        # np.savez would write the time of day
        with replacing(path) as partial, zipfile.ZipFile(partial, "w") as archive:
            for name, array in arrays.items():
                buffer = io.BytesIO()
                np.save(buffer, array)
                archive.writestr(zipfile.ZipInfo(f"{name}.npy"), buffer.getvalue())

    def describe(self) -> dict[str, Any]:
        """What the manifest says, besides the file and its checksum."""
        assert self.mean is not None and self.std is not None
        return {"kind": self.kind, **self.settings(), "mean": self.mean.tolist(), "std": self.std.tolist()}


class PixelEncoder(Encoder):
    """Patches of pixels, scaled to [-1, 1]."""

    kind = "pixels"

    def __init__(self, height: int, width: int, patch: int | None = None, channels: int | None = None):
        patch = patch or 8
        if channels not in (None, 3 * patch**2):
            raise DataError(
                f"a pixels encoder with patches of {patch} x {patch} has {3 * patch**2} channels, not "
                f"{channels}: leave --channels out"
            )
        super().__init__(height, width, patch, 3 * patch**2)

    def _encode(self, frames: np.ndarray) -> np.ndarray:
        return patches_of(frames, self.patch).astype(np.float32) / np.float32(127.5) - 1

    def _decode(self, latents: np.ndarray) -> np.ndarray:
        return frames_of(latents, self.height, self.width, self.patch)


class PcaEncoder(Encoder):
    """The first principal components of patches of pixels.

    Args:
        components, center: float32 [channels, 3 * patch**2] and [3 * patch**2], of one that was fitted.
    """

    kind = "pca"

    def __init__(
        self,
        height: int,
        width: int,
        patch: int | None = None,
        channels: int | None = None,
        components: np.ndarray | None = None,
        center: np.ndarray | None = None,
    ):
        patch = patch or 8
        super().__init__(height, width, patch, channels or min(16, 3 * patch**2))
        if self.channels > 3 * patch**2:
            raise DataError(
                f"patches of {patch} x {patch} have only {3 * patch**2} principal components: lower --channels"
            )
        self.components, self.center = components, center

    @property
    def fitted(self) -> bool:  # type: ignore[override]
        """Whether it has components."""
        return self.components is not None

    def fit(self, frames: np.ndarray) -> None:
        """The eigenvectors of the patches' covariance, by size; of each the largest entry is positive."""
        size = 3 * self.patch**2
        total, square, count = np.zeros(size), np.zeros((size, size)), 0
        for batch in _batches(frames):  # sums of integers, exact in whatever order they are added
            rows = patches_of(batch, self.patch).reshape(-1, size).astype(np.float64)
            total, square, count = total + rows.sum(0), square + rows.T @ rows, count + len(rows)
        mean = total / count
        vectors = np.linalg.eigh(square / count - np.outer(mean, mean))[1][:, ::-1][:, : self.channels].T
        largest = np.take_along_axis(vectors, np.abs(vectors).argmax(1)[:, None], 1)
        self.components = np.ascontiguousarray(vectors * np.sign(largest), np.float32)
        self.center = (mean / 127.5 - 1).astype(np.float32)

    def _encode(self, frames: np.ndarray) -> np.ndarray:
        values = patches_of(frames, self.patch).astype(np.float32) / np.float32(127.5) - 1
        assert self.components is not None and self.center is not None
        return (values - self.center) @ self.components.T

    def _decode(self, latents: np.ndarray) -> np.ndarray:
        return frames_of(latents @ self.components + self.center, self.height, self.width, self.patch)

    def _arrays(self) -> dict[str, np.ndarray]:
        return {"components": self.components, "center": self.center} if self.fitted else {}  # type: ignore[dict-item]


class _ModelEncoder(Encoder):
    """A model of a folder on the user's disk; encoder.npz names the folder and the checksum of its files."""

    package: ClassVar[str]

    def __init__(self, height: int, width: int, patch: int | None, channels: int | None, model: str, sha256: str = ""):
        self.model, self.sha256 = model, _digest(self.kind, model)
        if sha256 not in ("", self.sha256):
            raise DataError(f"the {self.kind} model at {model} is not the one the shards were made with: put that back")
        self.network = _load(self.kind, model)
        super().__init__(height, width, *self._geometry(patch))
        if channels not in (None, self.channels):
            raise DataError(
                f"the {self.kind} model at {model} has {self.channels} channels, not {channels}: leave --channels out"
            )

    def settings(self) -> dict[str, Any]:
        """The settings, with the folder and the checksum of its files."""
        return {**super().settings(), "model": self.model, "sha256": self.sha256}

    @abstractmethod
    def _geometry(self, patch: int | None) -> tuple[int, int]:
        """Return (patch, channels)."""

    def _run(self, function: Callable[[Tensor], Tensor], array: np.ndarray) -> np.ndarray:
        """function of a float32 tensor [N, C, H, W] from the array [N, H, W, C]; the result is an array."""
        import torch

        where = next(self.network.parameters()).device
        with torch.inference_mode():
            tensor = torch.from_numpy(np.ascontiguousarray(array.transpose(0, 3, 1, 2), np.float32)).to(where)
            return function(tensor).float().cpu().numpy()


def _digest(kind: str, folder: str) -> str:
    """Return the digest of a model's configuration and weights."""
    files = [p for p in sorted(Path(folder).glob("*")) if p.suffix in (".json", ".safetensors", ".bin")]
    if not (Path(folder) / "config.json").exists():
        package = KINDS[kind].package
        raise DataError(f"--model {folder!r}: no config.json there; a {kind} encoder needs a folder saved by {package}")
    return sha256_of_model(files)


@functools.cache
def _load(kind: str, folder: str) -> Any:
    package = KINDS[kind].package
    try:
        import torch

        if kind == "vae":
            from diffusers import AutoencoderKL as Model
        else:
            from transformers import Dinov2Model as Model
    except ImportError as error:
        raise DataError(f"a {kind} encoder ({folder}) needs {package} ({error}): pip install {package}") from None
    try:
        network = Model.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        said = " ".join(str(error).split())
        raise DataError(f"--model {folder} cannot be loaded by {package} ({said})") from None
    return network.eval().requires_grad_(False).to("cuda" if torch.cuda.is_available() else "cpu")


class VaeEncoder(_ModelEncoder):
    """A diffusers AutoencoderKL: the mean of its latents, patch by patch."""

    kind, package = "vae", "diffusers"

    @property
    def _factor(self) -> int:
        return 2 ** (len(self.network.config.block_out_channels) - 1)

    def _geometry(self, patch: int | None) -> tuple[int, int]:
        patch = patch or self._factor
        if patch % self._factor:
            raise DataError(
                f"--patch {patch}: the vae at {self.model} has one latent for {self._factor} x "
                f"{self._factor} pixels; give a multiple of {self._factor}"
            )
        return patch, self.network.config.latent_channels * (patch // self._factor) ** 2

    def _encode(self, frames: np.ndarray) -> np.ndarray:
        latents = self._run(lambda x: self.network.encode(x / 127.5 - 1).latent_dist.mean, frames)
        return patches_of(latents.transpose(0, 2, 3, 1), self.patch // self._factor)

    def _decode(self, latents: np.ndarray) -> np.ndarray:
        factor = self._factor
        grid = frames_of(latents, self.height // factor, self.width // factor, self.patch // factor)
        return self._run(lambda z: self.network.decode(z).sample, grid).transpose(0, 2, 3, 1)


class Dinov2Encoder(_ModelEncoder):
    """A transformers Dinov2Model: the last hidden state of every patch. It has no decoder."""

    kind, package = "dinov2", "transformers"

    def _geometry(self, patch: int | None) -> tuple[int, int]:
        own = self.network.config.patch_size
        if patch not in (None, own):
            raise DataError(f"--patch {patch}: the dinov2 at {self.model} has patches of {own}; leave --patch out")
        return own, self.network.config.hidden_size

    def _encode(self, frames: np.ndarray) -> np.ndarray:
        values = (frames.astype(np.float32) / 255 - _IMAGENET[0]) / _IMAGENET[1]
        return self._run(lambda x: self.network(x).last_hidden_state[:, 1:], values)  # without the class token


KINDS: dict[str, Any] = {e.kind: e for e in (PixelEncoder, PcaEncoder, VaeEncoder, Dinov2Encoder)}


def new_encoder(
    name: str, height: int, width: int, patch: int | None = None, channels: int | None = None, model: str | None = None
) -> Encoder:
    """An encoder of a kind, or the one of an encoder.npz.

    Args:
        name: pixels, pca, vae, dinov2, or the path of an encoder.npz.
        height, width: of the frames.
        patch, channels: None: the encoder's own.
        model: the folder of a vae or dinov2.

    Raises:
        DataError: a kind there is not, a geometry it cannot have, or a model that cannot be loaded.
    """
    if name not in KINDS:
        encoder = load_encoder(Path(name))
        asked = {"height": height, "width": width, "patch": patch, "channels": channels}
        for key, value in asked.items():
            if value not in (None, getattr(encoder, key)):
                raise DataError(f"--{key} {value}: {name} was made with {getattr(encoder, key)}; pass that")
        return encoder
    if issubclass(KINDS[name], _ModelEncoder):
        return KINDS[name](height, width, patch, channels, model or "")
    if model:
        raise DataError(f"--model is for vae and dinov2, not for {name}")
    return KINDS[name](height, width, patch, channels)


def load_encoder(path: Path) -> Encoder:
    """The encoder of an encoder.npz.

    Raises:
        DataError: if it is not one, or its model cannot be loaded.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        settings = json.loads(str(arrays.pop("settings")))
        kind = KINDS[settings.pop("kind")]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(f"--encoder {path}: neither {', '.join(KINDS)} nor an encoder.npz ({error})") from None
    mean, std = arrays.pop("mean", None), arrays.pop("std", None)
    encoder = kind(**settings, **arrays)
    encoder.mean, encoder.std = mean, std
    return encoder
