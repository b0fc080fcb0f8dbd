"""What we write, read by diffusers' and transformers' own classes, and what these write, by ours.

In a virtual environment that has them: make test-interop. No module here imports them at its top,
so `make test` collects it without.
"""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from common import GOLDEN
from release import random_weights
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import convert

from wan5b.distill import guided
from wan5b.dit import DiTConfig, WanDiT
from wan5b.extras import formats
from wan5b.extras.texts import encode_prompts
from wan5b.flow import solve
from wan5b.util import read_json
from wan5b.vae22 import LATENT_MEAN, LATENT_STD
from wan5b.weights import save_dit

pytestmark = pytest.mark.interop

FORMATS = GOLDEN / "formats"
COMFY = FORMATS / "comfy"
VECTORS = load_file(FORMATS / "vectors.safetensors")
PROMPTS = ["A red fox runs in deep snow.", "two cats sit on a wall &amp; look", "Ünïcode, ½ 狐狸"]
LORA = FORMATS / "lora" / "kijai_diff_fp16.safetensors"
FP16 = COMFY / "wan2.2_ti2v_5B_fp16.safetensors"
FP8 = COMFY / "Wan2_2-TI2V-5B_fp8_e4m3fn_scaled_KJ.safetensors"
WIDE = DiTConfig(256, 192, 2, 3, text_dim=24, freq_dim=64)  # heads of 128, as the released ones
FACTS = {"stage": "dmd", "levels": [1.0, 0.0], "shift": 3.0, "chunk": 3}


