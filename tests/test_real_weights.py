"""A release folder, and upstream's code, against ours: for those who have them.

    WAN5B_RELEASE=/path/to/Wan2.2-TI2V-5B WAN5B_OFFICIAL=/path/to/Wan2.2 \\
        pytest -m weights tests/test_real_weights.py

WAN5B_OFFICIAL is a checkout of github.com/Wan-Video/Wan2.2, without which the last three tests are
skipped; they need its diffusers and transformers, too. All runs on the CPU: the real release takes
about 16 GB of memory, and 50 GB beside upstream's code in float32. A synthetic folder
(tests/release.py) runs the same lines at tiny widths.
"""

import importlib
import json
import math
import os
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from wan5b.dit import PRESETS
from wan5b.extras.formats import load_dit, load_t5, load_tokenizer, load_vae
from wan5b.t5 import T5Config
from wan5b.vae22 import LATENT_MEAN, LATENT_STD, VAEConfig

GOLDEN = Path(__file__).parent / "golden"
PROMPTS = ["Two cats in boxing gloves fight on a spotlighted stage.", "雨中的街道"]

pytestmark = pytest.mark.weights


def folder_named_by(variable):
    path = os.environ.get(variable)
    if not path or not Path(path).is_dir():
        pytest.skip(f"{variable} names no folder: {path}")
    return Path(path)


@pytest.fixture(scope="module")
def release():
    return folder_named_by("WAN5B_RELEASE")


