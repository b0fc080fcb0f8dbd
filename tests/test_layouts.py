"""Other people's names, sizes and quantisation against the real checkpoints' keys and the peers'
own outputs.
"""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from common import GOLDEN, rel
from safetensors.torch import load_file

from wan5b.dit import DiTConfig, WanDiT
from wan5b.extras import layouts
from wan5b.extras.refusals import refuse_file, refuse_held, refuse_sizes
from wan5b.extras.scaled import Made
from wan5b.t5 import T5Config, T5Encoder, Tokenizer
from wan5b.vae22 import VAE22, VAEConfig
from wan5b.weights import (
    T5_AXES,
    VAE_AXES,
    Source,
    blank,
    dit_config,
    fill,
    open_tensors,
    read_json,
    sizes,
)

FORMATS = GOLDEN / "formats"
VECTORS = load_file(FORMATS / "vectors.safetensors")
MANIFESTS = {"dit": "ti2v-5B", "vae": "vae22", "t5": "umt5-xxl"}
HERE = Path("x.safetensors")


def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, device="meta", dtype=dtype)


def manifest(kind):
    shapes = json.loads((GOLDEN / f"manifest_{MANIFESTS[kind]}.json").read_text())
    return {name: meta(*shape) for name, shape in shapes.items()}


# ---------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(("kind", "count"), [("dit", 825), ("vae", 196), ("t5", 242)])
def test_every_key_of_the_release_maps_there_and_back(kind, count):
    ours = manifest(kind)
    there = layouts.names(kind, back=True)
    theirs = {there(name): tensor for name, tensor in ours.items()}
    assert len(theirs) == len(ours) == count
    assert None not in theirs
    assert layouts.foreign(kind, theirs)
    assert not layouts.foreign(kind, ours)
    assert layouts.upstream(HERE, kind, theirs) == ours
    assert layouts.upstream(HERE, kind, ours) == ours


@pytest.mark.parametrize(
    ("kind", "folder"), [("dit", "transformer"), ("vae", "vae"), ("t5", "text_encoder")]
)
def test_names_of_a_pipeline_folder(kind, folder):
    [file] = [*(FORMATS / "diffusers" / folder).glob("*.index.json")] or [
        FORMATS / "diffusers" / folder / "diffusion_pytorch_model.safetensors"
    ]
    theirs = open_tensors(file).tensors
    ours = layouts.upstream(file, kind, theirs)
    assert len(ours) == len(theirs)
    back = layouts.names(kind, back=True)
    assert {back(name) for name in ours} == theirs.keys()


def test_names_are_matched_as_a_whole():
    there = layouts.names("dit")
    assert there("blocks.12.norm2.bias") == "blocks.12.norm3.bias"
    for name in ("blocks.x.norm2.bias", "blocks.1.norm3.bias", "a.proj_out.bias", "proj_out.biasx"):
        assert there(name) is None
    vae = layouts.names("vae", back=True, num_res_blocks=3)
    assert vae("encoder.downsamples.0.downsamples.3.time_conv.bias").endswith(
        "sampler.time_conv.bias"
    )
    assert vae("encoder.downsamples.0.downsamples.2.time_conv.bias") is None


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model.", "model.", ""])
def test_prefixes(prefix):
    ours = manifest("dit")
    assert layouts.upstream(HERE, "dit", {prefix + k: v for k, v in ours.items()}) == ours


def test_a_full_checkpoint_holds_all_three():
    prefixes = {"dit": "model.diffusion_model.", "vae": "vae."}
    prefixes["t5"] = "text_encoders.umt5xxl.transformer."
    whole = {"text_encoders.spiece_model": torch.tensor([1, 2], dtype=torch.uint8)}
    for kind, prefix in prefixes.items():
        back = layouts.names(kind, back=True)
        for name, tensor in manifest(kind).items():
            whole[prefix + (back(name) if kind == "t5" else name)] = tensor
    for kind in prefixes:
        found = layouts.upstream(HERE, kind, whole)
        expected = {name: tensor.shape for name, tensor in manifest(kind).items()}
        assert {name: tensor.shape for name, tensor in found.items()} == expected
    assert layouts.tokenizer_bytes(whole) == b"\1\2"


def test_two_embeddings():
    one, two = layouts.EMBEDDINGS
    tensors = {one: torch.ones(3, 2), two: torch.ones(3, 2)}
    assert list(layouts.upstream(HERE, "t5", tensors)) == ["token_embedding.weight"]
    assert list(layouts.upstream(HERE, "t5", {two: tensors[two]})) == ["token_embedding.weight"]
    tensors[two] = torch.zeros(3, 2)
    with pytest.raises(ValueError, match="two embeddings"):
        layouts.upstream(HERE, "t5", tensors)


