"""Checkpoints in others' layouts: the numbers come back, and the peers' own folders come out."""

import json
import resource
import runpy
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from common import GOLDEN
from release import DIT, random_weights
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_formats import write_checkpoint

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))
import convert

from wan5b.dit import DiTConfig, WanDiT
from wan5b.extras import formats, layouts, lora, recipes
from wan5b.extras.exports import Model
from wan5b.extras.recipes import recognise
from wan5b.extras.scaled import Made
from wan5b.extras.tensor_files import GB, Entry, new_folder, split, write_stream
from wan5b.t5 import T5Config
from wan5b.vae22 import VAEConfig
from wan5b.weights import open_tensors, read_json, save_dit

ROOT = Path(__file__).parent.parent
FORMATS = GOLDEN / "formats"
COMFY = FORMATS / "comfy"
FACTS = {"stage": "dmd", "step": 7, "levels": [1.0, 0.0], "shift": 3.0, "chunk": 3}
PARTS = {"dit": "transformer", "vae": "vae", "t5": "text_encoder"}


def run(source, target, layout, *options):
    convert.main([str(source), str(target), "--layout", layout, *map(str, options)])
    return target


def held(path, kind="dit"):
    """Tensors by upstream's names; scaled float8 made."""
    tensors = formats.open_layout(path, kind).tensors
    return {
        name: tensor.tensor() if isinstance(tensor, Made) else tensor
        for name, tensor in tensors.items()
    }


def assert_same(path, expected, kind="dit"):
    given = held(path, kind)
    assert given.keys() == expected.keys()
    for name, tensor in given.items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name


def comfy_folder(folder, *names):
    folder.mkdir()
    for name in names:
        shutil.copy(COMFY / f"{name}.safetensors", folder)
    return folder


# ------------------------------------------------------------------------------------ whole models


def test_there_and_back(tmp_path):
    """The original through diffusers' and ComfyUI's layouts, bit for bit, all three models."""
    there = run(FORMATS / "original", tmp_path / "there", "diffusers", "--shard-size", 0.0002)
    comfy = run(there, tmp_path / "comfy", "comfy")
    back = run(comfy, tmp_path / "back", "original", "--shard-size", 0.0002)
    assert len([*back.glob("diffusion_pytorch_model-*-of-00002.safetensors")]) == 2
    for kind in PARTS:
        expected = held(FORMATS / "original", kind)
        for folder in (there, comfy, back):
            assert_same(folder, expected, kind)
    spiece = (FORMATS / "original/google/umt5-xxl/spiece.model").read_bytes()
    assert (back / "google/umt5-xxl/spiece.model").read_bytes() == spiece
    assert read_json(back / "config.json") == read_json(FORMATS / "original/config.json")
    assert formats.open_dit(comfy)[0] == formats.open_dit(FORMATS / "original")[0]


def test_as_the_peers_save_it(tmp_path):
    """From the release: every config, every field; every tensor; the same classes."""
    theirs = FORMATS / "diffusers"
    ours = run(FORMATS / "original", tmp_path / "ours", "diffusers", "--shard-size", 0.00016)
    names = ["model_index.json", "scheduler/scheduler_config.json"]
    names += [f"{part}/config.json" for part in PARTS.values()]
    for name in names:
        assert read_json(ours / name) == read_json(theirs / name), name
    for part in PARTS.values():
        [mine, other] = [shard_tensors(folder / part) for folder in (ours, theirs)]
        assert mine.keys() == other.keys()
        for name, tensor in mine.items():
            assert torch.equal(tensor, other[name]), name
    assert (ours / "tokenizer/spiece.model").read_bytes() == (
        theirs / "tokenizer/spiece.model"
    ).read_bytes()

    index = "transformer/diffusion_pytorch_model.safetensors.index.json"
    mine, other = read_json(ours / index), read_json(theirs / index)
    assert mine["metadata"] == other["metadata"]
    assert list(mine["weight_map"]) == list(other["weight_map"])
    assert len(set(mine["weight_map"].values())) == 3


