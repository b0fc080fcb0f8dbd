"""The VAE against the reference's vectors (float32), its chunkings against each other (float64)."""

import copy
import json
from pathlib import Path

import pytest
import torch
from common import gpu
from safetensors import safe_open

from wan5b import vae22
from wan5b.extras.codec import LinearCodec
from wan5b.vae22 import LATENT_MEAN, LATENT_STD, VAE22, VAEConfig

GOLDEN = Path(__file__).parent / "golden"


def rel(a, b):
    """||a - b|| / ||b||"""
    assert a.shape == b.shape
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.fixture(scope="module")
def golden():
    with safe_open(GOLDEN / "vae.safetensors", "pt") as f:
        return json.loads(f.metadata()["config"]), {key: f.get_tensor(key) for key in f.keys()}


@pytest.fixture
def released(golden):
    """The golden's narrow VAE with its weights."""
    config, tensors = golden
    vae = VAE22(VAEConfig(**config))
    weights = {key[2:]: t for key, t in tensors.items() if key.startswith("w.")}
    vae.load_state_dict(weights, strict=True)
    return vae


@pytest.fixture(scope="module")
def vae():
    """A random VAE of other widths. In float64 only a wrong frame makes two chunkings differ."""
    torch.manual_seed(0)
    vae = VAE22(VAEConfig(dim=8, dec_dim=4)).double()
    for name, p in vae.named_parameters():
        if name.endswith("gamma"):
            torch.nn.init.uniform_(p, 0.5, 1.5)
    return vae


def decode_in(vae, latent, sizes):
    state = vae.stream()
    chunks = [vae.decode_chunk(chunk, state) for chunk in latent.split(sizes, dim=2)]
    return torch.cat(chunks, dim=2)


def golden_errors(vae, tensors):
    """Relative errors of encode and decode, of a video and of an image."""
    device = vae.conv1.weight.device
    video, z = tensors["in.video"].to(device), tensors["in.z"].to(device)
    return {
        "latent": rel(vae.encode(video).cpu(), tensors["out.latent"]),
        "latent_image": rel(vae.encode(video[:, :, :1]).cpu(), tensors["out.latent_image"]),
        "video": rel(vae.decode(z).float().cpu(), tensors["out.video"]),
        "image": rel(vae.decode(z[:, :, :1]).float().cpu(), tensors["out.image"]),
    }


def test_golden(golden, released):
    errors = golden_errors(released, golden[1])
    print(errors)
    assert max(errors.values()) < 1e-5


def test_golden_after_assign(golden):
    """Weights assigned, as by the loader, rather than copied are contiguous; same result."""
    config, tensors = golden
    with torch.device("meta"):
        vae = VAE22(VAEConfig(**config))
    weights = {key[2:]: t.clone() for key, t in tensors.items() if key.startswith("w.")}
    vae.load_state_dict(weights, strict=True, assign=True)
    assert max(golden_errors(vae, tensors).values()) < 1e-5
    assert vae.decoder.conv1.weight.is_contiguous(memory_format=torch.channels_last_3d)
    assert all(torch.equal(t, weights[key]) for key, t in vae.state_dict().items())


def test_statistics(golden):
    mean, inv_std = golden[1]["out.mean"].flatten(), golden[1]["out.inv_std"].flatten()
    torch.testing.assert_close(torch.tensor(LATENT_MEAN), mean, rtol=0, atol=1e-6)
    torch.testing.assert_close(1 / torch.tensor(LATENT_STD), inv_std, rtol=1e-6, atol=0)


def test_manifest():
    """Exactly the keys and shapes of the release, in its order."""
    with torch.device("meta"):
        vae = VAE22(VAEConfig())
    manifest = json.loads((GOLDEN / "manifest_vae22.json").read_text())
    assert len(manifest) == 196
    assert {key: list(t.shape) for key, t in vae.state_dict().items()} == manifest


def test_strides():
    assert VAEConfig().strides == (4, 16, 16)
    other = VAEConfig(dim_mult=[1, 2, 2], temperal_downsample=[False, True])
    assert other.strides == (2, 8, 8)


@pytest.mark.parametrize("sizes", [[1] * 7, [3, 3, 1], [1, 2, 4], [2, 5], [7]], ids=str)
def test_decode_chunkings(vae, sizes):
    latent = torch.randn(1, 48, 7, 2, 3, generator=torch.Generator().manual_seed(1))
    video = vae.decode(latent)
    assert video.shape == (1, 3, 25, 32, 48)
    assert rel(decode_in(vae, latent, sizes), video) < 1e-12


