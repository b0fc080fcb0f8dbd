"""Files from strangers: nothing in them runs, and what is wrong with them is one line that names
them.
"""

import io
import json
import os
import pickle
import shutil
import warnings
import zipfile
from dataclasses import asdict

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import nn

from wan5b import fsdp
from wan5b.data import Store, TextStore
from wan5b.extras import checkpoints, formats
from wan5b.extras.shards import write_shard
from wan5b.optim import AdamW
from wan5b.weights import save_dit

INDEX = "diffusion_pytorch_model.safetensors.index.json"


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
    checkpoints.save(made.world, folder, {"generator": made}, {"step": step}, keep=9)
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
    for call in (formats.load_dit, checkpoints.read_weights):
        assert "system" in refused(call, path)
    assert "system" in refused(checkpoints.load, made.world, path, {"generator": made})
    assert not (tmp_path / "ran").exists()


def test_weights_and_shards_of_a_checkpoint_run_nothing(release, tmp_path):
    torch.save({"generator": Evil(tmp_path / "ran")}, tmp_path / "x.pt")
    refused(formats.load_dit, tmp_path / "x.pt")
    torch.save(Evil(tmp_path / "ran"), release / "Wan2.2_VAE.pth")
    refused(formats.load_vae, release)
    made, path = checkpoint(tmp_path / "run")
    for shard in path.glob("*.distcp"):
        torch.save(Evil(tmp_path / "ran"), shard)
    refused(checkpoints.load, made.world, path, {"generator": made})
    assert not (tmp_path / "ran").exists()


def test_a_pickle_among_the_tensors_of_a_checkpoint_runs_nothing(tmp_path):
    """torch opens what an index calls bytes as a pickle without restriction."""
    made, path = checkpoint(tmp_path / "run")
    index = checkpoints.Reader(path).read_metadata()
    for name in index.state_dict_metadata:
        index.state_dict_metadata[name] = dcp.metadata.BytesStorageMetadata()
    (path / ".metadata").write_bytes(pickle.dumps(index))
    torch.save(Evil(tmp_path / "ran"), path / "__0_0.distcp")
    for call in (formats.load_dit, formats.check_checkpoint, checkpoints.read_weights):
        assert "BytesStorageMetadata" in refused(call, path)
    refused(checkpoints.load, made.world, path, {"generator": made})
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
    assert [found.name for found in checkpoints.complete(tmp_path)] == ["step-0000002"]
    checkpoints.save(made.world, tmp_path, {"generator": made}, {"step": 4}, keep=1)
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
            said = refused(checkpoints.load, made.world, path, {"generator": made})
            assert "step-0000004 is damaged" in said, name
            assert "step-0000002" in said
        (path / name).write_bytes(whole)
    checkpoints.load(made.world, path, {"generator": made})


def larger(index):
    for entry in index.state_dict_metadata.values():
        entry.size = entry.chunks[0].sizes = torch.Size((10**6, 10**6))


def holed(index):
    for entry in index.state_dict_metadata.values():
        entry.chunks.clear()


def elsewhere(index):
    for place in index.storage_data.values():
        place.relative_path = "../step-0000002/__0_0.distcp"


def textual(index):
    for entry in index.state_dict_metadata.values():
        entry.size = "size"


@pytest.mark.parametrize("change", [larger, holed, elsewhere, textual])
def test_an_index_of_a_checkpoint_that_lies(tmp_path, change):
    """It is refused before memory is taken, and no part of a tensor is left as it was."""
    checkpoint(tmp_path, 2)
    _, path = checkpoint(tmp_path, 4)
    formats.check_checkpoint(path)
    index = checkpoints.Reader(path).read_metadata()
    change(index)
    (path / ".metadata").write_bytes(pickle.dumps(index))
    for call in (formats.check_checkpoint, formats.load_dit):
        said = refused(call, path)
        assert "step-0000004 is damaged" in said
        assert "take step-0000002" in said


def test_a_checkpoint_that_is_not_finite(tmp_path):
    made, path = checkpoint(tmp_path)
    with torch.no_grad():
        made.parameters["weight"][1, 2] = torch.nan
    checkpoints.save(made.world, tmp_path, {"generator": made}, {"step": 3}, keep=9)
    assert "master.weight" in refused(
        checkpoints.load, made.world, path.with_name("step-0000003"), {"generator": made}
    )


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


