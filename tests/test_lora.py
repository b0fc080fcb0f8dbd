"""LoRA files of every scheme against the weights that their own tools merged."""

import json
import shutil

import pytest
import torch
from common import GOLDEN, private_memory, randn, rel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from wan5b.dit import WanDiT
from wan5b.extras import lora, scaled
from wan5b.extras.scaled import Made
from wan5b.weights import check_dit, fill, open_tensors

FORMATS = GOLDEN / "formats"
LORAS = FORMATS / "lora"
VECTORS = load_file(FORMATS / "vectors.safetensors")
FILES = {
    "peft": "peft",
    "longlive": "longlive_lora.pt",
    "diffusers": "pytorch_lora_weights.safetensors",
    "diffusers_alpha": "pytorch_lora_weights_alpha.safetensors",
    "comfy": "comfy_alpha.safetensors",
    "diffusion_model_ab": "diffusion_model_AB_bf16.safetensors",
    "musubi": "musubi.safetensors",
    "kijai": "kijai_diff_fp16.safetensors",
}


@pytest.fixture(scope="module")
def source():
    return open_tensors(FORMATS / "original", "*.index.json")


@pytest.fixture(scope="module")
def shapes(source):
    return {name: tensor.shape for name, tensor in source.tensors.items()}


def context():
    hidden = VECTORS["t5.hidden"]
    return torch.nn.functional.pad(hidden[:1], (0, 0, 0, 512 - hidden.shape[1]))


def whole(tensor):
    return tensor.tensor() if isinstance(tensor, Made) else tensor


@pytest.mark.parametrize("scheme", FILES)
def test_schemes(scheme, source):
    tensors = lora.merged(source.tensors, [(LORAS / FILES[scheme], 1.0)])
    prefix = f"lora.{scheme}."
    expected = {k.removeprefix(prefix): v for k, v in VECTORS.items() if k.startswith(prefix)}
    velocity = expected.pop("v_uniform")
    for name, value in expected.items():
        assert rel(whole(tensors[name])[: len(value)], value) < 1e-5, name

    model = WanDiT(check_dit(source))
    fill(model, tensors)
    sigma = VECTORS["dit.timestep"][:1, None] / 1000
    with torch.no_grad():
        v = model(VECTORS["dit.x"][:1], sigma.expand(1, 3), context())
    assert rel(v, velocity) < 1e-5


def test_strength_and_two_of_them(source):
    kijai = LORAS / FILES["kijai"]
    halves = lora.merged(source.tensors, [(kijai, 0.5), (kijai, 0.5)])
    once = lora.merged(source.tensors, [(kijai, 1.0)])
    for name, tensor in once.items():
        assert torch.allclose(whole(halves[name]), whole(tensor), atol=1e-6), name
    q = "blocks.0.self_attn.q.weight"
    none = lora.merged(source.tensors, [(kijai, 0.0)])
    assert torch.equal(whole(none[q]), source.tensors[q].float())


# ------------------------------------------------------------------------- synthetic files

DOWN, UP = randn(2, 48, seed=1), randn(48, 2, seed=2)
Q = "blocks.1.self_attn.q"


def read(tmp_path, shapes, tensors, config=None):
    own = {key: tensor.clone() for key, tensor in tensors.items()}
    save_file(own, tmp_path / "adapter_model.safetensors")
    if config is not None:
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    return lora.read_lora(tmp_path, shapes)


def scales(deltas):
    return {name: [delta.scale for delta in changes] for name, changes in deltas.items()}


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, 1.0),
        ({"lora_alpha": 6, "r": 2}, 3.0),
        ({"lora_alpha": 6, "r": 2, "use_rslora": True}, 6 / 2**0.5),
        ({"lora_alpha": 6, "r": 8, "rank_pattern": {"self_attn.q": 2}}, 3.0),
        ({"lora_alpha": 6, "alpha_pattern": {"attn.q": 1, "self_attn.q": 4}}, 2.0),
        ({"lora_alpha": 6, "alpha_pattern": {r"^blocks\.\d+\.self_attn\.q": 4}}, 2.0),
        ({"lora_alpha": 6, "alpha_pattern": {"self_attn.k": 4}}, 3.0),
    ],
)
def test_scales_of_peft(config, scale, tmp_path, shapes):
    tensors = {f"base_model.model.{Q}.lora_A.default.weight": DOWN}
    tensors[f"base_model.model.{Q}.lora_B.default.weight"] = UP
    tensors[f"base_model.model.{Q}.lora_B.bias"] = randn(48)
    deltas = read(tmp_path, shapes, tensors, config)
    assert scales(deltas) == {f"{Q}.weight": [scale], f"{Q}.bias": [scale]}