@pytest.mark.parametrize("frames", [1, 5, 17, 33])
def test_encode_chunkings(vae, monkeypatch, frames):
    """One latent frame at a time, the definition; the chunks that we take; everything at once."""
    video = torch.rand(1, 3, frames, 32, 48, generator=torch.Generator().manual_seed(2)) * 2 - 1
    latent = vae.encode(video)
    assert latent.shape == (1, 48, 1 + (frames - 1) // 4, 2, 3)
    for chunk in (1, 3, 100):
        monkeypatch.setattr(vae22, "ENCODE_FRAMES", chunk)
        assert rel(vae.encode(video), latent) < 1e-6
        monkeypatch.undo()


def test_the_widest_layers_take_few_frames(vae):
    """What bounds the memory of decoding: the last two stages get WIDE_FRAMES frames at most.

    Those before get whole chunks.
    """
    stages = list(vae.decoder["upsamples"])[-3:]
    frames = {stage: [] for stage in stages}

    def see(stage, args):
        frames[stage].append(args[0].shape[1])

    hooks = [stage.register_forward_pre_hook(see) for stage in stages]
    vae.decode(torch.randn(1, 48, 6, 2, 2, generator=torch.Generator().manual_seed(6)))
    for hook in hooks:
        hook.remove()
    assert list(frames.values()) == [[5, 6], [6, 3, 6, 6], [6, 3, 6, 6]]


def test_streams_are_independent(vae):
    """Two videos decoded chunk by chunk in turn, and in between one whole: no module keeps any."""
    a, b = torch.randn(2, 1, 48, 4, 2, 2, generator=torch.Generator().manual_seed(3))
    state_a, state_b = vae.stream(), vae.stream()
    pixels_a, pixels_b = [], []
    for i in range(4):
        pixels_a.append(vae.decode_chunk(a[:, :, i : i + 1], state_a))
        vae.decode(b)
        pixels_b.append(vae.decode_chunk(b[:, :, i : i + 1], state_b))
    assert not state_a.first
    assert not state_b.first
    assert rel(torch.cat(pixels_a, 2), vae.decode(a)) < 1e-12
    assert rel(torch.cat(pixels_b, 2), vae.decode(b)) < 1e-12


def test_state_is_bounded(vae):
    """The state's size, storage included, does not grow with the frames seen."""

    def size(frames):
        state = vae.stream()
        vae.decode_chunk(torch.zeros(1, 48, frames, 2, 2), state)
        return sum(t.untyped_storage().nbytes() for t in state.history.values())

    assert size(3) == size(6)


def test_causality(vae):
    g = torch.Generator().manual_seed(4)
    video = torch.rand(1, 3, 13, 32, 32, generator=g) * 2 - 1
    latent = torch.randn(1, 48, 4, 2, 2, generator=g)
    changed_video, changed_latent = video.clone(), latent.clone()
    changed_video[:, :, 6:] *= -1  # pixel frames 5 to 8 make latent frame 2
    changed_latent[:, :, 2:] *= -1
    before, after = vae.encode(video), vae.encode(changed_video)
    assert rel(after[:, :, :2], before[:, :, :2]) < 1e-6
    assert rel(after[:, :, 2], before[:, :, 2]) > 1e-3
    before, after = vae.decode(latent), vae.decode(changed_latent)
    assert rel(after[:, :, :5], before[:, :, :5]) < 1e-6
    assert rel(after[:, :, 5], before[:, :, 5]) > 1e-3


def test_batch(vae):
    """A batch of two is two singles."""
    g = torch.Generator().manual_seed(5)
    video = torch.rand(2, 3, 9, 32, 32, generator=g) * 2 - 1
    latent = torch.randn(2, 48, 3, 2, 2, generator=g)
    assert rel(vae.encode(video), torch.cat([vae.encode(v[None]) for v in video])) < 1e-6
    assert rel(vae.decode(latent), torch.cat([vae.decode(z[None]) for z in latent])) < 1e-12


def test_dtypes(golden, released):
    """Pixels come in the weights' dtype, latents in float32; nothing carries grad."""
    errors = golden_errors(released.bfloat16(), golden[1])
    print(errors)
    assert max(errors.values()) < 3e-2
    latent = released.encode(golden[1]["in.video"])
    assert latent.dtype == torch.float32
    video = released.decode(latent)
    assert video.dtype == torch.bfloat16
    assert not video.requires_grad


def test_user_errors(vae):
    def video(C=3, T=5, H=32, W=32):
        return torch.zeros(1, C, T, H, W)

    for T, nearest in [(8, "5 or 9"), (3, "1 or 5"), (0, "1 or 5")]:
        with pytest.raises(ValueError, match=f"frame count {T} .*nearest: {nearest}$"):
            vae.encode(video(T=T))
    with pytest.raises(ValueError, match="height 40 .*32 or 48"):
        vae.encode(video(H=40))
    with pytest.raises(ValueError, match="width 15 .*: 16"):
        vae.encode(video(W=15))
    with pytest.raises(ValueError, match=r"\[B, 3, T, H, W\] .*got \[1, 4, 5, 32, 32\]"):
        vae.encode(video(C=4))
    with pytest.raises(ValueError, match=r"\[-1, 1\].*uint8"):  # 0 to 255 would be far too bright
        vae.encode(video().byte())
    for method in (vae.decode, lambda z: vae.decode_chunk(z, vae.stream())):
        for shape in [(1, 16, 3, 2, 2), (48, 3, 2, 2), (1, 48, 0, 2, 2)]:
            with pytest.raises(ValueError, match=r"\[B, 48, T, H, W\]"):
                method(torch.zeros(shape))


@pytest.fixture(scope="module")
def codec():
    """A linear codec of a random basis and the dual that gives the nearest video, in float64."""
    codec = LinearCodec(VAEConfig())
    g = torch.Generator().manual_seed(6)
    basis = torch.randn(16, 4 * 16 * 16, generator=g, dtype=torch.float64)
    dual = basis.pinverse().T
    shape = (16, 1, 4, 16, 16)
    codec.load_state_dict({"basis": basis.view(shape), "dual": dual.view(shape)})
    return codec.double()


def test_linear_codec(codec):
    """Patch by patch, as a matrix product; the first frame is a patch of its repetitions."""
    g = torch.Generator().manual_seed(7)
    video = torch.rand(2, 3, 9, 32, 48, generator=g) * 2 - 1
    latent = torch.randn(2, 48, 3, 2, 3, generator=g)
    repeated = torch.cat([video[:, :, :1].repeat(1, 1, 3, 1, 1), video], 2)
    patches = repeated.view(2, 3, 3, 4, 2, 16, 3, 16).double()
    z = torch.einsum("bcnthywx,ktyx->bcknhw", patches, codec.basis[:, 0]).flatten(1, 2)
    assert rel(codec.encode(video), z) < 1e-6
    assert rel(codec.encode(video[:, :, :1]), z[:, :, :1]) < 1e-6
    z = latent.view(2, 3, 16, 3, 2, 3).double()
    pixels = torch.einsum("bcknhw,ktyx->bcnthywx", z, codec.dual[:, 0]).reshape(2, 3, 12, 32, 48)
    pixels = torch.cat([pixels[:, :, :4].mean(2, keepdim=True), pixels[:, :, 4:]], 2)
    assert rel(codec.decode(latent), pixels) < 1e-12
    assert rel(codec.encode(codec.decode(latent))[:, :, 1:], latent[:, :, 1:]) < 1e-6
    for sizes in ([1, 1, 1], [2, 1], [1, 2]):
        assert rel(decode_in(codec, latent, sizes), pixels) < 1e-12


def test_linear_codec_dtypes(codec):
    codec = copy.deepcopy(codec).bfloat16()
    latent = codec.encode(torch.zeros(1, 3, 5, 32, 32))
    video = codec.decode(latent)
    assert (latent.dtype, video.dtype) == (torch.float32, torch.bfloat16)
    assert not latent.requires_grad
    assert not video.requires_grad


def test_linear_codec_refuses_what_the_vae_refuses(codec):
    with pytest.raises(ValueError, match="frame count 8 .*5 or 9"):
        codec.encode(torch.zeros(1, 3, 8, 32, 32))
    with pytest.raises(ValueError, match="height 40 .*32 or 48"):
        codec.encode(torch.zeros(1, 3, 5, 40, 32))


@gpu
@pytest.mark.parametrize(("dtype", "bar"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)], ids=str)
def test_golden_cuda(golden, released, dtype, bar):
    vae = released.to("cuda", dtype)
    errors = golden_errors(vae, golden[1])
    print(errors)
    assert max(errors.values()) < bar
    assert vae.decoder.conv1.weight.is_contiguous(memory_format=torch.channels_last_3d)