@pytest.mark.parametrize("layout", ["original", "diffusers", "comfy"])
def test_the_recipe_goes_along(tmp_path, layout):
    """Of a pipeline that is known by its class alone, which no layout here keeps."""
    source = shutil.copytree(FORMATS / "diffusers", tmp_path / "source")
    index = source / "model_index.json"
    index.write_text(index.read_text().replace('"WanPipeline"', '"WanDMDPipeline"'))
    before = recipes.recognise(str(source), None, {})
    made = run(source, tmp_path / "made", layout)
    after = recipes.recognise(str(made), None, formats.read_metadata(made))
    assert (before.name, before.why) == ("fastwan", "model_index.json")
    assert (after.name, after.why) == ("fastwan", "its metadata")
    for name in recipes.SAMPLING:
        assert getattr(after.recipe, name) == getattr(before.recipe, name), name


def shard_tensors(folder):
    tensors = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            assert opened.metadata()["format"] == "pt"
        tensors |= load_file(file)
    return tensors


def test_tokenizers_of_every_layout(tmp_path):
    """A pipeline's other files stay; ComfyUI's tensor becomes spiece.model."""
    names = ("wan2.2_ti2v_5B_fp16", "wan2.2_vae", "umt5_xxl_fp16")
    source = comfy_folder(tmp_path / "comfy", *names)
    shutil.copy(COMFY / "config.json", source)
    piece = (FORMATS / "diffusers/tokenizer/spiece.model").read_bytes()
    made = run(source, tmp_path / "from comfy", "diffusers")
    assert (made / "tokenizer/spiece.model").read_bytes() == piece
    kept = run(FORMATS / "diffusers", tmp_path / "kept", "original")
    for file in (FORMATS / "diffusers/tokenizer").iterdir():
        assert (kept / "google/umt5-xxl" / file.name).read_bytes() == file.read_bytes()


def test_scaled_float8(tmp_path):
    """fp8 times scale, rounded to bfloat16 as by the reader; in float32 exactly."""
    names = ("Wan2_2-TI2V-5B_fp8_e4m3fn_scaled_KJ", "wan2.2_vae", "umt5_xxl_fp8_e4m3fn_scaled")
    source = comfy_folder(tmp_path / "comfy", *names)
    shutil.copy(COMFY / "config.json", source)
    rounded = run(source, tmp_path / "rounded", "original")
    exact = run(source, tmp_path / "exact", "diffusers", "--dtype", "float32")
    dit = held(source)
    assert_same(exact, dit)
    for kind, count in (("dit", 20), ("t5", 14)):
        expected = held(source, kind)
        scaled = formats.open_layout(source, kind).tensors
        made = [name for name, tensor in scaled.items() if isinstance(tensor, Made)]
        assert len(made) == count
        assert_same(rounded, expected | {name: expected[name].bfloat16() for name in made}, kind)
    assert_same(rounded, held(source, "vae"), "vae")
    assert held(rounded, "vae")["conv1.weight"].dtype == torch.float16


def test_a_release_with_an_export_in_it(tmp_path):
    """What it says of itself goes along, and its shift to diffusers' scheduler."""
    source = tmp_path / "source"
    shutil.copytree(FORMATS / "original", source)
    for file in source.glob("diffusion_pytorch_model*"):
        file.unlink()
    model = formats.load_dit(FORMATS / "original")
    save_dit(model, source / "diffusion_pytorch_model.safetensors", FACTS)
    there = run(source, tmp_path / "there", "diffusers", "--shard-size", 0.0002)
    assert read_json(there / "scheduler/scheduler_config.json")["flow_shift"] == 3.0
    back = run(there, tmp_path / "back", "comfy")
    for folder in (source, there, back):
        assert formats.read_metadata(folder) == FACTS
    assert_same(back, model.state_dict())


# ---------------------------------------------------------------------------------------- DiT alone


@pytest.fixture
def export(tmp_path):
    path = tmp_path / "export.safetensors"
    save_dit(random_weights(WanDiT(DIT), 3), path, FACTS, dtype=torch.bfloat16)
    return path


@pytest.mark.parametrize("layout", ["original", "diffusers", "comfy"])
@pytest.mark.parametrize("shard", [10, 0.0005])
def test_what_an_export_says_survives(tmp_path, export, layout, shard):
    """Its sizes too: two heads are not in the shapes."""
    target = tmp_path / ("made.safetensors" if layout == "comfy" else "made")
    run(export, target, layout, "--shard-size", shard)
    assert_same(target, held(export))
    assert formats.open_dit(target)[0] == DIT
    assert formats.read_metadata(target) == FACTS
    if target.is_dir():
        config = read_json(target / "config.json")
        assert config["num_layers"] == DIT.num_layers
        sharded = any(target.glob("*.index.json"))
        assert sharded == (shard < 10)