def test_every_linear_of_the_model_behind_underscores(tmp_path, shapes):
    """Musubi's and Wan-Fun's names, and kohya's of diffusers' modules."""
    linears = [name for name, shape in shapes.items() if len(shape) == 2]
    for prefix in ("lora_unet_", "lora_unet__"):
        tensors = {}
        for name in linears:
            flat = prefix + name.removesuffix(".weight").replace(".", "_")
            out, width = shapes[name]
            tensors[f"{flat}.lora_down.weight"] = torch.zeros(2, width)
            tensors[f"{flat}.lora_up.weight"] = torch.zeros(out, 2)
            tensors[f"{flat}.alpha"] = torch.tensor(1.0)
        deltas = read(tmp_path, shapes, tensors)
        assert scales(deltas) == {name: [0.5] for name in linears}

    flat = "lora_unet_blocks_0_attn2_to_out_0"
    tensors = {f"{flat}.lora_down.weight": DOWN, f"{flat}.lora_up.weight": UP}
    assert list(read(tmp_path, shapes, tensors)) == ["blocks.0.cross_attn.o.weight"]


def test_differences_of_all_kinds(tmp_path, shapes):
    front = "diffusion_model."
    ends = {
        "patch_embedding.diff": "patch_embedding.weight",
        "blocks.0.norm3.diff": "blocks.0.norm3.weight",
        "blocks.0.norm3.diff_b": "blocks.0.norm3.bias",
        "blocks.0.modulation.diff": "blocks.0.modulation",
        "blocks.1.modulation.diff_m": "blocks.1.modulation",
        "head.diff_m": "head.modulation",
        "head.head.diff": "head.head.weight",
    }
    tensors = {front + key: torch.ones(*shapes[name]) for key, name in ends.items()}
    assert scales(read(tmp_path, shapes, tensors)) == {name: [1.0] for name in ends.values()}


@pytest.mark.parametrize("front", ["generator.", "pipe.dit.", "base_model.model.model.", "unet."])
def test_words_in_front(front, tmp_path, shapes):
    tensors = {f"{front}{Q}.lora_A.default.weight": DOWN, f"{front}{Q}.lora_B.default.weight": UP}
    assert scales(read(tmp_path, shapes, tensors)) == {f"{Q}.weight": [1.0]}


@pytest.mark.parametrize("front", ["lora_unet_", "lora_transformer_"])
def test_differences_behind_underscores(front, tmp_path, shapes):
    ends = {
        "blocks_1.diff_m": "blocks.1.modulation",
        "blocks_0_modulation.diff": "blocks.0.modulation",
        "head.diff_m": "head.modulation",
        "blocks_1_self_attn_norm_q.diff": "blocks.1.self_attn.norm_q.weight",
        "blocks_1_norm3.diff_b": "blocks.1.norm3.bias",
    }
    tensors = {front + key: torch.ones(*shapes[name]) for key, name in ends.items()}
    assert scales(read(tmp_path, shapes, tensors)) == {name: [1.0] for name in ends.values()}


@pytest.mark.parametrize("key", [f"{Q}.lora_up.weight", f"{Q}.diff_b", f"{Q}.alpha"])
def test_numbers_that_are_none_are_the_lora_s_fault(key, tmp_path, source, shapes):
    tensors = pair(Q) | {f"{Q}.diff_b": torch.zeros(48), f"{Q}.alpha": torch.ones(1)}
    tensors[key] = torch.full_like(tensors[key], torch.nan)
    path = tmp_path / "adapter_model.safetensors"
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, path)
    with pytest.raises(ValueError, match=r"adapter_model.safetensors: .*(NaN|nan)"):
        fill(WanDiT(check_dit(source)), lora.merged(source.tensors, [(path, 1.0)]))


def test_a_convolution_has_factors_too(tmp_path, shapes):
    down = randn(2, 48, 1, 2, 2, seed=3)
    up = randn(48, 2, 1, 1, 1, seed=4)
    tensors = {"patch_embedding.lora_down.weight": down, "patch_embedding.lora_up.weight": up}
    [delta] = read(tmp_path, shapes, tensors)["patch_embedding.weight"]
    change = lora.merge(torch.zeros(48, 48, 1, 2, 2), [delta]).tensor()
    expected = torch.einsum("or,rcthw->octhw", up[:, :, 0, 0, 0], down)
    assert rel(change, expected) < 1e-6


