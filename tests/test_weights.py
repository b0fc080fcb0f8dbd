"""Loading and saving: releases, shards, trainers' pickles, exports; what is said of wrong ones."""

import errno
import gc
import json
import os
import pickle
from dataclasses import asdict, replace

import pytest
import torch
from common import private_memory
from release import DIT, T5, VAE, make_release, random_weights, write_dit
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from wan5b.dit import PRESETS, DiTConfig, WanDiT
from wan5b.extras import formats
from wan5b.extras.formats import load_tokenizer
from wan5b.t5 import T5Config, T5Encoder
from wan5b.vae22 import VAE22, VAEConfig
from wan5b.weights import (
    T5_AXES,
    VAE_AXES,
    dit_config,
    fill,
    load_dit,
    load_t5,
    load_vae,
    open_dit,
    save_dit,
    sizes,
)

INDEX = "diffusion_pytorch_model.safetensors.index.json"
SHARD = "diffusion_pytorch_model-00002-of-00003.safetensors"
FIRST_SHARD = "diffusion_pytorch_model-00001-of-00003.safetensors"
SINGLE = "diffusion_pytorch_model.safetensors"
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n"
METADATA = {
    "levels": [1.0, 0.9375, 0.0],
    "shift": 5.0,
    "blocks": [1, 3, 3],
    "stage": "dmd",
    "step": 600,
}


@pytest.fixture(scope="session")
def shared_release(tmp_path_factory):
    return make_release(tmp_path_factory.mktemp("release") / "shared")


@pytest.fixture
def release(tmp_path):
    """A DiT-only release that a test may damage."""
    write_dit(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def weights():
    return random_weights(WanDiT(DIT), 0).state_dict()


def assert_holds(model, expected, dtype=torch.float32):
    given = model.state_dict()
    assert given.keys() == expected.keys()
    for key, value in given.items():
        assert value.dtype == dtype
        assert value.equal(expected[key].to(dtype)), key
    assert not model.training
    assert all(p.requires_grad for p in model.parameters())


def reject(load, path, *words, **options):
    """Assert that load refuses the path in one line of text, which holds every one of words."""
    with pytest.raises(ValueError, match=".") as caught:
        load(path, **options)
    text = str(caught.value)
    assert "\n" not in text
    for word in words:
        assert word in text, text


def edit_json(path, **changes):
    entries = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in entries.items() if value is not None}))