def test_strange_keys():
    tensors = {"proj_out.weight": meta(2, 2), "proj_out.odd": meta(2), "rope.freqs_cos": meta(2)}
    with pytest.raises(ValueError, match=r"1 keys that its layout hasn't \(proj_out.odd\)"):
        layouts.upstream(HERE, "dit", tensors)
    with pytest.raises(ValueError, match="only by a wrapper's prefix"):
        layouts.upstream(HERE, "dit", {"a.w": meta(2), "_orig_mod.a.w": meta(2)})


# ---------------------------------------------------------------------------------------- float8

FP8 = torch.tensor([[1.0, -2.0], [0.5, 4.0]]).to(torch.float8_e4m3fn)


def quant(form):
    text = json.dumps({"format": form}).encode()
    return torch.tensor(list(text), dtype=torch.uint8)


@pytest.mark.parametrize("ending", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("scale", [3.0, [3.0], [[3.0], [5.0]]])
def test_scaled_float8(ending, scale):
    scale = torch.tensor(scale)
    tensors = {
        "a.weight": FP8,
        f"a.{ending}": scale,
        "a.bias": torch.ones(2),
        "scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn),
        "a.scale_input": torch.ones(()),
        "a.input_scale": torch.ones(()),
        "a.comfy_quant": quant("float8_e4m3fn"),
    }
    header = {"_quantization_metadata": '{"layers": {"a": {"format": "float8_e4m3fn"}}}'}
    found = layouts.upstream(HERE, "dit", tensors, header)
    assert found.keys() == {"a.weight", "a.bias"}
    expected = FP8.float() * scale
    assert torch.equal(found["a.weight"].tensor(), expected)

    # As fsdp.copy_part takes a shard, whose rows may end before its own do, or be none.
    shard = torch.empty(1, 2, dtype=torch.bfloat16)
    shard.copy_(found["a.weight"][1:][:2])
    assert torch.equal(shard.float(), expected[1:])
    assert len(found["a.weight"][2:][:1]) == 0


def test_what_is_no_scaled_float8():
    scale = torch.ones(1)
    for tensors, header, message in (
        ({"a.weight": FP8, "a.comfy_quant": quant("nvfp4")}, {}, "quantised as nvfp4"),
        ({"a.weight": FP8}, {"a": {"format": "int8"}}, "quantised as int8"),
        ({"a.scale_weight": scale}, {}, "but no a.weight"),
        ({"a.weight": FP8, "a.scale_weight": torch.ones(2, 2)}, {}, "no scaled float8"),
        ({"a.weight": FP8.view(torch.uint8)}, {}, "quantised .*uint8"),
        ({"a.weight": FP8, "a.weight_scale": scale, "b.weight": FP8}, {}, "no scale for b.weight"),
    ):
        text = {"_quantization_metadata": json.dumps({"layers": header})}
        with pytest.raises(ValueError, match=message):
            layouts.upstream(HERE, "dit", tensors, text)


# ---------------------------------------------------------------------------------------- refusals

BLOCK = "blocks.0"
REFUSED = {
    f"{BLOCK}.ffn.0.quantized_weight_values": "NVFP4 of LongLive 2; take model_bf16.pt",
    f"{BLOCK}.ffn.0.weight_scale_2": "NVFP4",
    f"{BLOCK}.ffn.0.qweight": "nunchaku",
    f"{BLOCK}.ffn.0.weight.absmax": "bitsandbytes",
    f"{BLOCK}.ffn.0.lora_down.weight": "is a LoRA, no model",
    "transformer.blocks.0.attn1.to_q.lora_A.weight": "is a LoRA, no model",
    "base_model.model.blocks.0.ffn.0.lora_A.default.weight": "is a LoRA, no model",
    "lycoris_blocks_0_ffn_0.lokr_w1": "LyCORIS",
    f"{BLOCK}.ffn.0.dora_scale": "DoRA",
    f"{BLOCK}.cam_self_attn.q_proj.weight": "DreamX-World",
    f"{BLOCK}.attn1.to_out_prope.0.weight": "HY-WorldPlay",
    "condition_embedder.action_embedder.linear_1.weight": "HY-WorldPlay",
    f"{BLOCK}.action_module.q.weight": "ABot-World",
    f"{BLOCK}.to_gate_compress.weight": "FastWan2.2-TI2V-5B-FullAttn-Diffusers",
    "vace_blocks.0.self_attn.q.weight": "VACE",
    "control_adapter.conv.weight": "control",
    "img_emb.proj.0.weight": "Wan2.1 I2V",
    f"{BLOCK}.cross_attn.k_img.weight": "Wan2.1 I2V",
    f"{BLOCK}.attn2.add_k_proj.weight": "Wan2.1 I2V",
    "audio_model.blocks.0.x.weight": "Ovi",
    f"{BLOCK}.attn1.to_qkv.weight": "unfuse_qkv_projections",
    "encoder.downsamples.0.residual.0.gamma": "Wan2.1's VAE",
    "encoder.down_blocks.0.conv1.weight": "Wan2.1's VAE",
}


@pytest.mark.parametrize("key", REFUSED)
def test_refused_by_a_key(key):
    with pytest.raises(ValueError, match=REFUSED[key]) as error:
        layouts.upstream(HERE, "dit", manifest("dit") | {key: meta(2)})
    assert key.removeprefix("base_model.model.") in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("dim", "in_dim", "message"),
    [
        (1536, 16, "Wan2.1 1.3B"),
        (5120, 16, "Wan 14B"),
        (5120, 36, "I2V"),
        (3072, 96, "Lucy-Edit"),
        (3072, 100, "control"),
    ],
)
def test_refused_by_sizes(dim, in_dim, message):
    tensors = {"patch_embedding.weight": meta(dim, in_dim, 1, 2, 2)}
    with pytest.raises(ValueError, match=message):
        refuse_sizes(HERE, tensors, 48)
    refuse_sizes(HERE, tensors, in_dim)
    refuse_sizes(HERE, manifest("dit"), 48)