SAID = [
    {"levels": 5},
    {"levels": []},
    {"levels": [None]},
    {"levels": ["1000"]},
    {"shift": "5"},
    {"shift": [5.0]},
    {"shift": 0},
    {"shift": True},
    {"chunk": "3"},
    {"chunk": 0},
    {"chunk": 2.5},
    {"prefix": -1},
    {"stage": 3},
    {"step": "7"},
    {"training": []},
    {"data": "x"},
]


@pytest.mark.parametrize("said", SAID, ids=str)
def test_metadata_of_other_types(pristine, tmp_path, said):
    """Of an export, and of a checkpoint."""
    (name,) = said
    file = tmp_path / "x.safetensors"
    save_dit(formats.load_dit(pristine), file, said)
    assert f"x.safetensors: {name} is" in refused(formats.read_metadata, file)
    _, path = checkpoint(tmp_path)
    facts = json.loads((path / "facts.json").read_text())
    (path / "facts.json").write_text(json.dumps(facts | said))
    assert f"step-0000001: {name} is" in refused(formats.read_metadata, path)


def test_metadata_of_other_programs(pristine, tmp_path):
    """What is no JSON is not ours; what has no sizes is not ours either; null says nothing."""
    model = formats.load_dit(pristine)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    config = json.dumps(asdict(model.cfg))
    file = tmp_path / "x.safetensors"
    shutil.copy(pristine / "config.json", tmp_path)
    ours = {"config": config, "chunk": "3", "shift": "5.0"}
    for header, says in (
        (ours | {"format": "pt", "modelspec.title": "my tune"}, {"chunk": 3, "shift": 5.0}),
        (ours | {"chunk": "null"}, {"shift": 5.0}),
        ({"format": "pt"}, {}),
        ({"config": "configs/wan.yaml"}, {}),
        ({"config": '"WanModel"', "chunk": "[]"}, {}),
        ({"config": '{"transformer": {}}', "shift": "[]"}, {}),
    ):
        save_file(tensors, file, header)
        assert formats.load_dit(file).cfg == model.cfg
        assert formats.read_metadata(file) == says


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
    [
        None,
        3,
        ["a"],
        {},
        "../outside.safetensors",
        "/etc/passwd",
        "none.safetensors",
        "",
        "a\nb",
        ".",
    ],
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


def test_zips_whose_sizes_lie(release):
    """Each of them torch would map: as noise, or as what belongs to another tensor."""
    path = release / "Wan2.2_VAE.pth"
    formats.load_vae(release)
    whole = zipfile.ZipFile(io.BytesIO(path.read_bytes()))
    entries = {entry.filename: whole.read(entry) for entry in whole.infolist()}
    first = next(name for name in entries if name.endswith("data/0"))
    pickled = next(name for name in entries if name.endswith("data.pkl"))

    def write(changed=entries, compression=zipfile.ZIP_STORED, twice=""):
        with zipfile.ZipFile(path, "w", compression) as archive:
            for name, content in changed.items():
                archive.writestr(name, content)
            if twice:
                archive.writestr(twice, entries[twice])

    write()
    formats.load_vae(release)
    for says, options in {
        "has 1 bytes": {"changed": entries | {first: b"x"}},
        "bytes, should have": {"changed": entries | {first: entries[first] + bytes(4)}},
        "KeyError": {"changed": {name: entries[name] for name in entries if name != first}},
        "data.pkl": {"changed": {name: entries[name] for name in entries if name != pickled}},
        "compressed": {"compression": zipfile.ZIP_DEFLATED},
        "two entries of one name": {"twice": first},
    }.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # zipfile's, of the second entry
            write(**options)
        said = refused(formats.load_vae, release)
        assert says in said
        assert path.name in said

    # A local header that says it is longer moves what follows it.
    write()
    content = bytearray(path.read_bytes())
    start = zipfile.ZipFile(path).getinfo(first).header_offset
    content[start + 28 : start + 30] = (64).to_bytes(2, "little")
    path.write_bytes(content)
    assert "overlaps" in refused(formats.load_vae, release)


