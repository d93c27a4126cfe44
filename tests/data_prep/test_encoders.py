"""Frozen encoders: what they keep of frames, and files that say all of them."""

import sys

import numpy as np
import pytest

from ebt_megatron.core.errors import DataError
from ebt_megatron.data_prep.encoders import frames_of, load_encoder, new_encoder, patches_of
from tests.data_prep.media import moving_square, psnr

FRAMES = moving_square(12, seed=3)


def normalised(encoder, frames):
    """The encoder with the mean and standard deviation of frames."""
    latents = encoder.encode(frames).reshape(-1, encoder.channels).astype(np.float64)
    encoder.normalise_by(latents.mean(0), latents.std(0))
    return encoder


def fitted_pca(frames=FRAMES, **options):
    encoder = new_encoder("pca", 48, 64, **options)
    encoder.fit(frames)
    return normalised(encoder, frames)


def test_patches_are_taken_row_by_row_and_put_back():
    patches = patches_of(FRAMES, 8)
    assert patches.shape == (12, 6 * 8, 192)
    assert (patches[5, 9].reshape(8, 8, 3) == FRAMES[5, 8:16, 8:16]).all()
    assert (frames_of(patches, 48, 64, 8) == FRAMES).all()


def test_pixels_come_back_exactly_from_float16():
    encoder = normalised(new_encoder("pixels", 48, 64, 4), FRAMES)
    samples = encoder.to_samples(encoder.encode(FRAMES))
    assert samples.dtype == np.float16 and samples.shape == (12, 192, 48)
    assert (encoder.to_frames(samples) == FRAMES).all()


def test_samples_have_mean_zero_and_deviation_one():
    encoder = fitted_pca()
    samples = encoder.to_samples(encoder.encode(FRAMES)).reshape(-1, 16).astype(np.float64)
    assert np.abs(samples.mean(0)).max() < 1e-3 and np.abs(samples.std(0) - 1).max() < 1e-3


def test_a_channel_that_never_varies_stays_finite():
    encoder = normalised(new_encoder("pixels", 16, 16, 8), np.full((4, 16, 16, 3), 7, np.uint8))
    assert np.isfinite(encoder.to_samples(encoder.encode(np.full((4, 16, 16, 3), 255, np.uint8)))).all()


def test_pca_keeps_frames_it_was_not_fitted_on():
    held_out = moving_square(12, seed=3)[:, ::-1, ::-1]
    quality = []
    for channels in (4, 16, 64):
        encoder = fitted_pca(channels=channels)
        quality.append(psnr(encoder.to_frames(encoder.to_samples(encoder.encode(held_out))), held_out))
    assert quality == sorted(quality) and quality[1] > 25


def test_pca_of_all_components_loses_nothing():
    encoder = fitted_pca(patch=2, channels=12)
    assert (encoder.to_frames(encoder.to_samples(encoder.encode(FRAMES))) == FRAMES).all()


def test_the_same_encoder_is_the_same_file_and_comes_back(tmp_path):
    encoder = fitted_pca()
    encoder.save(tmp_path / "a.npz")
    fitted_pca(FRAMES[::-1].copy()).save(tmp_path / "b.npz")  # sums of integers: the order of frames is nothing
    loaded = load_encoder(tmp_path / "a.npz")
    loaded.save(tmp_path / "c.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "c.npz").read_bytes()
    assert (load_encoder(tmp_path / "b.npz").components == encoder.components).all()
    assert (loaded.to_samples(loaded.encode(FRAMES)) == encoder.to_samples(encoder.encode(FRAMES))).all()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("pixels", 48, 60), "cannot be cut into patches of 8 x 8"),
        (("pixels", 48, 64, 8, 16), "leave --channels out"),
        (("pca", 48, 64, 2, 13), "only 12 principal components"),
        (("jpeg", 48, 64), "--encoder jpeg: neither pixels, pca, vae, dinov2 nor an encoder.npz"),
        (("pca", 48, 64, None, None, "model"), "--model is for vae and dinov2"),
        (("vae", 48, 64), "a vae encoder needs a folder saved by diffusers"),
        (("dinov2", 48, 64, None, None, "/nowhere"), "'/nowhere': no config.json there"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(arguments, said):
    with pytest.raises(DataError) as error:
        new_encoder(*arguments)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_is_no_encoder(tmp_path):
    (tmp_path / "encoder.npz").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(DataError, match=r"encoder.npz"):
        new_encoder(str(tmp_path / "encoder.npz"), 48, 64)


def test_an_encoder_of_other_geometry_is_refused(tmp_path):
    fitted_pca().save(tmp_path / "encoder.npz")
    with pytest.raises(DataError, match=r"--height 64.*was made with 48"):
        new_encoder(str(tmp_path / "encoder.npz"), 64, 64)


@pytest.mark.parametrize(("kind", "package"), [("vae", "diffusers"), ("dinov2", "transformers")])
def test_a_missing_package_is_named(tmp_path, monkeypatch, kind, package):
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DataError, match=rf"{tmp_path}.*pip install {package}"):
        new_encoder(kind, 48, 64, model=str(tmp_path))


def test_a_vae_of_diffusers(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    blocks = ["DownEncoderBlock2D"] * 2, ["UpDecoderBlock2D"] * 2
    model = diffusers.AutoencoderKL(3, 3, *blocks, block_out_channels=(8, 16), norm_num_groups=4, latent_channels=4)
    model.save_pretrained(tmp_path / "vae")
    encoder = normalised(new_encoder("vae", 48, 64, model=str(tmp_path / "vae")), FRAMES)
    assert encoder.shape == [24 * 32, 4]
    latents = encoder.encode(FRAMES)
    assert latents.dtype == np.float32 and latents.shape == (12, 24 * 32, 4)
    assert encoder.decode(latents).shape == FRAMES.shape
    coarse = new_encoder("vae", 48, 64, 4, model=str(tmp_path / "vae"))
    assert coarse.encode(FRAMES).shape == (12, 12 * 16, 16)
    assert (coarse.decode(coarse.encode(FRAMES)) == encoder.decode(latents)).all()
    encoder.save(tmp_path / "encoder.npz")
    assert (load_encoder(tmp_path / "encoder.npz").encode(FRAMES) == latents).all()


def test_a_dinov2_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, patch_size=8, image_size=64
    )
    transformers.Dinov2Model(config).save_pretrained(tmp_path / "dino")
    encoder = new_encoder("dinov2", 48, 64, model=str(tmp_path / "dino"))
    latents = encoder.encode(FRAMES)
    assert latents.dtype == np.float32 and list(latents.shape[1:]) == encoder.shape == [48, 24]
    with pytest.raises(DataError, match="no decoder"):
        encoder.decode(latents)
