"""What scripts load by extras/formats.py: upstream's files, train.py's checkpoints, the codec."""

import json
import shutil
from dataclasses import asdict

import pytest
import torch
import torch.distributed.checkpoint as dcp
from release import DIT, SPIECE, T5, make_release, random_weights, write_dit
from safetensors.torch import save_file

from wan5b import weights
from wan5b.dit import WanDiT
from wan5b.extras import formats, layouts, peers
from wan5b.extras.codec import LinearCodec
from wan5b.t5 import T5Encoder
from wan5b.vae22 import VAE22, VAEConfig

FACTS = {"stage": "dmd", "step": 7, "levels": [1.0, 0.0], "shift": 5.0}


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    return make_release(tmp_path_factory.mktemp("release") / "shared")


@pytest.fixture(scope="module")
def state():
    return random_weights(WanDiT(DIT), 5).state_dict()


def write_checkpoint(folder, state, **groups):
    """A folder as train.py's; groups: by how much the state is scaled in each of them."""
    entries = {"critic.master.x": torch.zeros(2)}
    for group, scale in groups.items():
        entries |= {f"generator.{group}.{name}": value * scale for name, value in state.items()}
    dcp.save(entries, checkpoint_id=folder, no_dist=True)
    facts = FACTS | {"config": asdict(DIT), "optimizer_steps": {"generator": 7}}
    (folder / "facts.json").write_text(json.dumps(facts))
    return folder


def assert_holds(model, expected, dtype=torch.float32):
    given = model.state_dict()
    assert given.keys() == expected.keys()
    for key, value in given.items():
        assert value.equal(expected[key].to(dtype)), key


@pytest.mark.parametrize("name", ["load_dit", "load_vae", "load_t5"])
def test_upstream_s_files_load_as_by_weights(release, name):
    ours, theirs = getattr(formats, name)(release), getattr(weights, name)(release)
    assert ours.cfg == theirs.cfg
    assert_holds(ours, theirs.state_dict(), next(theirs.parameters()).dtype)
    assert not ours.training


def test_tokenizer_of_a_release(release):
    ids, mask = formats.load_tokenizer(release, 64)(["a red circle"])
    assert ids.shape == mask.shape == (1, 64)
    assert formats.load_tokenizer(release).length == 512


def test_checkpoint_folder(tmp_path, state):
    """The average, if kept, else the masters; sizes and metadata of facts.json."""
    folder = write_checkpoint(tmp_path / "step-0000007", state, master=1, ema=3, exp_avg=9)
    averaged = {key: value * 3 for key, value in state.items()}
    cfg, tensors = formats.open_dit(folder, channels=48)
    assert cfg == DIT  # its two heads are not in the shapes
    assert tensors.keys() == state.keys()
    assert_holds(formats.load_dit(folder), averaged)
    assert_holds(formats.load_dit(str(folder), "cpu", torch.bfloat16), averaged, torch.bfloat16)
    assert formats.read_metadata(folder) == FACTS

    shutil.rmtree(folder)
    write_checkpoint(folder, state, master=1, exp_avg=9)
    assert_holds(formats.load_dit(folder), state)


def test_broken_checkpoint_folders(tmp_path, state):
    folder = write_checkpoint(tmp_path / "step-0000007", state, master=1)
    with pytest.raises(ValueError, match="48 latent channels where 16 are needed"):
        formats.load_dit(folder, channels=16)
    with pytest.raises(ValueError, match="missing .*unexpected"):
        formats.load_vae(folder)
    with pytest.raises(ValueError, match="no weights"):
        weights.load_dit(folder)  # which knows upstream's files only
    (folder / "facts.json").unlink()
    with pytest.raises(ValueError, match=r"facts.json: no such file"):
        formats.load_dit(folder)
    (folder / "facts.json").write_text("{}")
    for shard in folder.glob("*.distcp"):
        shard.unlink()
    with pytest.raises(ValueError, match="step-0000007 is damaged or incomplete"):
        formats.load_dit(folder)