def test_a_tensor_that_claims_more_than_its_storage(tmp_path):
    """The pickle of a large tensor with the bytes of a small one."""
    path = tmp_path / "x.pt"
    torch.save({"patch_embedding.weight": torch.zeros(10, 1000)}, path)
    claim = zipfile.ZipFile(path).read("x/data.pkl")
    torch.save({"patch_embedding.weight": torch.zeros(10)}, path)
    small = zipfile.ZipFile(io.BytesIO(path.read_bytes()))
    with zipfile.ZipFile(path, "w") as archive:
        for name in small.namelist():
            archive.writestr(name, claim if name == "x/data.pkl" else small.read(name))
    assert "has 40 bytes, should have 40000" in refused(formats.load_dit, path)


def expanded(tensor):
    return tensor[:1, :1].expand(10**5, 10**6)


ODD = {
    "sparse": lambda tensor: tensor.to_sparse(),
    "on meta": lambda tensor: tensor.to("meta"),
    "expanded": expanded,
    "empty": lambda tensor: tensor[:0],
    "int8": lambda tensor: (tensor / tensor.abs().max() * 127).to(torch.int8),
    "uint8": lambda tensor: (tensor / tensor.abs().max() * 127 + 128).to(torch.uint8),
    "int32": lambda tensor: tensor.view(torch.int32),
    "bool": lambda tensor: tensor > 0,
    "complex": lambda tensor: tensor.to(torch.complex64),
    "float8 without its scale": lambda tensor: (tensor / tensor.abs().max() * 448).to(
        torch.float8_e4m3fn
    ),
    "e5m2 without its scale": lambda tensor: (tensor / tensor.abs().max() * 57344).to(
        torch.float8_e5m2
    ),
    "NaN in float8": lambda tensor: tensor.masked_fill(tensor > 0, torch.nan).to(
        torch.float8_e4m3fn
    ),
    "overflown": lambda tensor: (tensor * 1e7).half(),
}


@pytest.mark.parametrize("kind", ODD)
def test_tensors_that_are_no_weights(pristine, tmp_path, kind):
    state = formats.load_dit(pristine).state_dict()
    name = "blocks.1.ffn.2.weight"
    shutil.copy(pristine / "config.json", tmp_path)
    torch.save(state | {name: ODD[kind](state[name])}, tmp_path / "x.pt")
    said = refused(formats.load_dit, tmp_path / "x.pt")
    assert name in said
    assert "x.pt" in said


def test_float8_without_scales_by_design_is_read(pristine, tmp_path):
    state = formats.load_dit(pristine).state_dict()
    shutil.copy(pristine / "config.json", tmp_path)
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        cast = {key: value.to(dtype) for key, value in state.items()}
        torch.save(cast, tmp_path / "x.pt")
        loaded = formats.load_dit(tmp_path / "x.pt").state_dict()
        assert all(torch.equal(loaded[key], cast[key].float()) for key in cast)


def test_what_trainers_save(pristine, tmp_path):
    """The one part that is meant, behind names that trainers have for it; else one line."""
    shutil.copy(pristine / "config.json", tmp_path)
    path = tmp_path / "x.pt"
    right = formats.load_dit(pristine).state_dict()
    wrong = {name: tensor + 1 for name, tensor in right.items()}
    optimizer = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-4}]}
    for held in (
        {"state_dict": right, "step": 5},
        {"model": right, "optimizer": optimizer, "epoch": 3, "args": {"lr": "1e-4"}},
        {"module": right, "ema": None},
        {"model": wrong, "ema": right, "opt": optimizer},
        {"generator": wrong, "critic": wrong, "generator_ema": right},
        {"generator": right, "critic": wrong, "generator_ema": {}},
        {"model_state_dict": right, "loss": torch.zeros(())},
        {"state_dict": {"model." + name: tensor for name, tensor in right.items()}},
        {"state_dict": {"generator": right, "critic": wrong}},
        {"transformer": right, "scheduler": {"last_lr": [0.1]}},
    ):
        torch.save(held, path)
        loaded = formats.load_dit(path).state_dict()
        assert all(torch.equal(loaded[name], right[name]) for name in right), list(held)

    loop = {}
    loop["model"] = loop
    for held in ({"a": right, "b": wrong}, {"a": [right]}, {"model": 3}, {"model": {}}, loop):
        torch.save(held, path)
        assert "more than tensors" in refused(formats.load_dit, path)


def test_names_that_would_break_a_line(pristine, tmp_path):
    state = formats.load_dit(pristine).state_dict()
    save_file(state | {"a\nb\x1b[31m": torch.zeros(1)}, tmp_path / "x.safetensors")
    assert "a\\nb" in refused(formats.load_dit, tmp_path / "x.safetensors")


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
