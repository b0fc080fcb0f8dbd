"""Files from strangers: nothing in them runs, and what is wrong with them is one line that names
them.
"""

import json
import os
import pickle
import shutil

import pytest
import torch
from release import make_release
from safetensors.torch import load_file, save_file
from torch import nn

from wan5b import fsdp
from wan5b.data import Store, TextStore, write_shard
from wan5b.extras import formats
from wan5b.optim import AdamW

INDEX = "diffusion_pytorch_model.safetensors.index.json"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    return make_release(tmp_path_factory.mktemp("untrusted") / "release")


@pytest.fixture
def release(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "release")


def refused(call, *args, **options) -> str:
    with pytest.raises((ValueError, OSError)) as error:
        call(*args, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


class Evil:
    """A pickle of it makes a file when it is opened carelessly."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def checkpoint(folder, step=1):
    torch.manual_seed(0)
    made = AdamW(nn.Linear(4, 4), fsdp.World("cpu"), {}, 1e-3, (0.9, 0.99), 0.0, ema=True)
    fsdp.save(made.world, folder, {"generator": made}, {"step": step}, keep=9)
    return made, folder / f"step-{step:07d}"


# ------------------------------------------------------------------------------------ nothing runs


def test_a_hidden_index_in_a_release_is_not_opened(release, tmp_path):
    (release / "facts.json").write_text("{}")
    (release / ".metadata").write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    formats.load_dit(release)
    formats.load_vae(release)
    assert not (tmp_path / "ran").exists()


def test_an_index_of_a_checkpoint_runs_nothing(tmp_path):
    made, path = checkpoint(tmp_path / "run")
    (path / ".metadata").write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    for call in (formats.load_dit, fsdp.read_weights):
        assert "system" in refused(call, path)
    assert "system" in refused(fsdp.load, made.world, path, {"generator": made})
    assert not (tmp_path / "ran").exists()


def test_weights_and_shards_of_a_checkpoint_run_nothing(release, tmp_path):
    torch.save({"generator": Evil(tmp_path / "ran")}, tmp_path / "x.pt")
    refused(formats.load_dit, tmp_path / "x.pt")
    torch.save(Evil(tmp_path / "ran"), release / "Wan2.2_VAE.pth")
    refused(formats.load_vae, release)
    made, path = checkpoint(tmp_path / "run")
    for shard in path.glob("*.distcp"):
        torch.save(Evil(tmp_path / "ran"), shard)
    refused(fsdp.load, made.world, path, {"generator": made})
    assert not (tmp_path / "ran").exists()


# ------------------------------------------------------------------------------------- checkpoints


def test_only_checkpoints_count(tmp_path):
    made, path = checkpoint(tmp_path, 2)
    shutil.copytree(path, tmp_path / "step-0000002-good")
    shutil.copytree(path, tmp_path / "step-0000009-from-2")
    os.symlink(path.name, tmp_path / "step-latest")
    os.symlink(path.name, tmp_path / "step-0000008")
    (tmp_path / "step-0000007").mkdir()
    (tmp_path / "step-0000006.tar").write_bytes(b"x")
    (tmp_path / "step-notes.txt").write_text("x")
    assert [found.name for found in fsdp.checkpoints(tmp_path)] == ["step-0000002"]
    fsdp.save(made.world, tmp_path, {"generator": made}, {"step": 4}, keep=1)
    names = {found.name for found in tmp_path.iterdir()}
    kept = {"step-0000002-good", "step-0000009-from-2", "step-latest", "step-notes.txt"}
    assert names >= kept | {"step-0000004", "step-0000006.tar"}
    assert "step-0000002" not in names


def test_a_damaged_checkpoint_names_the_one_before(tmp_path):
    made, _ = checkpoint(tmp_path, 2)
    _, path = checkpoint(tmp_path, 4)
    for name in (".metadata", "facts.json", "__0_0.distcp"):
        whole = (path / name).read_bytes()
        for damaged in (b"", whole[: len(whole) // 2], b"x" * len(whole)):
            (path / name).write_bytes(damaged)
            said = refused(fsdp.load, made.world, path, {"generator": made})
            assert "step-0000004 is damaged" in said, name
            assert "step-0000002" in said
        (path / name).write_bytes(whole)
    fsdp.load(made.world, path, {"generator": made})


# ------------------------------------------------------------------------------ sizes, values, JSON


CONFIGS = [
    {"dim": "128"},
    {"dim": None},
    {"dim": [128]},
    {"dim": 10**9},
    {"dim": 0},
    {"num_layers": 10**6},
    {"num_heads": -2},
    {"num_heads": 3.5},
    {"text_len": {}},
    {"eps": "small"},
    {"eps": float("nan")},
]


@pytest.mark.parametrize("change", CONFIGS, ids=str)
def test_configs_of_other_types_and_sizes(release, change):
    config = json.loads((release / "config.json").read_text())
    (release / "config.json").write_text(json.dumps(config | change))
    said = refused(formats.load_dit, release)
    assert "config.json" in said or next(iter(change)) in said


@pytest.mark.parametrize("text", ["[]", "null", "3", '"x"', "{", ""])
@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_json_that_is_no_record(release, name, text):
    (release / name).write_text(text)
    assert name in refused(formats.load_dit, release)


def test_a_byte_order_mark_is_no_damage(release):
    for name in ("config.json", INDEX):
        (release / name).write_text("\ufeff" + (release / name).read_text(), encoding="utf-8")
    formats.load_dit(release)


@pytest.mark.parametrize(
    "target",
    [None, 3, ["a"], {}, "../outside.safetensors", "/etc/passwd", "none.safetensors", ""],
    ids=str,
)
def test_an_index_names_files_beside_it(release, tmp_path, target):
    shard = release / "diffusion_pytorch_model-00001-of-00003.safetensors"
    shutil.copy(shard, tmp_path / "outside.safetensors")
    index = json.loads((release / INDEX).read_text())
    key = next(iter(index["weight_map"]))
    index["weight_map"][key] = target
    (release / INDEX).write_text(json.dumps(index))
    refused(formats.load_dit, release)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite(release, value):
    shard = release / "diffusion_pytorch_model-00002-of-00003.safetensors"
    tensors = load_file(shard)
    name = next(key for key in tensors if key.endswith("ffn.2.weight"))
    tensors[name][0, 0] = value
    save_file(tensors, shard)
    assert name in refused(formats.load_dit, release)
    overflowed = {key: (tensor * 1e7).half() for key, tensor in load_file(shard).items()}
    save_file(overflowed, shard)
    refused(formats.load_dit, release)


def test_tensors_larger_than_their_file(tmp_path):
    """What claims a gigabyte of a few bytes is refused, not read as noise."""
    path = tmp_path / "x.pt"
    torch.save({"patch_embedding.weight": torch.zeros(1).expand(10**4, 10**5)}, path)
    assert "x.pt" in refused(formats.load_dit, path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "LFS"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"GGUF\x03\0\0\0" + bytes(64), "GGUF"),
        (b"", "truncated"),
        (bytes(100), "truncated"),
    ],
)
@pytest.mark.parametrize("name", ["Wan2.2_VAE.pth", "config.json"])
def test_something_else_in_a_files_place(release, content, says, name):
    (release / name).write_bytes(content)
    said = refused(formats.load_vae if name.endswith("pth") else formats.load_dit, release)
    assert name in said
    assert says in said or name == "config.json"


def test_files_of_other_systems_and_other_models_beside(release):
    """macOS's ._ files, and the VAE of Wan2.1 beside the one that is meant."""
    (release / "._Wan2.2_VAE.pth").write_bytes(b"x")
    (release / "._diffusion_pytorch_model.safetensors.index.json").write_bytes(b"x")
    torch.save({"x": torch.zeros(1)}, release / "Wan2.1_VAE.pth")
    formats.load_vae(release)
    formats.load_dit(release)


# ------------------------------------------------------------------------------------------ stores


def test_stores_with_other_headers_and_values(tmp_path):
    good = {"prompts": ["a", "b"], "facts": {}, "made_from": ""}
    path = tmp_path / "s" / "00000.safetensors"
    tensors = {"latent": torch.zeros(2, 3)}
    for change in (
        {"prompts": "ab"},
        {"prompts": [1, 2]},
        {"prompts": ["a"]},
        {"prompts": None},
        {"facts": []},
        {"made_from": 3},
    ):
        write_shard(path, tensors, ["a", "b"])
        save_file(tensors, path, {"wan5b": json.dumps(good | change)})
        assert path.name in refused(Store, path.parent), change
    save_file(tensors, path, {"wan5b": "[]"})
    assert path.name in refused(Store, path.parent)

    write_shard(path, {"latent": torch.tensor([[0.0], [float("nan")]])}, ["a", "b"])
    store = Store(path.parent)
    assert store[0]["latent"] == 0
    assert "latent 1" in refused(store.__getitem__, 1)


def test_text_stores_whose_lengths_lie(tmp_path):
    path = tmp_path / "t" / "00000.safetensors"
    rows = torch.zeros(3, 4)
    for lengths in ([3, 3], [-1, 4], [1, 1]):
        write_shard(path, {"rows": rows, "lengths": torch.tensor(lengths)}, ["a", "b"])
        assert path.name in refused(TextStore, path.parent), lengths