def test_metadata_of_an_export_and_of_others(release, state, tmp_path):
    model = formats.load_dit(release)
    path = tmp_path / "x.safetensors"
    weights.save_dit(model, path, FACTS)
    assert formats.read_metadata(path) == FACTS
    for _ in range(5):  # a file's header has no order of its own
        assert list(formats.read_metadata(path)) == sorted(FACTS)
    assert formats.read_metadata(release) == {}
    assert formats.read_metadata(release / "Wan2.2_VAE.pth") == {}

    nulls = tmp_path / "nulls.safetensors"
    weights.save_dit(model, nulls, FACTS | {"chunk": None, "shift": None})
    told = {key: value for key, value in FACTS.items() if key not in ("chunk", "shift")}
    assert formats.read_metadata(nulls) == told


def test_linear_codec_in_the_place_of_the_vae(tmp_path):
    path = tmp_path / "codec_VAE.safetensors"
    state = {key: torch.randn(16, 1, 4, 16, 16) for key in ("basis", "dual")}
    save_file(state, path)
    codec = formats.load_vae(tmp_path)
    assert isinstance(codec, LinearCodec)
    assert (codec.cfg.z_dim, codec.cfg.strides) == (48, (4, 16, 16))
    assert_holds(codec, state)
    assert not codec.training
    assert_holds(formats.load_vae(path, "cpu", torch.bfloat16), state, torch.bfloat16)

    save_file({"basis": state["basis"]}, path)
    with pytest.raises(ValueError, match=r"codec_VAE.safetensors .*1 missing \(dual\)"):
        formats.load_vae(tmp_path)
    save_file({key: value[:8].clone() for key, value in state.items()}, path)
    says = r"2 misshapen \(basis \[8, 1, 4, 16, 16\], not \[16, 1, 4, 16, 16\]"
    with pytest.raises(ValueError, match=says):
        formats.load_vae(tmp_path)


# ------------------------------------------------------------------------ names of others' files

STEM = "diffusion_pytorch_model"
# Where diffusers and transformers keep weights: the files, of which the last is an index of shards.
SAVES = [
    ("dit", [f"{STEM}.fp16.safetensors"]),
    ("dit", [f"{STEM}.bin"]),
    (
        "dit",
        [f"{STEM}.fp16-{i}-of-2.safetensors" for i in (1, 2)],
        f"{STEM}.safetensors.index.fp16",
    ),
    (
        "dit",
        [f"{STEM}-{i}-of-2.bf16.safetensors" for i in (1, 2)],
        f"{STEM}.safetensors.index.bf16",
    ),
    ("dit", [f"{STEM}-{i}-of-2.bin" for i in (1, 2)], f"{STEM}.bin.index"),
    ("vae", [f"{STEM}.bin"]),
    ("vae", [f"{STEM}-{i}-of-2.safetensors" for i in (1, 2)], f"{STEM}.safetensors.index"),
    ("t5", ["pytorch_model.bin"]),
    ("t5", [f"pytorch_model-{i}-of-2.bin" for i in (1, 2)], "pytorch_model.bin.index"),
    ("t5", [f"model.fp16-{i}-of-2.safetensors" for i in (1, 2)], "model.safetensors.index.fp16"),
]
MODELS = {
    "dit": (WanDiT, DIT, layouts.diffusers_config),
    "vae": (VAE22, VAEConfig(dim=2, dec_dim=3), peers.vae_config),
    "t5": (T5Encoder, T5, peers.t5_config),
}


def save(path, tensors):
    torch.save(tensors, path) if path.suffix in (".bin", ".pth") else save_file(tensors, path)


@pytest.mark.parametrize(("kind", "files", "index"), [(*case, "")[:3] for case in SAVES])
def test_variants_pickles_and_shards_of_diffusers(kind, files, index, tmp_path):
    """In a pipeline, in the part's own folder, and in one of any other name."""
    build, cfg, config = MODELS[kind]
    state = random_weights(build(cfg), 3).state_dict()
    back = layouts.names(kind, back=True)
    theirs = {back(name): tensor for name, tensor in state.items()}
    part = tmp_path / "pipeline" / formats.PIPELINE[kind]
    part.mkdir(parents=True)
    (part / "config.json").write_text(json.dumps(config(cfg)))
    shard_of = {name: files[i % len(files)] for i, name in enumerate(sorted(theirs))}
    for file in files:
        save(part / file, {k: tensor for k, tensor in theirs.items() if shard_of[k] == file})
    if index:
        (part / f"{index}.json").write_text(json.dumps({"weight_map": shard_of}))
    shutil.copytree(part, tmp_path / "other")
    load = getattr(formats, f"load_{kind}")
    for folder in (part.parent, part, tmp_path / "other"):
        assert_holds(load(folder, dtype=torch.float32), state)