def test_refused_files(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF\3\0\0\0")
    with pytest.raises(ValueError, match="GGUF"):
        refuse_file(tmp_path / "x.gguf")
    refuse_file(FORMATS / "comfy" / "wan2.2_vae.safetensors")
    with pytest.raises(ValueError, match="model_bf16.pt"):
        refuse_held(HERE, {"checkpoint_format": "longlive_generator_nvfp4"})
    refuse_held(HERE, {"checkpoint_format": "longlive_generator_merged_bf16"})
    with pytest.raises(ValueError, match="is a LoRA"):
        refuse_held(HERE, {"generator_lora": {}, "critic_lora": {}, "step": 1})


# ---------------------------------------------------------------------------------------- configs


def config(folder):
    return read_json(FORMATS / "diffusers" / folder / "config.json")


def test_configs():
    assert all(layouts.is_foreign_config(config(f)) for f in ("transformer", "vae", "text_encoder"))
    assert not layouts.is_foreign_config(asdict(DiTConfig()))
    dit = DiTConfig(**layouts.config_fields(HERE, "dit", config("transformer")))
    assert dit == DiTConfig(48, 64, 3, 2, text_dim=24, freq_dim=64)
    vae = layouts.config_fields(HERE, "vae", config("vae"))
    assert VAEConfig(**vae) == VAEConfig(dim=2, dec_dim=3)
    vae = layouts.config_fields(HERE, "vae", config("vae") | {"decoder_base_dim": None})
    assert VAEConfig(**vae) == VAEConfig(dim=2, dec_dim=2)
    t5 = T5Config(**layouts.config_fields(HERE, "t5", config("text_encoder")))
    assert t5 == T5Config(520, 24, 18, 40, 3, 2)


def test_configs_for_diffusers():
    cfg = DiTConfig(48, 64, 3, 2, text_dim=24, freq_dim=64)
    assert layouts.diffusers_config(cfg) == config("transformer")
    released = layouts.diffusers_config(DiTConfig())
    assert DiTConfig(**layouts.config_fields(HERE, "dit", released)) == DiTConfig()
    assert released["attention_head_dim"] == 128
    ours = manifest("dit")
    assert layouts.upstream(HERE, "dit", layouts.diffusers_names(ours)) == ours


@pytest.mark.parametrize(
    ("kind", "folder", "change"),
    [
        ("dit", "transformer", {"qk_norm": "rms_norm"}),
        ("dit", "transformer", {"image_dim": 1280}),
        ("dit", "transformer", {"added_kv_proj_dim": 5120}),
        ("dit", "transformer", {"pos_embed_seq_len": 514}),
        ("dit", "transformer", {"vace_layers": [0, 5]}),
        ("vae", "vae", {"is_residual": False}),
        ("vae", "vae", {"patch_size": None}),
        ("vae", "vae", {"attn_scales": [1.0]}),
        ("vae", "vae", {"latents_std": [1.0] * 48}),
        ("t5", "text_encoder", {"model_type": "t5"}),
        ("t5", "text_encoder", {"quantization_config": {"load_in_8bit": True}}),
        ("t5", "text_encoder", {"dense_act_fn": "relu"}),
        ("t5", "text_encoder", {"relative_attention_max_distance": 64}),
    ],
)
def test_configs_of_other_networks(kind, folder, change):
    with pytest.raises(ValueError, match=next(iter(change))):
        layouts.config_fields(HERE, kind, config(folder) | change)


# ---------------------------------------------------------------------------------------- whole

BUILT = {"dit": WanDiT, "vae": VAE22, "t5": T5Encoder}
COMFY = FORMATS / "comfy"


def load(kind, file, named=None):
    """The model of one file, in float32, as formats.py puts it together."""
    tensors = layouts.upstream(file, kind, open_tensors(file).tensors)
    if kind == "dit":
        cfg = dit_config(tensors, named or read_json(COMFY / "config.json"))
    elif kind == "vae":
        cfg = VAEConfig(**(sizes(tensors, VAE_AXES) | (named or {})))
    else:
        cfg = T5Config(**(sizes(tensors, T5_AXES) | (named or {})))
    model = blank(BUILT[kind], cfg, Source(file, tensors, {})).to_empty(device="cpu")
    fill(model, tensors)
    return model.eval()


def load_part(kind, folder, name):
    file = FORMATS / "diffusers" / folder / name
    fields = layouts.config_fields(file, kind, read_json(file.with_name("config.json")))
    return load(kind, file, fields)


@torch.no_grad()
def velocity(model, batch=1):
    hidden = VECTORS["t5.hidden"][:batch]
    context = torch.nn.functional.pad(hidden, (0, 0, 0, 512 - hidden.shape[1]))
    sigma = VECTORS["dit.timestep"][:batch, None].expand(-1, 3) / 1000
    return model(VECTORS["dit.x"][:batch], sigma, context)


@torch.no_grad()
def hidden(model):
    return model(VECTORS["t5.ids"], VECTORS["t5.mask"])


def test_a_pipeline_folder_computes_what_its_peer_does():
    dit = load_part("dit", "transformer", "diffusion_pytorch_model.safetensors.index.json")
    assert rel(velocity(dit, 2), VECTORS["dit.v_uniform"]) < 1e-5
    vae = load_part("vae", "vae", "diffusion_pytorch_model.safetensors")
    with torch.no_grad():
        assert rel(vae.encode(VECTORS["vae.video"]), VECTORS["vae.latent"]) < 1e-5
        assert rel(vae.decode(VECTORS["vae.z"]), VECTORS["vae.decoded"]) < 1e-5
    t5 = load_part("t5", "text_encoder", "model.safetensors.index.json")
    assert rel(hidden(t5), VECTORS["t5.hidden"]) < 1e-5


@pytest.mark.parametrize(
    ("name", "vector"),
    [
        ("wan2.2_ti2v_5B_fp16", "comfy.dit_fp16"),
        ("Wan2_2-TI2V-5B_fp8_e4m3fn_scaled_KJ", "comfy.dit_fp8"),
    ],
)
def test_comfy_dit(name, vector):
    dit = load("dit", COMFY / f"{name}.safetensors")
    assert rel(velocity(dit), VECTORS[f"{vector}.v_uniform"]) < 1e-5


def test_comfy_scaled_weights():
    file = COMFY / "Wan2_2-TI2V-5B_fp8_e4m3fn_scaled_KJ.safetensors"
    tensors = layouts.upstream(file, "dit", open_tensors(file).tensors)
    assert sum(isinstance(tensor, Made) for tensor in tensors.values()) == 20
    for name in ("blocks.0.self_attn.q.weight", "blocks.1.ffn.2.weight"):
        assert torch.equal(tensors[name].tensor()[:6], VECTORS[f"comfy.dit_fp8.{name}"])


@pytest.mark.parametrize(
    ("name", "vector"),
    [
        ("umt5_xxl_fp16", "comfy.t5_fp16"),
        ("umt5_xxl_fp8_e4m3fn_scaled", "comfy.t5_fp8_scaled"),
        ("umt5-xxl-enc-fp8_e4m3fn", "comfy.t5_fp8_plain"),
    ],
)
def test_comfy_t5(name, vector):
    t5 = load("t5", COMFY / f"{name}.safetensors")
    assert rel(hidden(t5), VECTORS[f"{vector}.hidden"]) < 1e-5


def test_comfy_vae():
    vae = load("vae", COMFY / "wan2.2_vae.safetensors")
    with torch.no_grad():
        decoded = vae.decode(VECTORS["vae.z"])
    assert rel(decoded[:, :, -4:], VECTORS["comfy.vae_fp16.decoded"]) < 1e-5


def test_comfy_tokenizer():
    source = layouts.tokenizer_bytes(open_tensors(COMFY / "umt5_xxl_fp16.safetensors").tensors)
    ids, _ = Tokenizer(source)(["A red fox runs in deep snow."])
    assert torch.equal(ids[0, :26], VECTORS["t5.ids"][0])
    original = open_tensors(FORMATS / "original" / "models_t5_umt5-xxl-enc-bf16.pth").tensors
    assert layouts.tokenizer_bytes(original) is None


def test_the_original_stays_as_it_is():
    tensors = open_tensors(FORMATS / "original", "*.index.json").tensors
    assert layouts.upstream(HERE, "dit", tensors) == tensors
