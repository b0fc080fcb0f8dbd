"""Faults that `make test-faults` has found, one by one."""

import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import zipfile
from contextlib import closing
from pathlib import Path

import pytest
import torch
from common import GOLDEN
from release import make_release
from safetensors.torch import load_file, save_file
from test_untrusted import checkpoint, refused

import prepare
import sample
from wan5b.extras import checkpoints, cli, clips, formats, log, mp4
from wan5b.extras.config import Options, read
from wan5b.extras.lora import read_lora
from wan5b.vae22 import Stream

ROOT = Path(__file__).parent.parent
FORMATS = GOLDEN / "formats"
sys.path.append(str(ROOT / "tools" / "faults"))
from damage import FORMS, damaged  # noqa: E402


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


# ---------------------------------------------------------------------------------------- campaign


def test_damage_follows_from_its_seed():
    content = (FORMATS / "lora/musubi.safetensors").read_bytes()
    for seed in range(40):
        first = damaged(content, "safetensors", random.Random(seed))
        assert first == damaged(content, "safetensors", random.Random(seed))
        assert first[1] != content
    assert FORMS["json"](b'{"a": 1}', random.Random(0)) != b'{"a": 1}'


# ----------------------------------------------------------------------------------------- weights


def test_comfy_files_with_an_empty_mark():
    """scaled_fp8 is a tensor without elements there, and no damage."""
    file = FORMATS / "comfy/umt5_xxl_fp8_e4m3fn_scaled.safetensors"
    assert load_file(file)["scaled_fp8"].numel() == 0
    formats.load_t5(file)


@pytest.mark.parametrize("name", ["data/0", "data.pkl"])
def test_a_flipped_bit_does_not_fit_its_checksum(tmp_path, name):
    release = make_release(tmp_path / "release")
    path = release / "Wan2.2_VAE.pth"
    entry = zipfile.ZipFile(path).getinfo(f"Wan2.2_VAE/{name}")
    start = path.read_bytes().index(zipfile.ZipFile(path).read(entry)[:64])
    flip(path, start + entry.file_size // 2)
    said = refused(formats.load_vae, release)
    assert f"{name} does not fit its checksum" in said
    assert path.name in said


def test_files_without_checksums_are_read(tmp_path):
    release = make_release(tmp_path / "release")
    path = release / "Wan2.2_VAE.pth"
    weights = formats.load_vae(release).state_dict()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(weights, path)
    finally:
        torch.serialization.set_crc32_options(True)
    formats.load_vae(release)


def test_a_flipped_bit_in_a_checkpoint(tmp_path, monkeypatch):
    """Of two processes, one finds it."""
    _, path = checkpoint(tmp_path)
    shard = path / "__0_0.distcp"
    weight = checkpoints.read_weights(path)["weight"].numpy().tobytes()
    formats.check_checkpoint(path)
    flip(shard, shard.read_bytes().index(weight) + 3)
    assert "checksum" in refused(formats.check_checkpoint, path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    found = 0
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        try:
            formats.check_checkpoint(path)
        except ValueError:
            found += 1
    assert found == 1


def test_whole_numbers_written_with_a_point(tmp_path):
    folder = shutil.copytree(FORMATS / "diffusers/vae", tmp_path / "vae")
    config = json.loads((folder / "config.json").read_text())
    config["base_dim"] = float(config["base_dim"])
    config["dim_mult"] = [float(mult) for mult in config["dim_mult"]]
    (folder / "config.json").write_text(json.dumps(config))
    formats.load_vae(folder)


DIFFUSERS = [
    ("transformer", {"eps": [1e-6]}),
    ("transformer", {"attention_head_dim": "64"}),
    ("transformer", {"a\nb": 3}),
    ("vae", {"dim_mult": ["1", 2]}),
    ("vae", {"base_dim": 4.5}),
    ("vae", {"temperal_downsample": [3]}),
    ("text_encoder", {"d_kv": [64]}),
    ("text_encoder", {"num_layers": {}}),
]


@pytest.mark.parametrize(("part", "change"), DIFFUSERS, ids=str)
def test_configs_of_diffusers_of_other_types(tmp_path, part, change):
    folder = shutil.copytree(FORMATS / "diffusers" / part, tmp_path / part)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    load = {"transformer": formats.load_dit, "vae": formats.load_vae}.get(part, formats.load_t5)
    assert "config.json: " in refused(load, folder)


@pytest.mark.parametrize(
    "text", ["5", "[]", '{"layers": 3}', '{"layers": {"a": 3}}', "{", "[" * 9999]
)
def test_descriptions_of_quantisation(tmp_path, text):
    file = FORMATS / "comfy/wan2.2_ti2v_5B_fp16.safetensors"
    save_file(load_file(file), tmp_path / "x.safetensors", {"_quantization_metadata": text})
    assert "x.safetensors" in refused(formats.load_dit, tmp_path / "x.safetensors")


# ------------------------------------------------------------------------------------------- LoRAs


@pytest.fixture(scope="module")
def shapes():
    _, tensors = formats.open_dit(FORMATS / "original")
    return {name: tensor.shape for name, tensor in tensors.items()}


@pytest.mark.parametrize("text", ["5", "{", '"x"', "[" * 9999])
def test_headers_of_loras(tmp_path, shapes, text):
    tensors = load_file(FORMATS / "lora/pytorch_lora_weights_alpha.safetensors")
    save_file(tensors, tmp_path / "x.safetensors", {"lora_adapter_metadata": text})
    assert "x.safetensors" in refused(read_lora, tmp_path / "x.safetensors", shapes)


@pytest.mark.parametrize(
    "change",
    [
        {"lora_alpha": "8"},
        {"lora_alpha": [8]},
        {"alpha_pattern": [1]},
        {"alpha_pattern": {"(": 8}},
        {"alpha_pattern": {"blocks": "8"}},
    ],
    ids=str,
)
def test_configs_of_loras(tmp_path, shapes, change):
    folder = shutil.copytree(FORMATS / "lora/peft", tmp_path / "peft")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | change))
    assert str(folder) in refused(read_lora, folder, shapes)