def edit_shard(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


# ------------------------------------------------------------------------------------------ ways in


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_release_folder(shared_release, weights, dtype):
    model = load_dit(shared_release, "cpu", dtype, channels=48)
    assert model.cfg == DIT
    assert_holds(model, weights, dtype)


def test_parts_of_a_release(shared_release):
    vae, t5 = load_vae(shared_release), load_t5(shared_release)
    assert (vae.cfg, t5.cfg) == (VAE, T5)
    assert_holds(vae, random_weights(VAE22(VAE), 1).state_dict())
    assert_holds(t5, random_weights(T5Encoder(T5).bfloat16(), 2).state_dict(), torch.bfloat16)
    ids, mask = load_tokenizer(shared_release)(["a red circle"])
    hidden = t5(ids, mask)
    assert hidden.shape == (1, 512, DIT.text_dim)
    assert hidden.isfinite().all()


def test_parts_given_directly(shared_release, tmp_path):
    state = torch.load(shared_release / "Wan2.2_VAE.pth", weights_only=True)
    save_file(state, tmp_path / "v.safetensors")
    assert_holds(load_vae(tmp_path / "v.safetensors"), state)
    vae = load_vae(shared_release / "Wan2.2_VAE.pth", dtype=torch.bfloat16)
    assert_holds(vae, state, torch.bfloat16)
    t5 = load_t5(shared_release / "models_t5_umt5-xxl-enc-bf16.pth", "cpu", torch.float32)
    assert_holds(t5, t5.state_dict())


def test_single_file_index_and_string_paths(tmp_path, weights):
    write_dit(tmp_path, single=True)
    assert_holds(load_dit(str(tmp_path)), weights)
    (tmp_path / SINGLE).rename(tmp_path / "other.safetensors")
    assert_holds(load_dit(tmp_path / "other.safetensors"), weights)
    write_dit(tmp_path, shards=2)
    assert_holds(load_dit(tmp_path / INDEX), weights)


def test_config_keys_may_be_missing_or_too_many(release, weights):
    edit_json(release / "config.json", _extra=[1], window_size=[-1, -1])
    edit_json(release / "config.json", text_len=None, dim=None, num_layers=None)
    model = load_dit(release)
    assert model.cfg == DIT
    assert_holds(model, weights)

    # Without the file, 128 channels a head, as in all released models.
    (release / "config.json").unlink()
    assert load_dit(release).cfg == replace(DIT, num_heads=1)


def test_config_names_what_shapes_do_not_tell(release):
    edit_json(release / "config.json", num_heads=4, text_len=77, eps=1e-5)
    cfg = load_dit(release).cfg
    assert (cfg.num_heads, cfg.text_len, cfg.eps) == (4, 77, 1e-5)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_recognised_by_their_shapes(name):
    with torch.device("meta"):
        tensors = WanDiT(PRESETS[name]).state_dict()
    assert dit_config(tensors, {}) == PRESETS[name]


def test_other_parts_are_recognised_by_their_shapes():
    with torch.device("meta"):
        vae = VAE22(VAEConfig()).state_dict()
        t5 = T5Encoder(T5Config()).state_dict()
    assert sizes(vae, VAE_AXES) == {"z_dim": 48, "dim": 160, "dec_dim": 256}
    assert T5Config(**sizes(t5, T5_AXES)) == T5Config()


def test_index_decides_which_shard_a_key_comes_from(release, weights):
    key = "head.head.bias"
    other = torch.full_like(weights[key], 7.0)
    edit_shard(release / FIRST_SHARD, lambda tensors: tensors.update({key: other}))
    assert_holds(load_dit(release), weights)
    index = json.loads((release / INDEX).read_text())
    edit_json(release / INDEX, weight_map=index["weight_map"] | {key: FIRST_SHARD})
    assert (load_dit(release).head.head.bias == 7).all()


@pytest.mark.parametrize(
    "prefix",
    [
        "",
        "model.",
        "module.model.",
        "model._fsdp_wrapped_module.",
        "_orig_mod.",
        "model.diffusion_model.",
    ],
)
def test_training_checkpoint(tmp_path, weights, prefix):
    def scaled(scale):
        return {key: value * scale for key, value in weights.items()}

    def wrapped(scale):
        parts = {}
        for key, value in scaled(scale).items():
            key = key.replace(".self_attn.", "._checkpoint_wrapped_module.self_attn.")
            parts[prefix + key] = value
        return parts

    (tmp_path / "config.json").write_text(json.dumps(asdict(DIT)))
    path = tmp_path / "model.pt"
    parts = {"generator": wrapped(1), "critic": wrapped(2), "generator_ema": wrapped(3)}
    torch.save(parts, path)
    assert_holds(formats.load_dit(path), scaled(3))
    assert_holds(formats.load_dit(path, part="critic"), scaled(2))
    reject(formats.load_dit, path, "fake", "generator, critic, generator_ema", part="fake")
    del parts["generator_ema"]
    torch.save(parts, path)
    assert_holds(formats.load_dit(path, dtype=torch.bfloat16), weights, torch.bfloat16)
    torch.save(parts["generator"], tmp_path / "plain.pth")
    assert_holds(formats.load_dit(tmp_path / "plain.pth"), weights)


def test_model_survives_its_files(release, weights):
    model = load_dit(release)
    for path in release.iterdir():
        with path.open("r+b") as f:  # a parameter that still maps a file changes with it
            f.write(b"\0" * path.stat().st_size)
    assert_holds(model, weights)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux")
def test_memory_of_loading(tmp_path):
    """Opening reads nothing; loading takes the model's own memory and little more, at any time."""
    cfg = DiTConfig(512, 1024, 4, 6, text_dim=64, freq_dim=64)
    write_dit(tmp_path, cfg)  # float32
    load_dit(tmp_path)  # what torch sets up at first is not counted
    gc.collect()

    before = private_memory()
    _, tensors = open_dit(tmp_path)
    size = sum(tensor.nbytes for tensor in tensors.values())
    assert size > 50 * 2**20
    assert private_memory() - before < size / 8

    peak = []

    def copy(parameter, tensor):
        parameter.copy_(tensor)
        peak.append(private_memory() - before)

    model = WanDiT(cfg).bfloat16()
    before = private_memory()
    fill(model, tensors, copy)
    assert max(peak) < size / 8, "beside the model"
    del model
    gc.collect()

    before = private_memory()
    model = load_dit(tmp_path, dtype=torch.bfloat16)
    assert private_memory() - before < 1.15 * size / 2
    assert sum(p.nbytes for p in model.parameters()) == size / 2


# ------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("load", [load_dit, load_vae, load_t5])
def test_no_such_path_and_empty_folder(load, tmp_path):
    reject(load, tmp_path / "nowhere", "nowhere", "no such file or folder")
    reject(load, tmp_path, str(tmp_path), "no weights")


def test_shards_without_an_index(release):
    (release / INDEX).unlink()
    reject(load_dit, release, "holds 3 of", "index")


def test_missing_shard(release):
    (release / SHARD).unlink()
    reject(load_dit, release, SHARD, "no such file")


@pytest.mark.parametrize("keep", [0, 5, 100, -10])
def test_truncated_shard(release, keep):
    (release / SHARD).write_bytes((release / SHARD).read_bytes()[:keep])
    reject(load_dit, release, SHARD, "truncated", "download it again")


def test_corrupt_files(release):
    content = bytearray((release / SHARD).read_bytes())
    content[:40] = os.urandom(40)
    (release / SHARD).write_bytes(content)
    reject(load_dit, release, SHARD, "corrupt")
    for name in (INDEX, "config.json"):
        write_dit(release)
        for content in (b'{"weight_map": \xff', b"null", b"[1]"):
            (release / name).write_bytes(content)
            reject(load_dit, release, name, "not JSON")
    write_dit(release)
    (release / INDEX).write_text("{}")
    reject(load_dit, release, INDEX, "missing", "complete?")
    torch.save([torch.zeros(2)], release / "list.pt")
    reject(load_dit, release / "list.pt", "list.pt", "more than tensors")
    torch.save(3, release / "list.pt")
    reject(load_dit, release / "list.pt", "list.pt", "no zip of a state dict")


@pytest.mark.parametrize("keep", [0, 200, -10])
def test_truncated_pickle(shared_release, tmp_path, keep):
    path = tmp_path / "Wan2.2_VAE.pth"
    path.write_bytes((shared_release / path.name).read_bytes()[:keep])
    reject(load_vae, tmp_path, path.name, "truncated", "download it again")


@pytest.mark.parametrize("name", [INDEX, SHARD, "config.json"])
def test_lfs_pointer(release, name):
    (release / name).write_text(LFS)
    reject(load_dit, release, name, "git lfs pull")


def test_lfs_pointer_in_the_other_parts(tmp_path):
    for load, name in ((load_vae, "Wan2.2_VAE.pth"), (load_t5, "models_t5_umt5-xxl-enc-bf16.pth")):
        (tmp_path / name).write_text(LFS)
        reject(load, tmp_path, name, "git lfs pull")
    spiece = tmp_path / "google" / "umt5-xxl" / "spiece.model"
    reject(load_tokenizer, tmp_path, str(spiece), "no such file")
    spiece.parent.mkdir(parents=True)
    spiece.write_text(LFS)
    reject(load_tokenizer, tmp_path, str(spiece), "git lfs pull")


def test_missing_unexpected_and_misshapen_keys(release):
    def change(tensors):
        for key in [key for key in tensors if "ffn" in key]:
            tensors["extra." + key] = tensors.pop(key)
        key = next(key for key in tensors if key.endswith("self_attn.q.weight"))
        tensors[key] = tensors[key][:1].clone()

    edit_shard(release / SHARD, change)
    missing = "6 missing (blocks.0.ffn.0.weight, "
    unexpected = "6 unexpected (extra.blocks.0.ffn.0.bias, "
    misshapen = "1 misshapen (blocks.1.self_attn.q.weight [1, 128], not [128, 128])"
    reject(load_dit, release, missing, unexpected, misshapen)


@pytest.mark.parametrize("load", [load_dit, load_vae, load_t5])
@pytest.mark.parametrize("i", [0, 5, -1])
def test_one_missing_key_of_any_part(shared_release, tmp_path, load, i):
    state = load(shared_release).state_dict()
    key = list(state)[i]
    del state[key]
    (tmp_path / "config.json").write_text(json.dumps(asdict(DIT)))
    torch.save(state, tmp_path / "x.pth")
    reject(load, tmp_path / "x.pth", f"missing ({key}")


def test_every_size_in_config_must_fit(release):
    for field in ("dim", "ffn_dim", "num_layers", "in_dim", "out_dim", "text_dim", "freq_dim"):
        write_dit(release)
        edit_json(release / "config.json", **{field: 2 * getattr(DIT, field)})
        wrong = "missing" if field == "num_layers" else "misshapen"
        reject(load_dit, release, wrong, "config.json")


def test_heads_are_not_guessed_for_an_unknown_width(release):
    write_dit(release, DiTConfig(192, 256, 6, 2, text_dim=64, freq_dim=64))
    assert load_dit(release).cfg.num_heads == 6
    edit_json(release / "config.json", num_heads=None)
    reject(load_dit, release, "192", "num_heads")


def test_channels_of_the_other_latent_space(release):
    spaces = ("Wan2.1", "Wan2.2", "4x8x8", "4x16x16")
    reject(load_dit, release, "48 latent channels", "16 are needed", *spaces, channels=16)
    write_dit(release, replace(DIT, in_dim=16, out_dim=16))
    assert load_dit(release, channels=16).cfg.in_dim == 16
    reject(load_dit, release, "16 latent channels", "48 are needed", *spaces, channels=48)
    torch.save({"conv2.weight": torch.zeros(16, 16, 1, 1, 1)}, release / "Wan2.1_VAE.pth")
    reject(load_vae, release, "16 latent channels", "48 are needed")


@pytest.mark.parametrize(
    "key", ["condition_embedder.time_embedder.linear_1.weight", "blocks.0.attn1.to_q.weight"]
)
def test_diffusers_layout(tmp_path, key):
    path = tmp_path / SINGLE
    patch = torch.zeros(128, 48, 1, 2, 2)
    save_file({"patch_embedding.weight": patch, key: torch.zeros(4, 4)}, path)
    reject(load_dit, tmp_path, path.name, "missing", f"1 unexpected ({key})")


class Exploit:
    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("load", [load_dit, load_vae, load_t5])
def test_pickle_that_needs_code_execution(tmp_path, load):
    exploit = Exploit()
    exploit.path = tmp_path / "executed"
    module = {"x": torch.zeros(2), "y": torch.nn.Linear(2, 2)}
    for content in (exploit, {"generator": {"x": exploit}}, module):
        torch.save(content, tmp_path / "x.pth")
        reject(load, tmp_path / "x.pth", "code execution", "state dict")
    (tmp_path / "x.pth").write_bytes(pickle.dumps({"x": exploit}))
    reject(load, tmp_path / "x.pth", "state dict")
    assert not exploit.path.exists()


def test_pickles_that_hold_something_else(tmp_path):
    torch.save({"model": {"x": torch.zeros(2)}, "step": 3}, tmp_path / "x.pt")
    reject(load_dit, tmp_path / "x.pt", "more than tensors (model, step)", "save those alone")
    reject(formats.load_dit, tmp_path / "x.pt", "1 unexpected (x)")
    reject(formats.load_dit, tmp_path / "x.pt", "1 unexpected (x)", part="model")
    torch.save({"model.x": torch.zeros(2), "x": torch.ones(2)}, tmp_path / "x.pt")
    reject(formats.load_dit, tmp_path / "x.pt", "prefix")


# ------------------------------------------------------------------------------------------- export


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_export_and_reload_are_bit_equal(release, weights, tmp_path, dtype):
    model = load_dit(release, dtype=dtype)
    path = tmp_path / "export" / "x.safetensors"
    save_dit(model, path, METADATA)
    reloaded = load_dit(path, dtype=dtype)
    assert reloaded.cfg == model.cfg == DIT  # its two heads are not in the shapes
    assert_holds(reloaded, model.state_dict(), dtype)
    assert formats.read_metadata(path) == METADATA
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_export_is_plain_safetensors_in_the_dtype_asked_for(release, weights, tmp_path):
    path = tmp_path / "x.safetensors"
    model = load_dit(release)
    transposed = model.time_projection[1].weight
    transposed.data = transposed.data.t().contiguous().t()
    save_dit(torch.compile(model), path, METADATA, dtype=torch.bfloat16)
    assert path.stat().st_mode & 0o777 == 0o644
    with safe_open(path, "pt") as f:
        assert json.loads(f.metadata()["config"]) == json.loads(json.dumps(asdict(DIT)))
        assert json.loads(f.metadata()["levels"]) == METADATA["levels"]
    exported = load_file(path)
    assert exported.keys() == weights.keys()
    for key, value in exported.items():
        assert value.equal(weights[key].bfloat16())


def test_config_of_an_export_wins(release):
    path = release / SINGLE
    save_dit(load_dit(release), path, METADATA)
    edit_json(release / "config.json", num_heads=8)
    assert load_dit(path).cfg == DIT


def test_export_refuses(release, tmp_path):
    model = load_dit(release)

    def save(path, **options):
        save_dit(model, path, {}, **options)

    reject(save, tmp_path / "x.pt", ".safetensors")
    reject(save, tmp_path / "y.safetensors", "float16", "bfloat16", dtype=torch.float16)


def test_export_replaces_and_asks_for_values_in_order(release, weights, tmp_path):
    model = load_dit(release)
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"old")
    asked = []

    def value(name):
        asked.append(name)
        return weights[name] * 2

    with pytest.raises(ValueError, match="exists.*overwrite=True"):
        save_dit(model, path, METADATA, value=value)
    assert path.read_bytes() == b"old"
    assert not asked
    save_dit(model, path, METADATA, value=value, overwrite=True)
    assert asked == list(model.state_dict())
    assert_holds(load_dit(path), {key: value * 2 for key, value in weights.items()})
    assert formats.read_metadata(path) == METADATA


LOADS = {load_dit: SHARD, load_vae: "Wan2.2_VAE.pth", load_t5: "models_t5_umt5-xxl-enc-bf16.pth"}


@pytest.mark.parametrize("load", LOADS)
def test_another_part_in_the_place_of_a_part(shared_release, load):
    for other in LOADS.keys() - {load}:
        reject(load, shared_release / LOADS[other], LOADS[other], "missing", "unexpected")


def test_files_of_others_have_no_metadata(shared_release):
    for name in ("", SHARD, INDEX, "Wan2.2_VAE.pth"):
        assert formats.read_metadata(shared_release / name) == {}


def test_failed_export_leaves_the_old_file(release, tmp_path, monkeypatch):
    model = load_dit(release)
    path = tmp_path / "out" / "x.safetensors"
    save_dit(model, path, METADATA)
    before = path.read_bytes()

    def disk_full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(OSError, match="No space left"):
        save_dit(model, path, {}, overwrite=True)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]
