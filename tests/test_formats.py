"""What scripts load by extras/formats.py: upstream's files, train.py's checkpoints, the codec."""

import json
import shutil
from dataclasses import asdict

import pytest
import torch
import torch.distributed.checkpoint as dcp
from release import DIT, make_release, random_weights
from safetensors.torch import save_file

from wan5b import weights
from wan5b.dit import WanDiT
from wan5b.extras import formats
from wan5b.extras.codec import LinearCodec

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