def test_diffusers_second_norm_is_upstreams_third(tmp_path, shapes):
    tensors = {"transformer.blocks.0.norm2.diff": torch.ones(48)}
    with pytest.raises(ValueError, match="without a place"):
        read(tmp_path, shapes, tensors)
    tensors["transformer.blocks.0.attn1.to_q.lora_A.weight"] = DOWN
    tensors["transformer.blocks.0.attn1.to_q.lora_B.weight"] = UP
    assert "blocks.0.norm3.weight" in read(tmp_path, shapes, tensors)


def pair(module, down=DOWN, up=UP):
    return {f"{module}.lora_down.weight": down, f"{module}.lora_up.weight": up}


WIDE = pair(f"diffusion_model.{Q}", randn(2, 5120), randn(5120, 2))
REFUSED = {
    "of width 5120, not one of width 48": WIDE,
    "the 14B": WIDE,
    "of width 32, not": pair("diffusion_model.blocks.0.ffn.0", randn(2, 32), randn(99, 2)),
    "of other sizes .*99, 48": pair("diffusion_model.blocks.0.ffn.0", DOWN, randn(99, 2)),
    "1 keys without a place": pair("diffusion_model.blocks.7.self_attn.q"),
    "lora_unet_blocks_0_odd": pair("lora_unet_blocks_0_odd"),
    "belong to no LoRA .*set_weight": pair(Q) | {"x.set_weight": DOWN},
    "give those as weights": {"blocks.0.self_attn.q.weight": DOWN},
    "LyCORIS": {"lycoris_blocks_0_self_attn_q.hada_w1_a": DOWN},
    "LyCORIS.*lokr": {"diffusion_model.blocks.0.self_attn.q.lokr_w1": DOWN},
    "DoRA": pair(Q) | {f"{Q}.dora_scale": DOWN},
    "Wan2.1 I2V": pair("diffusion_model.blocks.0.cross_attn.k_img"),
    "text encoder": pair("lora_te1_x"),
    "pair of networks": pair("transformer_2.blocks.0.attn1.to_q"),
    "without its partner": {f"{Q}.lora_down.weight": DOWN},
    "without a LoRA": {f"{Q}.alpha": torch.tensor(1.0)},
    "two keys for one": pair(Q) | {f"{Q}.lora_A.weight": DOWN},
    "don't belong together": pair(Q, randn(3, 48)),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused(message, tmp_path, shapes):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, shapes, REFUSED[message])


@pytest.mark.parametrize(
    ("message", "config"),
    [
        ("LOHA", {"peft_type": "LOHA"}),
        ("use_dora", {"use_dora": True}),
        ("modules_to_save", {"modules_to_save": ["head"]}),
    ],
)
def test_refused_by_the_config(message, config, tmp_path, shapes):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, shapes, pair(Q), config)


def test_other_files(tmp_path, shapes):
    torch.save({"generator_lora": {}, "critic_lora": {}, "step": 1}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="holds more than tensors"):
        lora.read_lora(tmp_path / "x.pt", shapes)
    with pytest.raises(ValueError, match="no such file"):
        lora.read_lora(tmp_path / "none", shapes)
    shutil.copy(LORAS / "musubi.safetensors", tmp_path / "any.safetensors")
    (tmp_path / "x.pt").unlink()
    assert len(lora.read_lora(tmp_path, shapes)) == 10  # the only file of a folder


def test_memory(tmp_path, monkeypatch):
    """A merged model costs its own memory and a few blocks for each thread."""
    monkeypatch.setattr(scaled, "BLOCK", 1 << 19)
    rows = 64 << 9  # 64 blocks, of 2 MB each
    save_file({"w": torch.zeros(rows, 1024)}, tmp_path / "w.safetensors")
    deltas = [lora.Delta(1.0, randn(rows, 2), randn(2, 1024))]
    target = torch.ones(rows, 1024)
    with safe_open(tmp_path / "w.safetensors", "pt") as f:
        made = lora.merge(f.get_tensor("w"), deltas)
    before = private_memory()
    peaks = []
    inner = made.rows
    made.rows = lambda a, b: (inner(a, b), peaks.append(private_memory()))[0]
    target.copy_(made)
    assert len(peaks) == 64
    assert max(peaks) - before < 10 << 21  # the whole: 64 << 21
    assert rel(target[:9], deltas[0].rows(0, 9)) < 1e-6