@pytest.fixture(scope="module")
def official(release):
    """import_module of upstream's modules, with torch's attention for theirs, which needs a GPU."""
    folder = folder_named_by("WAN5B_OFFICIAL")
    # Empty packages: the real ones import every pipeline and what those need.
    for name in ("wan", "wan.modules"):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [str(folder.joinpath(*name.split(".")))]

    def attention(q, k, v, k_lens=None, window_size=(-1, -1)):
        assert k_lens is None or all(k_lens == k.shape[1]), "no padding here, so no mask"
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    importlib.import_module("wan.modules.model").flash_attention = attention
    yield importlib.import_module
    for name in [name for name in sys.modules if name.split(".")[0] == "wan"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def context(release):
    """Embeddings of PROMPTS, kept: so the encoder is gone before the DiT comes."""
    tokenizer = load_tokenizer(release)
    with torch.no_grad():
        return load_t5(release)(*tokenizer(PROMPTS)).float()


def natural_image(height=256, width=384):
    """Sky, hills, a sun and some texture, [1, 3, 1, H, W] in [-1, 1].

    It has smooth areas, edges and detail, as photographs have.
    """
    y = torch.linspace(0, 1, height)
    x = torch.linspace(0, 1.5, width)
    y, x = torch.meshgrid(y, x, indexing="ij")
    noise = torch.randn(1, 3, height // 4, width // 4, generator=torch.Generator().manual_seed(0))
    texture = F.interpolate(noise, (height, width), mode="bicubic")[0]
    sky = torch.stack([0.45 + 0.4 * y, 0.6 + 0.25 * y, 0.9 - 0.1 * y])
    image = sky + 0.01 * texture
    sun = torch.sigmoid((0.1 - ((x - 1.1) ** 2 + (y - 0.25) ** 2).sqrt()) * 60)
    yellow = torch.tensor([1.0, 0.93, 0.7]).view(3, 1, 1)
    image = torch.lerp(image, yellow.expand_as(image), sun)
    for level, colour in ((0.55, (0.35, 0.45, 0.4)), (0.75, (0.2, 0.35, 0.15))):
        ridge = level + 0.06 * torch.sin(7 * x / level) + 0.03 * torch.sin(23 * x)
        inside = torch.sigmoid((y - ridge) * 150)
        hill = torch.tensor(colour).view(3, 1, 1) * (1.2 - 0.5 * y) + 0.04 * texture
        image = torch.lerp(image, hill, inside)
    return (2 * image.clamp(0, 1) - 1)[None, :, None]


def psnr(x, reference):
    """Of pixels in [-1, 1], in dB."""
    return 10 * math.log10(4 / (x.clamp(-1, 1) - reference).square().mean().item())


def relative_error(x, reference):
    return ((x.float() - reference.float()).norm() / reference.float().norm()).item()


def assert_manifest(model, name):
    manifest = json.loads((GOLDEN / f"manifest_{name}.json").read_text())
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == manifest


def latents_and_levels(cfg):
    """Two frames of noise, the first at level 0 as an image is: x [1, C, 2, 4, 6], sigma [1, 2]."""
    x = torch.randn(1, cfg.in_dim, 2, 4, 6, generator=torch.Generator().manual_seed(0))
    return x, torch.tensor([[0.0, 0.625]])


def finite(model):
    return all(p.isfinite().all() for p in model.parameters())


# -------------------------------------------------------------------------------------------- alone


def test_text_encoder(release, context):
    t5 = load_t5(release)
    assert finite(t5)
    if t5.cfg == T5Config():
        assert_manifest(t5, "umt5-xxl")
    assert context.shape == (len(PROMPTS), 512, t5.cfg.dim)
    assert context.isfinite().all()
    assert context[:, 0].abs().sum(-1).all()
    assert not context[:, -1].any()


@torch.no_grad()
def test_dit(release, context):
    dit = load_dit(release, dtype=torch.bfloat16, channels=VAEConfig().z_dim)
    assert finite(dit)
    if dit.cfg.dim == PRESETS["ti2v-5B"].dim:
        assert dit.cfg == PRESETS["ti2v-5B"]
        assert_manifest(dit, "ti2v-5B")
    x, sigma = latents_and_levels(dit.cfg)
    v = dit(x, sigma, context[:1])
    assert v.shape == x.shape
    assert v.isfinite().all()
    assert not v.equal(dit(x, sigma, context[1:]))  # the prompt matters


def test_vae_round_trip(release):
    vae = load_vae(release)
    assert finite(vae)
    image = natural_image()
    latent = vae.encode(image)
    decoded = vae.decode(latent)
    assert decoded.shape == image.shape
    assert decoded.isfinite().all()
    quality = psnr(decoded, image)
    print(f"round trip {quality:.1f} dB, latent mean {latent.mean():.2f} std {latent.std():.2f}")
    if vae.cfg == VAEConfig():
        assert_manifest(vae, "vae22")
        assert quality > 30


# --------------------------------------------------------------------------- beside upstream's code


@torch.no_grad()
def test_dit_beside_upstream(release, official, context):
    ours = load_dit(release)
    cfg = ours.cfg
    keys = ["dim", "ffn_dim", "num_heads", "num_layers", "in_dim", "out_dim", "freq_dim"]
    keys += ["text_dim", "text_len", "model_type"]
    sizes = {key: getattr(cfg, key) for key in keys}
    theirs = official("wan.modules.model").WanModel(**sizes).eval()
    theirs.load_state_dict(ours.state_dict(), assign=True)
    x, sigma = latents_and_levels(cfg)
    tokens = cfg.tokens_per_frame(*x.shape[-2:])
    timesteps = (1000 * sigma).repeat_interleave(tokens, 1)  # [1, S]
    text = context[0][context[0].any(-1)]  # [L, text_dim], upstream pads it itself
    reference = theirs([x[0]], timesteps, [text], seq_len=timesteps.shape[1])[0]
    error = relative_error(ours(x, sigma, context[:1])[0], reference)
    print(f"DiT, relative error {error:.1e}")
    assert error < 1e-4


@torch.no_grad()
def test_vae_beside_upstream(release, official):
    ours = load_vae(release)
    cfg = ours.cfg
    sizes = {key: getattr(cfg, key) for key in ("dim", "dec_dim", "z_dim", "num_res_blocks")}
    lists = {"dim_mult": list(cfg.dim_mult), "temperal_downsample": list(cfg.temperal_downsample)}
    theirs = official("wan.modules.vae2_2").WanVAE_(**sizes, **lists).eval()
    theirs.load_state_dict(ours.state_dict())
    scale = [torch.tensor(LATENT_MEAN), 1 / torch.tensor(LATENT_STD)]
    fading = torch.linspace(1, 0.5, 9).view(1, 1, 9, 1, 1)
    video = natural_image(64, 96).expand(-1, -1, 9, -1, -1) * fading
    latent = theirs.encode(video, scale)
    encoded = relative_error(ours.encode(video), latent)
    decoded = relative_error(ours.decode(latent), theirs.decode(latent, scale))
    print(f"VAE, relative error: encode {encoded:.1e}, decode {decoded:.1e}")
    assert max(encoded, decoded) < 1e-4


@torch.no_grad()
def test_text_encoder_beside_upstream(release, official, monkeypatch):
    # Upstream asks for it when the module is imported.
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    ours = load_t5(release, dtype=torch.float32)
    keys = ["vocab", "dim", "dim_attn", "dim_ffn", "num_heads", "num_layers"]
    keys += ["num_buckets", "shared_pos"]
    sizes = {key: getattr(ours.cfg, key) for key in keys}
    theirs = official("wan.modules.t5").T5Encoder(**sizes, dropout=0.0).eval()
    theirs.load_state_dict(ours.state_dict(), assign=True)
    ids, mask = load_tokenizer(release)(PROMPTS)
    reference = theirs(ids, mask) * mask[..., None]  # upstream cuts the rows beyond the prompt off
    error = relative_error(ours(ids, mask), reference)
    print(f"T5, relative error {error:.1e}")
    assert error < 1e-4
