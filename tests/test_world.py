"""The tiny world: the codec keeps what matters, the scorer tells true clips from broken ones."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from wan5b.extras.codec import LinearCodec
from wan5b.flow import add_noise
from wan5b.vae22 import VAEConfig

sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "tiny"))
import world  # noqa: E402

LABELS = world.LABELS[::3]
CHUNKS = world.pixel_chunks([3, 3, 3])


@pytest.fixture(scope="module")
def clips():
    return world.draw(LABELS, 33, seed=1)


@pytest.fixture(scope="module")
def codec():
    codec = LinearCodec(VAEConfig())
    codec.load_state_dict(dict(zip(("basis", "dual"), world.codec_basis(), strict=True)))
    return codec


def judge(video, labels=LABELS):
    return world.summary(world.score(video, labels, CHUNKS))


def other(**change):
    """The labels with one word replaced by another one of its kind."""
    ((key, words),) = change.items()
    changed = []
    for label in LABELS:
        place = words.index(getattr(label, key))
        changed.append(replace(label, **{key: words[place - 1]}))
    return changed


def test_captions():
    assert len({str(label) for label in world.LABELS}) == 48
    assert all(world.label_of(str(label)) == label for label in world.LABELS)
    assert str(world.LABELS[0]) == "a red square moves left"


def test_clips(clips):
    assert clips.shape == (16, 3, 33, 64, 64)
    assert clips.abs().max() <= 1
    assert torch.equal(clips, world.draw(LABELS, 33, seed=1))
    assert not torch.equal(clips, world.draw(LABELS, 33, seed=2))
    longer = world.draw(LABELS, 105, seed=1)
    assert torch.equal(longer[:, :, :33], clips), "a longer clip goes on from a shorter one"


def test_codec_geometry(clips, codec):
    latent = codec.encode(clips)
    assert latent.shape == (16, codec.cfg.z_dim, 9, 4, 4)
    assert codec.decode(latent).shape == clips.shape
    assert 0.5 < latent.std() < 1


def test_codec_is_a_projection(clips, codec):
    """Decoding and encoding changes nothing but the first latent, which keeps a single frame."""
    latent = codec.encode(clips)
    again = codec.encode(codec.decode(latent))
    torch.testing.assert_close(again, latent, atol=2e-4, rtol=0)
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(0))
    again = codec.encode(codec.decode(noise))
    torch.testing.assert_close(again[:, :, 1:], noise[:, :, 1:], atol=2e-4, rtol=0)


def test_codec_streams(clips, codec):
    latent = codec.encode(clips)
    state = codec.stream()
    chunks = [codec.decode_chunk(chunk, state) for chunk in latent.split([1, 3, 5], dim=2)]
    torch.testing.assert_close(torch.cat(chunks, 2), codec.decode(latent))


def test_codec_refuses(codec):
    with pytest.raises(ValueError, match="4k"):
        codec.encode(torch.zeros(1, 3, 32, 64, 64))


def test_codec_quality(clips, codec):
    error = (codec.decode(codec.encode(clips)) - clips).square().mean()
    assert 10 * torch.log10(4 / error) > 29


def test_true_clips_score_one(clips, codec):
    right = {"colour": 1, "shape": 1, "direction": 1}
    still = {"area_change": pytest.approx(0, abs=0.02)}
    assert judge(clips) == {**right, **still}
    assert judge(codec.decode(codec.encode(clips))) == {**right, **still}


def test_noise_does_not_hide_a_true_clip(clips, codec):
    noise = torch.randn(16, 48, 9, 4, 4, generator=torch.Generator().manual_seed(0))
    noisy = judge(codec.decode(add_noise(codec.encode(clips), noise, 0.1)))
    assert min(noisy[key] for key in ("colour", "shape", "direction")) == 1


@pytest.mark.parametrize("key", ["colour", "shape", "direction"])
def test_a_wrong_word_is_seen(clips, key):
    words = {"colour": world.COLOURS, "shape": world.SHAPES, "direction": world.DIRECTIONS}
    words = {key: list(known) for key, known in words.items()}
    wrong = judge(clips, other(**{key: words[key]}))
    assert {k: wrong[k] for k in words} == {k: float(k != key) for k in words}


def test_broken_clips(clips):
    frozen = judge(clips[:, :, :1].expand_as(clips))
    assert (frozen["colour"], frozen["shape"], frozen["direction"]) == (1, 1, 0)
    backwards = judge(clips.flip(2))
    assert (backwards["shape"], backwards["direction"]) == (1, 0)
    grey = judge(torch.zeros_like(clips))
    assert (grey["colour"], grey["shape"], grey["direction"]) == (0, 0, 0)
    noise = torch.randn(clips.shape, generator=torch.Generator().manual_seed(0))
    assert max(judge(0.5 * noise)[key] for key in ("colour", "shape", "direction")) < 0.1


def test_drift_is_measured(clips):
    fading = clips * torch.linspace(1, 0.3, 33)[:, None, None]
    assert judge(fading)["area_change"] > 0.3
    growing = clips.clone()
    end = growing[:, :, 21:]
    wider = torch.nn.functional.max_pool3d(end.abs(), (1, 3, 3), 1, (0, 1, 1))
    growing[:, :, 21:] = wider.copysign(end)
    assert judge(growing)["area_change"] > 0.05