def run(source, target, layout, *options):
    convert.main([str(source), str(target), "--layout", layout, *map(str, options)])
    return target


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The original release as a pipeline folder of ours, in shards, and the tokenizer alone."""
    target = tmp_path_factory.mktemp("made") / "pipeline"
    return run(FORMATS / "original", target, "diffusers", "--shard-size", 0.0002)


def context():
    return torch.nn.functional.pad(VECTORS["t5.hidden"][:2], (0, 0, 0, 512 - 26))


@torch.no_grad()
def compare_dits(apart, what, ours, theirs):
    """One level for all frames, and a clean first frame, as for images."""
    x = VECTORS["dit.x"]
    shown = VECTORS["dit.timestep"]
    tokens = VECTORS["dit.timestep_tokens"]
    levels = tokens[:, ::6] / 1000  # of a frame of 6 tokens
    theirs = theirs.float().eval()
    v = ours(x, shown[:, None].expand(-1, 3) / 1000, context())
    apart(f"{what}: one level", v, theirs(x, shown, context(), return_dict=False)[0])
    v = ours(x, levels, context())
    apart(f"{what}: image first", v, theirs(x, tokens, context(), return_dict=False)[0])


# ------------------------------------------------------------------------------------ what we write

SOURCES = {
    "original": (FORMATS / "original", []),
    "original, in shards": (FORMATS / "original", ["--shard-size", 0.0001]),
    "ComfyUI fp16": (FP16, ["--dtype", "float32"]),
    "ComfyUI fp8 scaled": (FP8, ["--dtype", "float32"]),
    "original + LoRA": (FORMATS / "original", ["--lora", f"{LORA}:0.7"]),
}


@pytest.mark.parametrize("name", SOURCES)
def test_dit(name, apart, tmp_path):
    """Against our own reading of the source, not of what was written."""
    from diffusers import WanTransformer3DModel

    source, options = SOURCES[name]
    made = run(source, tmp_path / "made", "diffusers", *options)
    inside = made / "transformer" if (made / "transformer").exists() else made
    loras = [(LORA, 0.7)] if "LoRA" in name else []
    theirs = WanTransformer3DModel.from_pretrained(inside)
    compare_dits(apart, f"DiT from {name}", formats.load_dit(source, loras=loras), theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dit_of_an_export(dtype, apart, tmp_path):
    """What it says of itself is in the way of nobody."""
    from diffusers import WanTransformer3DModel

    export = tmp_path / "export.safetensors"
    save_dit(random_weights(WanDiT(WIDE), 1), export, FACTS, dtype=dtype)
    made = run(export, tmp_path / "made", "diffusers")
    assert formats.read_metadata(made) == FACTS
    theirs = WanTransformer3DModel.from_pretrained(made, torch_dtype=torch.float32)
    name = str(dtype).removeprefix("torch.")
    compare_dits(apart, f"DiT from an export, {name}", formats.load_dit(export), theirs)


def test_export_diffusers(apart, tmp_path):
    from diffusers import WanTransformer3DModel

    ours = random_weights(WanDiT(WIDE), 2)
    formats.export_diffusers(ours, tmp_path / "made", FACTS)
    theirs = WanTransformer3DModel.from_pretrained(tmp_path / "made")
    compare_dits(apart, "export_diffusers", ours, theirs)


@pytest.mark.parametrize("layout", ["original", "comfy"])
def test_dit_by_the_converter_of_diffusers(layout, apart, tmp_path):
    """Its own table, from upstream's names, on our files of upstream's names."""
    from diffusers import WanTransformer3DModel

    source = FORMATS / "diffusers" / "transformer"
    made = run(source, tmp_path / "made.safetensors", layout)
    file = made if made.is_file() else made / "diffusion_pytorch_model.safetensors"
    theirs = WanTransformer3DModel.from_single_file(str(file), config=str(source))
    ours = formats.load_dit(source)
    compare_dits(apart, f"DiT from diffusers through {layout}", ours, theirs)


@torch.no_grad()
def test_vae(folder, apart):
    from diffusers import AutoencoderKLWan

    theirs = AutoencoderKLWan.from_pretrained(folder / "vae").eval()
    ours = formats.load_vae(FORMATS / "original")
    mean, std = [torch.tensor(v).view(1, 48, 1, 1, 1) for v in (LATENT_MEAN, LATENT_STD)]
    latent = theirs.encode(VECTORS["vae.video"]).latent_dist.mode()
    apart("VAE encode", ours.encode(VECTORS["vae.video"]), (latent - mean) / std)
    decoded = theirs.decode(VECTORS["vae.z"] * std + mean, return_dict=False)[0]
    apart("VAE decode", ours.decode(VECTORS["vae.z"]), decoded)


@torch.no_grad()
@pytest.mark.parametrize("source", ["original", "umt5_xxl_fp8_e4m3fn_scaled"])
def test_t5(source, folder, apart, tmp_path):
    from transformers import UMT5EncoderModel

    made = folder
    origin = FORMATS / source
    if source != "original":
        origin = tmp_path / "comfy"
        origin.mkdir()
        for name in (source, FP16.stem, "wan2.2_vae"):
            (origin / f"{name}.safetensors").symlink_to(COMFY / f"{name}.safetensors")
        (origin / "config.json").symlink_to(COMFY / "config.json")
        made = run(origin, tmp_path / "made", "diffusers")
    theirs = UMT5EncoderModel.from_pretrained(made / "text_encoder", dtype=torch.float32).eval()
    # What we wrote, since float8 x scale was rounded to bfloat16 on the way.
    ours = formats.load_t5(origin if source == "original" else made, dtype=torch.float32)
    ids, mask = VECTORS["t5.ids"], VECTORS["t5.mask"]
    hidden = theirs(ids, attention_mask=mask).last_hidden_state * mask[..., None]
    apart(f"T5 from {source}", ours(ids, mask) * mask[..., None], hidden)


def test_tokenizer(folder):
    """Made by transformers from the spiece.model that we write."""
    from transformers import AutoTokenizer

    assert not (folder / "tokenizer" / "tokenizer.json").exists()
    theirs = AutoTokenizer.from_pretrained(folder / "tokenizer")
    ours = formats.load_tokenizer(FORMATS / "original")
    cleaned = [prompt.replace("&amp;", "&") for prompt in PROMPTS]
    found = theirs(cleaned, padding="max_length", max_length=512, truncation=True)
    ids, mask = ours(cleaned)
    assert found.input_ids == ids.tolist()
    assert found.attention_mask == mask.tolist()


@torch.no_grad()
def test_pipeline(folder, apart):
    """The whole of it, from the prompt to pixels, on the levels that their scheduler chooses."""
    from diffusers import WanPipeline

    pipe = WanPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.config.expand_timesteps
    options = {"height": 32, "width": 64, "num_frames": 9, "guidance_scale": 5.0}
    options |= {"num_inference_steps": 4, "prompt": PROMPTS[0], "negative_prompt": PROMPTS[1]}
    noise = VECTORS["pipe.noise"]
    theirs = pipe(**options, latents=noise.clone(), output_type="latent").frames
    frames = pipe(**options, latents=noise.clone(), output_type="np").frames

    model = formats.load_dit(folder)
    encoder = formats.load_t5(folder, dtype=torch.float32)
    both = encode_prompts(encoder, formats.load_tokenizer(folder), PROMPTS[:2])
    field = guided(model, 5.0)
    sigmas = [float(sigma) for sigma in pipe.scheduler.sigmas]
    ours = solve(lambda x, sigma: field(x, sigma, both), noise, sigmas, "unipc")
    apart("WanPipeline, 4 steps: latents", ours, theirs, 1e-3)
    apart("  the peers' own folder", VECTORS["pipe.t2v"], theirs, 1e-3)
    video = formats.load_vae(folder).decode(ours)[0].permute(1, 2, 3, 0).clamp(-1, 1)
    pixels = torch.from_numpy(np.asarray(frames))[0] * 2 - 1
    apart("WanPipeline, 4 steps: pixels", video, pixels, 1e-3)


# ---------------------------------------------------------------------------------- what they write


@pytest.mark.parametrize("shard", ["10GB", "1MB"])
def test_their_dit(shard, apart, tmp_path):
    from diffusers import WanTransformer3DModel

    torch.manual_seed(3)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 128, "ffn_dim": 192, "num_layers": 3}
    sizes |= {"in_channels": 48, "out_channels": 48, "text_dim": 24, "freq_dim": 64}
    theirs = WanTransformer3DModel(**sizes)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=shard)
    ours = formats.load_dit(tmp_path / "theirs")
    assert ours.cfg == WIDE
    compare_dits(apart, f"their save_pretrained, {shard}", ours, theirs)

    # There and back through our files: nothing of it changes.
    made = run(tmp_path / "theirs", tmp_path / "o", "original")
    back = run(made, tmp_path / "back", "diffusers")
    assert read_json(back / "config.json") == read_json(tmp_path / "theirs" / "config.json")
    again = WanTransformer3DModel.from_pretrained(back).state_dict()
    state = theirs.state_dict()
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())