def test_the_plain_file_goes_before_a_variant(tmp_path, state):
    write_dit(tmp_path, single=True, weights=state)
    save_file(
        {key: value * 2 for key, value in state.items()}, tmp_path / f"{STEM}.fp16.safetensors"
    )
    (tmp_path / "ti2v_5B_lora.safetensors").touch()
    assert_holds(formats.load_dit(tmp_path), state)
    save_file(state, tmp_path / f"{STEM}.bf16.safetensors")
    (tmp_path / f"{STEM}.safetensors").unlink()
    with pytest.raises(ValueError, match=r"holds 2 that it could be .*fp16.*name one"):
        formats.load_dit(tmp_path)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("vae", "wan2.2_vae.pth"),
        ("vae", "Wan2.2_Vae.safetensors"),
        ("t5", "MODELS_T5_UMT5-XXL-ENC-BF16.PTH"),
        ("t5", "umt5-xxl-enc-bf16.pth"),
    ],
)
def test_names_in_any_case_beside_the_release_s_dit(kind, name, tmp_path, state):
    build, cfg, _ = MODELS[kind]
    held = random_weights(build(cfg), 3).state_dict()
    write_dit(tmp_path, weights=state)
    (torch.save if name.lower().endswith(".pth") else save_file)(held, tmp_path / name)
    assert_holds(getattr(formats, f"load_{kind}")(tmp_path, dtype=torch.float32), held)
    assert_holds(formats.load_dit(tmp_path), state)


@pytest.mark.parametrize(
    "cfg",
    [
        VAEConfig(dim=2, dec_dim=4, num_res_blocks=1),
        VAEConfig(dim=2, dec_dim=2, num_res_blocks=3, dim_mult=(1, 2, 3, 4)),
    ],
)
def test_a_vae_s_stages_are_in_its_shapes(cfg, tmp_path):
    held = random_weights(VAE22(cfg), 3).state_dict()
    torch.save(held, tmp_path / "Wan2.2_VAE.pth")
    vae = formats.load_vae(tmp_path)
    assert vae.cfg == cfg
    assert_holds(vae, held)

    # Time halved in the first stage, and a stage too many: other networks.
    time = held[f"encoder.downsamples.1.downsamples.{cfg.num_res_blocks}.time_conv.weight"]
    last = held["encoder.downsamples.3.downsamples.0.residual.2.weight"]
    for name, tensor in (("0.downsamples.9.time_conv", time), ("4.downsamples.0.residual.2", last)):
        other = held | {f"encoder.downsamples.{name}.weight": tensor}
        torch.save(other, tmp_path / "Wan2.2_VAE.pth")
        with pytest.raises(ValueError, match=r"Wan2.2_VAE.pth is no VAE of Wan2.2 \(4x16x16\)"):
            formats.load_vae(tmp_path)


def test_the_tokenizer_s_folder_and_file(tmp_path):
    shutil.copy(SPIECE, tmp_path)
    usual = formats.load_tokenizer(tmp_path)(["a red circle"])[0]
    assert formats.load_tokenizer(tmp_path / "spiece.model")(["a red circle"])[0].equal(usual)


def test_errors_name_the_shard(tmp_path, state, monkeypatch):
    damaged = {key: value.clone() for key, value in state.items()}
    damaged["blocks.1.ffn.0.bias"][2] = torch.nan
    write_dit(tmp_path, weights=damaged)
    index = json.loads((tmp_path / f"{STEM}.safetensors.index.json").read_text())
    shard = index["weight_map"]["blocks.1.ffn.0.bias"]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=rf"^{shard}: blocks.1.ffn.0.bias: NaN"):
        formats.load_dit(".")
    (tmp_path / f"{STEM}.safetensors.index.json").write_text('{"weight_map": {}}')
    with pytest.raises(ValueError, match=r"index.json is no index of shards"):
        formats.load_dit(".")