@pytest.mark.parametrize("kind", ["checkpoint", "trainer", "prefixes"])
@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_whatever_can_be_read(tmp_path, kind, layout):
    """A folder of train.py, in float32; a trainer's parts; ComfyUI's names of a saved model."""
    state = random_weights(WanDiT(DIT), 6).state_dict()
    source = tmp_path / "source.pt"
    if kind == "checkpoint":
        source = write_checkpoint(tmp_path / "step-0000007", state, master=1)
    elif kind == "trainer":
        torch.save({"generator": {f"model.{k}": v for k, v in state.items()}, "step": 3}, source)
    else:
        source = tmp_path / "source.safetensors"
        save_file({f"model.diffusion_model.{k}": v for k, v in state.items()}, source)
    (tmp_path / "config.json").write_text(json.dumps({"num_heads": DIT.num_heads}))
    made = run(source, tmp_path / "made", layout)
    assert_same(made, state)
    assert formats.open_dit(made)[0] == DIT
    facts = {"stage": "dmd", "step": 7, "levels": [1.0, 0.0], "shift": 5.0}
    assert formats.read_metadata(made) == (facts if kind == "checkpoint" else {})


def test_loras(tmp_path):
    """Merged as by the loader, rounded once, and named."""
    file = FORMATS / "lora" / "comfy_alpha.safetensors"
    base = held(COMFY / "wan2.2_ti2v_5B_fp16.safetensors")
    made = {}
    for dtype in ("float16", "float32"):
        target = tmp_path / f"{dtype}.safetensors"
        options = ["--lora", f"{file}:0.5", "--dtype", dtype]
        made[dtype] = run(COMFY / "wan2.2_ti2v_5B_fp16.safetensors", target, "comfy", *options)
    merged = lora.merged(base, [(file, 0.5)])
    changed = [name for name, tensor in merged.items() if isinstance(tensor, Made)]
    assert len(changed) == 10
    exact = {name: tensor.float() for name, tensor in base.items()}
    exact |= {name: merged[name].tensor() for name in changed}
    assert_same(made["float32"], exact)
    assert_same(made["float16"], {name: tensor.half() for name, tensor in exact.items()})
    assert formats.read_metadata(made["float32"])["loras"] == [[file.name, 0.5]]
    own = run(COMFY / "wan2.2_ti2v_5B_fp16.safetensors", tmp_path / "own", "original", *options[:2])
    assert_same(own, held(made["float16"]))


def test_export_diffusers(tmp_path):
    model = random_weights(WanDiT(DIT), 4)
    formats.export_diffusers(model, tmp_path / "transformer", FACTS)
    assert_same(tmp_path / "transformer", model.state_dict())
    assert formats.read_metadata(tmp_path / "transformer") == FACTS
    with pytest.raises(ValueError, match="transformer exists"):
        formats.export_diffusers(model, tmp_path / "transformer", FACTS)


def test_how_it_is_sampled_survives(tmp_path, capsys):
    """FastWan's pipeline through every layout, and diffusers' class for it; LongLive's .pt."""
    fast = tmp_path / "fast"
    shutil.copytree(FORMATS / "diffusers", fast)
    index = read_json(fast / "model_index.json") | {"_class_name": "WanDMDPipeline"}
    (fast / "model_index.json").write_text(json.dumps(index))
    source = fast
    for layout in ("original", "comfy", "diffusers"):
        source = run(source, tmp_path / layout, layout)
        for given in ((str(source), None), ("x", str(source))):
            found = recognise(*given, formats.read_metadata(source))
            assert (found.name, found.why) == ("fastwan", "its metadata")
    assert read_json(source / "model_index.json")["_class_name"] == "WanDMDPipeline"
    alone = run(fast / "transformer", tmp_path / "alone.safetensors", "comfy")
    assert formats.read_metadata(alone) == {"recipe": "fastwan"}

    longlive = run(GOLDEN / "longlive2" / "model_bf16.pt", tmp_path / "longlive", "original")
    assert formats.read_metadata(longlive) == {"recipe": "longlive2"}

    # What LoRAs make of it is for the user to say.
    turbo = tmp_path / "Turbo_lora.safetensors"
    shutil.copy(FORMATS / "lora" / "comfy_alpha.safetensors", turbo)
    merged = run(FORMATS / "original", tmp_path / "merged", "original", "--lora", turbo)
    assert "add --recipe turbo" in capsys.readouterr().err
    said = formats.read_metadata(merged)
    assert said == {"loras": [[turbo.name, 1.0]]}
    assert recognise(str(merged), None, said) is None
    options = ("--lora", turbo, "--recipe", "turbo")
    merged = run(FORMATS / "original", tmp_path / "said", "original", *options)
    assert formats.read_metadata(merged)["recipe"] == "turbo"


