"""Every layout of one tiny model through the public loaders, against the peers' own outputs."""

import shutil

import pytest
import torch
from common import GOLDEN, rel
from safetensors.torch import load_file

import sample
from wan5b.extras.formats import load_dit, load_t5, load_tokenizer, load_vae

FORMATS = GOLDEN / "formats"
COMFY = FORMATS / "comfy"
VECTORS = load_file(FORMATS / "vectors.safetensors")


@torch.no_grad()
def velocity(model, batch=1):
    """v of one level at all frames; the text is zero behind the prompt, as 512 tokens."""
    hidden = VECTORS["t5.hidden"][:batch]
    context = torch.zeros(batch, model.cfg.text_len, hidden.shape[2])
    context[:, : hidden.shape[1]] = hidden
    sigma = VECTORS["dit.timestep"][:batch, None].expand(-1, 3) / 1000
    return model(VECTORS["dit.x"][:batch], sigma, context)


@pytest.mark.parametrize("name", ["original", "diffusers", "diffusers/transformer"])
def test_dit_folders(name):
    assert rel(velocity(load_dit(FORMATS / name), 2), VECTORS["dit.v_uniform"]) < 1e-5


@pytest.mark.parametrize(
    ("name", "vector"),
    [
        ("wan2.2_ti2v_5B_fp16", "comfy.dit_fp16"),
        ("Wan2_2-TI2V-5B_fp8_e4m3fn_scaled_KJ", "comfy.dit_fp8"),
    ],
)
def test_comfy_files(name, vector):
    model = load_dit(COMFY / f"{name}.safetensors")
    assert rel(velocity(model), VECTORS[f"{vector}.v_uniform"]) < 1e-5


@pytest.mark.parametrize("name", ["original", "diffusers", "diffusers/vae"])
def test_vae_folders(name):
    vae = load_vae(FORMATS / name)
    assert rel(vae.encode(VECTORS["vae.video"]), VECTORS["vae.latent"]) < 1e-5
    assert rel(vae.decode(VECTORS["vae.z"]), VECTORS["vae.decoded"]) < 1e-5


def test_comfy_vae_beside_the_original_files(tmp_path):
    """Folders that mix them work; the case of a file's name does not matter."""
    folder = tmp_path / "mixed"
    shutil.copytree(FORMATS / "original", folder)
    for file in folder.glob("*VAE*"):
        file.unlink()
    shutil.copy(COMFY / "wan2.2_vae.safetensors", folder)
    decoded = load_vae(folder).decode(VECTORS["vae.z"])
    assert rel(decoded[:, :, -4:], VECTORS["comfy.vae_fp16.decoded"]) < 1e-5
    assert load_dit(folder).cfg == load_dit(FORMATS / "original").cfg


@pytest.mark.parametrize("name", ["original", "diffusers"])
@torch.no_grad()
def test_text_folders(name):
    encoder = load_t5(FORMATS / name, dtype=torch.float32)
    hidden = encoder(VECTORS["t5.ids"], VECTORS["t5.mask"])
    assert rel(hidden, VECTORS["t5.hidden"]) < 1e-5
    assert load_tokenizer(FORMATS / name).model.vocab_size() == 520


@torch.no_grad()
def test_comfy_text_encoder_with_its_tokenizer(tmp_path):
    shutil.copy(COMFY / "umt5_xxl_fp16.safetensors", tmp_path)
    encoder = load_t5(tmp_path, dtype=torch.float32)
    assert encoder.cfg.vocab == 520
    same = load_tokenizer(FORMATS / "original")(["A red fox."])
    ours = load_tokenizer(tmp_path)(["A red fox."])
    assert all(torch.equal(a, b) for a, b in zip(ours, same, strict=True))


def test_what_is_there_under_another_name_is_still_named(tmp_path):
    with pytest.raises(ValueError, match="spiece.model"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="holds no weights .* download them"):
        load_dit(tmp_path)
    # The folder of a run holds what is to be named.
    for name in ("step-0000002", "step-0000004", "step-0000006.partial"):
        (tmp_path / name).mkdir()
    (tmp_path / "dmd.safetensors").touch()
    says = "holds no weights .*; of a run name its export or a checkpoint: "
    says += "dmd.safetensors, step-0000004$"
    with pytest.raises(ValueError, match=says):
        load_dit(tmp_path)


def test_loras_are_merged_while_loading():
    """Through the loader as by hand; strength 0 is the base."""
    base = load_dit(FORMATS / "original")
    file = FORMATS / "lora" / "kijai_diff_fp16.safetensors"
    merged = load_dit(FORMATS / "original", loras=[(file, 1.0)])
    same = load_dit(FORMATS / "original", loras=[(file, 0.0)])
    changed = 0
    for name, value in base.state_dict().items():
        assert torch.equal(same.state_dict()[name], value), name
        changed += not torch.equal(merged.state_dict()[name], value)
    assert changed > 60
    twice = load_dit(FORMATS / "original", loras=[(file, 0.5), (file, 0.5)])
    for name, value in merged.state_dict().items():
        assert torch.allclose(twice.state_dict()[name], value, atol=1e-6), name


def test_a_lora_from_the_command_line(tmp_path, capsys):
    options = ["--release", str(FORMATS / "original"), "--device", "cpu", "--size", "32x32"]
    options += ["--frames", "9", "--prompt", "A red fox.", "--latents", "--mode", "few"]
    file = FORMATS / "lora" / "kijai_diff_fp16.safetensors"
    made = {}
    for name, lora in (("base", []), ("zero", [f"{file}:0"]), ("one", [str(file)])):
        out = ["--out", str(tmp_path / name)]
        sample.main(sample.parse([*options, *out, *(["--lora", *lora] if lora else [])]))
        made[name] = load_file(tmp_path / f"{name}.safetensors")["latents"]
    assert torch.equal(made["zero"], made["base"])
    assert rel(made["one"], made["base"]) > 1e-3
    with pytest.raises(ValueError, match=r"--lora .*:x: 'x' is no strength"):
        sample.main(sample.parse([*options, "--out", str(tmp_path / "x"), "--lora", f"{file}:x"]))
