"""Adapters that a run with LoRA leaves, loaded by peft and by diffusers: make test-interop."""

import sys
from pathlib import Path

import pytest
import torch
from training import config, make_data

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import convert

import train
from wan5b import fsdp
from wan5b.dit import DiTConfig, WanDiT
from wan5b.extras import formats
from wan5b.weights import save_dit

pytestmark = [pytest.mark.interop, pytest.mark.usefixtures("quick_and_clean")]

SIZES = DiTConfig(256, 192, 2, 2, text_dim=16, text_len=8, freq_dim=16)  # heads of 128


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base, and the folder of a run over it: alpha is not the rank."""
    folder = make_data(tmp_path_factory.mktemp("made"))
    base = WanDiT(SIZES).init_weights(torch.Generator().manual_seed(1))
    save_dit(base, folder / "base.safetensors", {})
    options = {"weights": str(folder / "base.safetensors"), "lora": 4, "lora_alpha": 6.0}
    cfg = config(folder, "ar", folder / "run", steps=2, lr=1e-2, **options)
    train.main(cfg, fsdp.World("cpu"))
    return folder


@torch.no_grad()
def velocity(model, *arguments, **options) -> torch.Tensor:
    v = model(*arguments, **options)
    return v[0] if isinstance(v, tuple) else v


@pytest.fixture
def inputs():
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(2, 48, 3, 4, 6, generator=draws)
    context = torch.randn(2, 8, 16, generator=draws)
    return x, torch.tensor([300.0, 700.0]), context


def ours(made, inputs) -> torch.Tensor:
    """Of the base with the adapter, as sample.py reads them, and of the merged export: alike."""
    x, timesteps, context = inputs
    base = made / "base.safetensors"
    model = formats.load_dit(base, loras=[(made / "run" / "ar-lora", 1.0)])
    v = velocity(model, x, timesteps / 1000, context)
    export = velocity(formats.load_dit(made / "run/ar.safetensors"), x, timesteps / 1000, context)
    assert torch.allclose(v, export, atol=1e-5)
    plain = velocity(formats.load_dit(base), x, timesteps / 1000, context)
    assert (v - plain).norm() / plain.norm() > 1e-2, "the adapter does nothing"
    return v


def test_peft(made, inputs, apart):
    """Its own class around our network: rank, alpha and layers as the folder's config says."""
    from peft import PeftModel

    x, timesteps, context = inputs
    base = formats.load_dit(made / "base.safetensors")
    theirs = PeftModel.from_pretrained(base, made / "run" / "ar-lora").eval()
    v = velocity(theirs, x, timesteps / 1000, context)
    apart("adapter by peft", ours(made, inputs), v)


def test_diffusers(made, inputs, apart):
    """Of the file for ComfyUI, by its own table of names, into its own model."""
    from diffusers import WanTransformer3DModel
    from diffusers.loaders.lora_pipeline import WanLoraLoaderMixin

    file = made / "comfy.safetensors"
    convert.main([str(made / "run/ar-lora"), str(file), "--layout", "comfy"])
    convert.main([str(made / "base.safetensors"), str(made / "theirs"), "--layout", "diffusers"])
    theirs = WanTransformer3DModel.from_pretrained(made / "theirs").eval()
    state = WanLoraLoaderMixin.lora_state_dict(str(file))
    theirs.load_lora_adapter(state, prefix="transformer")
    x, timesteps, context = inputs
    v = velocity(theirs, x, timesteps, context, return_dict=False)
    apart("adapter by diffusers", ours(made, inputs), v)
