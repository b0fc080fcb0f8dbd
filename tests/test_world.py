"""The tiny world: its clips, and that the codec keeps what matters."""

import pytest
import torch
from tiny import LABELS, make_codec, world


@pytest.fixture(scope="module")
def clips():
    return world.draw(LABELS, 33, seed=1)


@pytest.fixture(scope="module")
def codec():
    return make_codec()


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