@pytest.mark.parametrize("role", ["lora_down.weight", "lora_up.weight", "alpha"])
def test_tensors_that_belong_to_no_lora(tmp_path, shapes, role):
    tensors = load_file(FORMATS / "lora/musubi.safetensors")
    key = next(key for key in tensors if key.endswith(role))
    odd = torch.zeros(2) if role == "alpha" else tensors[key].flatten().clone()
    for changed in ({key: odd}, {key: torch.zeros(0, 4)}, {"a\nb": torch.zeros(1)}):
        save_file(tensors | changed, tmp_path / "x.safetensors")
        assert "x.safetensors" in refused(read_lora, tmp_path / "x.safetensors", shapes)


def test_a_flipped_bit_in_a_lora_of_torch(tmp_path, shapes):
    path = tmp_path / "x.pt"
    path.write_bytes((FORMATS / "lora/longlive_lora.pt").read_bytes())
    read_lora(path, shapes)
    flip(path, len(path.read_bytes()) // 2)
    assert "x.pt" in refused(read_lora, path, shapes)


# ------------------------------------------------------------------------------------------- texts


def test_texts_nested_too_deep(tmp_path, capsys):
    deep = "[" * 100_000
    (tmp_path / "list.jsonl").write_text(f'{{"video": {deep}}}\n')
    assert "list.jsonl" in refused(prepare.list_videos, tmp_path / "list.jsonl")
    (tmp_path / "x.json").write_text(deep)
    assert "x.json" in refused(sample.parse, ["--settings", str(tmp_path / "x.json")])
    (tmp_path / "x.toml").write_text(f"a = {deep}")
    assert "x.toml" in refused(read, Options, [str(tmp_path / "x.toml")])
    (tmp_path / "metrics.jsonl").write_text(f'{deep}\n{{"step": 0}}\n')
    assert log.read_metrics(tmp_path / "metrics.jsonl") == [{"step": 0}]
    assert "line 1, is damaged" in capsys.readouterr().err


def test_what_terminals_take_for_commands_is_printed_as_text(capsys):
    def fail():
        raise ValueError("a\x1b[31mb\nc ü")

    with pytest.raises(SystemExit):
        cli.script(fail)
    assert capsys.readouterr().err.endswith("error: a\\x1b[31mb\\nc ü\n")


# ----------------------------------------------------------------------------------------- writing


class Flat(torch.nn.Module):
    """A VAE of one brightness."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))  # says where it is

    def stream(self):
        return Stream()

    def decode_chunk(self, latent, state):
        return torch.full((1, 3, 5, 32, 32), latent.mean().item())


def write(path, number, **options):
    latents = [torch.full((1, 48, 1, 2, 2), number / 5)]
    clips.write(Flat(), latents, path, frames=5, record={"number": number}, **options)


def test_a_record_never_lies_beside_another_clip(tmp_path, monkeypatch):
    path = tmp_path / "x.mp4"
    write(path, 1)
    before = path.read_bytes()

    def killed(source, target):
        # As it would be after a kill right here.
        assert path.read_bytes() == before
        assert not path.with_suffix(".json").exists()
        raise OSError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(mp4.os, "replace", killed)
        with pytest.raises(OSError, match="killed"):
            write(path, 2, overwrite=True)
    write(path, 3, overwrite=True)
    assert json.loads(path.with_suffix(".json").read_text())["number"] == 3


@pytest.mark.parametrize("links", [True, False])
def test_a_new_clip_takes_its_name_whole(tmp_path, monkeypatch, links):
    def no_links(*_):
        raise PermissionError("a file system without links")

    if not links:
        monkeypatch.setattr(mp4.os, "link", no_links)
    write(tmp_path / "x.mp4", 1)
    assert sorted(os.listdir(tmp_path)) == ["x.json", "x.mp4"]
    writer = mp4.VideoWriter(tmp_path / "y.mp4")
    (tmp_path / "y.mp4").write_bytes(b"another's")
    writer.add(torch.zeros(2, 32, 32, 3, dtype=torch.uint8))
    with pytest.raises(FileExistsError, match="y.mp4 exists by now"):
        writer.close()
    assert (tmp_path / "y.mp4").read_bytes() == b"another's"


def test_a_disk_that_is_full_from_the_start_does_not_crash_the_encoder(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    writer = mp4.VideoWriter(tmp_path / "x.mp4")
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        with pytest.raises(OSError, match="x.*mp4"), closing(writer):
            writer.add(torch.zeros(9, 32, 32, 3, dtype=torch.uint8))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not os.listdir(tmp_path)


def test_a_full_disk_has_a_name(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        with pytest.raises(OSError, match="metrics.jsonl"):
            log.append(tmp_path, {"step": 0})
        with pytest.raises(OSError, match="lock"):
            log.locked(tmp_path / "run").__enter__()
        with pytest.raises(OSError, match="x.json"):
            clips.write_json(tmp_path / "x.json", {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_checkpoint_killed_while_it_is_pruned_is_none(tmp_path, monkeypatch):
    made, path = checkpoint(tmp_path, 1)

    def killed(_):
        raise OSError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.shutil, "rmtree", killed)
        with pytest.raises(OSError, match="killed"):
            checkpoints.save(made.world, tmp_path, {"generator": made}, {"step": 2}, keep=1)
    assert not path.exists()
    checkpoints.save(made.world, tmp_path, {"generator": made}, {"step": 3}, keep=1)
    assert os.listdir(tmp_path) == ["step-0000003"]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_ctrl_c_in_a_save_is_no_error_of_the_disk(tmp_path, monkeypatch, stop):
    """torch wraps it, or raises another error when the writer is closed half-way."""

    def interrupted(*_, **__):
        try:
            raise stop
        finally:
            raise RuntimeError("unexpected pos 367 vs 337")

    made, _ = checkpoint(tmp_path, 1)
    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(stop):
        checkpoints.save(made.world, tmp_path, {"generator": made}, {"step": 2})
    assert [path.name for path in checkpoints.complete(tmp_path)] == ["step-0000001"]


class FullDisk(io.RawIOBase):
    """It takes some hundred bytes, and of an archive that breaks off its end."""

    left = 300

    def writable(self) -> bool:
        return True

    def write(self, data) -> int:
        if 0 < self.left < len(data):
            self.left = 0
            raise OSError(28, "No space left on device")
        self.left -= min(self.left, len(data))
        return len(data)


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    """torch's writer of archives ends with an error of its own, that of an unexpected place."""
    made, path = checkpoint(tmp_path, 1)
    inner = torch.save
    monkeypatch.setattr(torch, "save", lambda x, _, **options: inner(x, FullDisk(), **options))
    said = r"step-0000002: the disk is full \(No space left on device\): .* GB are free; make room"
    with pytest.raises(OSError, match=said):
        checkpoints.save(made.world, tmp_path, {"generator": made}, {"step": 2})
    assert checkpoints.complete(tmp_path) == [path]


# ----------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("script", ["sample.py", "train.py", "prepare.py"])
def test_stopped_while_modules_load(tmp_path, script, number):
    """In place of torch comes a module that is interrupted."""
    stopped = f"import os, time\nos.kill(os.getpid(), {int(number)})\ntime.sleep(30)"
    (tmp_path / "torch.py").write_text(stopped)
    command = [sys.executable, str(ROOT / script), "--help"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    ended = subprocess.run(command, capture_output=True, env=environment, timeout=20)
    assert ended.returncode == -number
    assert ended.stderr == b""


# ----------------------------------------------------------------------------------- the campaign


@pytest.mark.slow
def test_a_short_campaign(tmp_path):
    """Every format's whole file is read, and nothing comes of damage but what is promised."""
    command = [sys.executable, "tools/faults", "--files", "60", "--kills", "10", "--seed", "1"]
    done = subprocess.run([*command, "--out", tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "seed 1: 70 in" in done.stdout