def test_the_part_that_is_sampled(tmp_path):
    """LongLive samples the generator where others sample its average."""
    state = random_weights(WanDiT(DIT), 6).state_dict()
    parts = {"generator": state, "generator_ema": {k: 2 * v for k, v in state.items()}}
    torch.save(parts, tmp_path / "model.pt")
    (tmp_path / "config.json").write_text(json.dumps({"num_heads": DIT.num_heads}))
    own = run(tmp_path / "model.pt", tmp_path / "own", "original")
    assert_same(own, parts["generator_ema"])
    options = ("--recipe", "longlive2-stage1")
    assert_same(run(tmp_path / "model.pt", tmp_path / "made", "original", *options), state)


# ------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(
    ("kind", "name", "cfg", "dtype", "counts"),
    [
        ("dit", "ti2v-5B", DiTConfig(), torch.float32, {5: 5, 10: 3, 20: 1}),
        ("dit", "ti2v-5B", DiTConfig(), torch.bfloat16, {10: 1}),
        ("vae", "vae22", VAEConfig(), torch.float32, {10: 1}),
        ("t5", "umt5-xxl", T5Config(), torch.bfloat16, {5: 3, 10: 2}),
    ],
)
def test_the_real_models(kind, name, cfg, dtype, counts):
    """Every key has a name there, and shards are as many as diffusers and transformers make."""
    shapes = json.loads((GOLDEN / f"manifest_{name}.json").read_text())
    entries = {k: Entry(torch.empty(shape, device="meta"), dtype) for k, shape in shapes.items()}
    theirs = Model(kind, cfg, entries).theirs()
    assert layouts.upstream(ROOT, kind, {k: e.tensor for k, e in theirs.items()}) == {
        k: e.tensor for k, e in entries.items()
    }
    for limit, count in counts.items():
        parts = split(theirs, limit * GB)
        assert len(parts) == count
        assert sum(map(len, parts)) == len(shapes)
        assert all(sum(entry.nbytes for entry in part.values()) <= limit * GB for part in parts)


def test_a_stream_is_what_safetensors_writes(tmp_path):
    """Alignment included, for every dtype, sizes that are odd, no axes."""
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.randn(7).bfloat16(),
        "c": torch.tensor(2.5),
        "d": torch.arange(5, dtype=torch.uint8),
        "e": torch.randn(1, 3).half(),
    }
    header = {"format": "pt", "name": "ü"}
    entries = {name: Entry(tensor, tensor.dtype) for name, tensor in tensors.items()}
    write_stream(tmp_path / "ours", entries, header)
    save_file(tensors, tmp_path / "theirs", header)
    ours, theirs = [(tmp_path / name).read_bytes() for name in ("ours", "theirs")]
    data = sum(tensor.nbytes for tensor in tensors.values())
    assert ours[-data:] == theirs[-data:]
    with safe_open(tmp_path / "ours", "pt") as opened:
        assert opened.metadata() == header
        assert all(torch.equal(opened.get_tensor(name), tensors[name]) for name in tensors)
    starts = [offset for name, offset in offsets(ours).items() if tensors[name].itemsize == 4]
    assert all(start % 4 == 0 for start in starts)


def offsets(content):
    size = int.from_bytes(content[:8], "little")
    assert size % 8 == 0
    described = json.loads(content[8 : 8 + size])
    return {k: v["data_offsets"][0] for k, v in described.items() if k != "__metadata__"}


def test_weights_that_no_file_should_hold(tmp_path, export):
    for value, dtype, message in (
        (torch.nan, "bfloat16", "NaN or infinity"),
        (torch.inf, "float32", "NaN or infinity"),
        (1e5, "float16", "beyond float16's range"),
    ):
        tensors = {name: tensor.clone() for name, tensor in open_tensors(export).tensors.items()}
        tensors["blocks.1.ffn.0.bias"][3] = value
        source = tmp_path / "bad.safetensors"
        with safe_open(export, "pt") as opened:
            save_file(tensors, source, opened.metadata())
        with pytest.raises(ValueError, match=rf"bad.safetensors: blocks.1.ffn.0.bias: .*{message}"):
            run(source, tmp_path / "made", "original", "--dtype", dtype)
        assert not [*tmp_path.glob("made*")]


def test_nothing_is_overwritten(tmp_path, export):
    full = tmp_path / "full"
    full.mkdir()
    for target, layout in ((full, "diffusers"), (export, "comfy"), (full, "comfy")):
        with pytest.raises(ValueError, match=f"{target} exists"):
            run(export, target, layout)
    with pytest.raises(ValueError, match=r"must end in .safetensors"):
        run(export, tmp_path / "made", "comfy")
    (tmp_path / "made.partial").mkdir()
    with pytest.raises(ValueError, match=r"made.partial exists, .* delete it"):
        run(export, tmp_path / "made", "original")
    assert sorted(tmp_path.glob("made*")) == [tmp_path / "made.partial"]


def test_folders_that_are_half_a_model(tmp_path):
    folder = tmp_path / "half"
    shutil.copytree(FORMATS / "original", folder)
    (folder / "Wan2.2_VAE.pth").unlink()
    with pytest.raises(ValueError, match="holds a text encoder but no VAE"):
        run(folder, tmp_path / "made", "diffusers")
    shutil.rmtree(folder / "google")
    shutil.copy(FORMATS / "original/Wan2.2_VAE.pth", folder)
    with pytest.raises(ValueError, match=r"spiece.model"):
        run(folder, tmp_path / "made", "diffusers")
    save_file({name: torch.ones(16, 1, 4, 16, 16) for name in ("basis", "dual")}, folder / "V")
    (folder / "Wan2.2_VAE.pth").unlink()
    (folder / "V").rename(folder / "codec_VAE.safetensors")
    with pytest.raises(ValueError, match="linear codec"):
        run(folder, tmp_path / "made", "diffusers")
    assert not [*tmp_path.glob("made*")]


@pytest.mark.parametrize("layout", ["original", "diffusers", "comfy"])
def test_a_full_disk_is_one_line(tmp_path, layout):
    """Here by a limit on the size of files; what was begun is removed."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, limits[1]))
        with pytest.raises(OSError, match=r"cannot write \S*: File too large$"):
            run(FORMATS / "original", tmp_path / "made", layout)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert not [*tmp_path.iterdir()]


def test_too_little_room(tmp_path, monkeypatch, export):
    free = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: free)
    with pytest.raises(OSError, match=r"made: the disk is too full: .*, 1.0 kB are free"):
        run(export, tmp_path / "deep" / "made", "original")
    assert not (tmp_path / "deep").exists()


def test_interrupted(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(convert.exports, "write_pickle", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(FORMATS / "original", tmp_path / "made", "original")
    assert not [*tmp_path.iterdir()]


def test_a_folder_has_its_name_at_the_end(tmp_path):
    with new_folder(tmp_path / "made") as partial:
        (partial / "x").write_text("x")
        assert not (tmp_path / "made").exists()
        with pytest.raises(ValueError, match=r"made.partial exists"):
            new_folder(tmp_path / "made").__enter__()
    assert (tmp_path / "made/x").read_text() == "x"
    assert [*tmp_path.iterdir()] == [tmp_path / "made"]


def test_a_command_s_mistake_is_one_line(tmp_path, monkeypatch, capsys):
    handler = signal.getsignal(signal.SIGTERM)
    arguments = ["no/such", str(tmp_path / "x"), "--layout=comfy"]
    monkeypatch.setattr(sys, "argv", ["tools/convert.py", *arguments])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "tools" / "convert.py"), run_name="__main__")
    signal.signal(signal.SIGTERM, handler)
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("convert.py: error: no/such: no such file")
    assert said.count("\n") == 1
