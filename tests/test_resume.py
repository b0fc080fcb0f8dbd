"""Interrupted clips go on: bit for bit, from a state that does not grow, whatever ended them."""

import copy
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import imageio.v3 as iio
import pytest
import resuming
import torch
from PIL import Image
from release import make_release
from safetensors.torch import load_file, save_file

import sample
from wan5b.dit import PRESETS, WanDiT
from wan5b.extras import clips, mp4
from wan5b.extras.formats import load_vae
from wan5b.extras.resume import decoder_reach, read_state, write_state
from wan5b.util import read_json
from wan5b.vae22 import VAE22, VAEConfig

SCRIPT = Path(sample.__file__)
LONG = ["--window", "9", "--sink", "3", "--frames", "81"]  # 7 chunks of 3 latent frames
OFTEN = ["--state-every", "1e-9"]


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    return make_release(tmp_path_factory.mktemp("resume") / "release")


class Stop(Exception):
    """In the place of whatever ends a process."""


@pytest.fixture(scope="module")
def vae():
    """A shallow one: half as many convolutions remember half as much."""
    torch.manual_seed(0)
    return VAE22(VAEConfig(dim=8, dec_dim=8, dim_mult=(1, 2, 2, 2), num_res_blocks=0))


@pytest.fixture(scope="module")
def dit(release):
    return sample.load_dit(release, "cpu", torch.float32)


@pytest.fixture
def run(release, vae, dit, tmp_path, monkeypatch):
    """run(*options, stop=None) -> the pictures that were made. stop: how many chunks until Stop.
    killed: a folder for copies of what is on the disk then, as a kill would leave it.

    The VAE stands in for the release's; the DiT is the release's, loaded once.
    """
    monkeypatch.setattr(sample, "load_vae", lambda *_: vae)
    monkeypatch.setattr(sample, "load_dit", lambda *_, **how: dit)
    Image.new("RGB", (32, 32), (200, 40, 90)).save(tmp_path / "a.png")
    add = mp4.VideoWriter.add
    made = []

    def call(*options, stop=None, out="a", killed=None):
        def watched(self, frames, *rest):
            if stop is not None and len(made) >= stop:
                if killed:
                    self.pending.result()
                    shutil.copytree(tmp_path, killed)
                raise Stop
            made.append(frames.clone())
            add(self, frames, *rest)

        monkeypatch.setattr(mp4.VideoWriter, "add", watched)
        made.clear()
        base = ["--release", release, "--device", "cpu", "--mode", "few", "--size", "32x32"]
        base += [*LONG, *OFTEN, "--out", tmp_path / out]
        if "--resume" in options:
            base = []
        elif "--prompt" not in options:
            base += ["--prompt", "a red ball"]
        sample.main(sample.parse([str(option) for option in (*base, *options)]))
        return torch.cat(made)

    def stopped(*options, after, **how):
        with pytest.raises(Stop):
            call(*options, stop=after, **how)
        return torch.cat(made)

    call.until = stopped
    return call


def pictures(path):
    return torch.from_numpy(iio.imread(path, plugin="pyav"))


CHANGES = ["--prompt", "a", "b", "c", "--at", "0.9", "1.9", "--interpolate", "3"]
CASES = {
    "image, changes": ["--image", "a.png", "--frames", "85", *CHANGES],
    "recache": ["--prompt", "a", "b", "--at", "1.5", "--recache", "--sink-rope", "relative"],
    "guided": ["--mode", "many", "--steps", "2"],
    "last steps kept": ["--recipe", "kept.toml", "--image", "a.png"],
}
KEPT = """
causal = true
solver = "renoise"
chunk = 3
image = "inside"
levels = [1000, 750, 500, 250]
levels_after = [1000, 500]
clean_pass = false
"""


@pytest.mark.parametrize("name", CASES)
def test_goes_on_bit_for_bit(run, tmp_path, capsys, name):
    """Interrupted twice, the clip's pictures are those of one that was never interrupted."""
    (tmp_path / "kept.toml").write_text(KEPT)
    files = ("a.png", "kept.toml")
    options = [str(tmp_path / text) if text in files else text for text in CASES[name]]
    whole = run(*options, out="whole")
    assert not (tmp_path / "whole.state.safetensors").exists()

    state = tmp_path / "a.state.safetensors"
    first = run.until(*options, after=2)
    assert f"note: --resume {state} goes on with it" in capsys.readouterr().err
    about = read_state(state).about
    assert about["pictures"] == len(first)
    second = run.until("--resume", state, after=3)
    size = state.stat().st_size
    capsys.readouterr()
    third = run("--resume", state)
    assert "goes on with it" not in capsys.readouterr().err
    assert torch.equal(torch.cat([first, second, third]), whole)
    assert size < 10**6

    # Nothing is left but the clip and its record, the same as the other's.
    names = {path.name for path in tmp_path.iterdir()} - set(files)
    assert names == {"a.mp4", "a.json", "whole.mp4", "whole.json"}
    records = [read_json(tmp_path / f"{name}.json") for name in ("a", "whole")]
    for record in records:
        del record["settings"]["out"]
    assert records[0] == records[1]
    shown = pictures(tmp_path / "a.mp4")
    assert shown.shape == whole.shape
    error = (shown.float() - pictures(tmp_path / "whole.mp4").float()).abs().mean()
    assert error < 4  # of the codec, whose keyframes lie elsewhere


def test_goes_on_with_what_a_kill_would_leave(run, tmp_path, tmp_path_factory):
    """The last state and the video that grew are enough. In the process itself, without its end."""
    killed = tmp_path_factory.mktemp("killed") / "there"
    first = run.until(after=6, killed=killed)
    for path in tmp_path.iterdir():
        path.unlink()
    shutil.copytree(killed, tmp_path, dirs_exist_ok=True)
    state = tmp_path / "a.state.safetensors"
    about = read_state(state).about
    assert about["video"].endswith(".partial.mp4")
    assert len(pictures(tmp_path / about["video"])) >= about["pictures"]
    rest = run("--resume", state)
    again = len(first) - about["pictures"]
    assert again > 0
    assert torch.equal(rest[:again], first[about["pictures"] :])
    assert len(pictures(tmp_path / "a.mp4")) == about["pictures"] + len(rest)
    assert {path.name for path in tmp_path.iterdir()} == {"a.png", "a.mp4", "a.json"}


@pytest.mark.slow
def test_goes_on_after_a_kill(release, tmp_path, monkeypatch):
    """SIGKILL, at any time: the last state and the video that grew are enough."""
    run = resuming.runner(release, tmp_path, monkeypatch)  # with the release's own VAE
    whole = run(out="whole")
    command = [sys.executable, SCRIPT, "--release", release, "--device", "cpu", "--mode", "few"]
    command += [
        "--size",
        "32x64",
        *resuming.LONG,
        *OFTEN,
        "--out",
        tmp_path / "b",
        "--prompt",
        "a red ball",
    ]
    state = tmp_path / "b.state.safetensors"
    with subprocess.Popen([str(part) for part in command], stderr=subprocess.DEVNULL) as process:
        end = time.monotonic() + 60
        while not state.exists() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    about = read_state(state).about
    assert about["video"].endswith(".partial.mp4")
    assert len(pictures(tmp_path / about["video"])) >= about["pictures"]
    rest = run("--resume", state)
    assert torch.equal(rest, whole[about["pictures"] :])
    assert len(pictures(tmp_path / "b.mp4")) == len(whole)
    assert not list(tmp_path.glob("b*.partial.mp4"))
    assert not state.exists()


def test_stopped_while_the_video_is_ended(run, tmp_path, monkeypatch):
    """Behind the last chunk there would be nothing to go on with: the state before that stays."""
    close = mp4.VideoWriter.close

    def interrupted(writer):
        close(writer)
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(mp4.VideoWriter, "close", interrupted)
        whole = run.until(after=99)
    rest = run("--resume", tmp_path / "a.state.safetensors")
    assert torch.equal(rest, whole[-len(rest) :])


def test_what_is_quickly_made_leaves_no_state(run, tmp_path):
    """A state is for what takes longer than the time between states."""
    run.until("--state-every", "60", after=4)
    assert not list(tmp_path.glob("*.state.safetensors"))


@pytest.mark.parametrize(
    "options", [["--latents"], ["--state-every", "0"], ["--mode", "bidirectional", "--steps", "1"]]
)
def test_where_no_state_is_kept(run, tmp_path, options):
    with pytest.raises(Stop):
        run(*options, stop=0 if "bidirectional" in options else 4)
    assert not list(tmp_path.glob("*.state.safetensors"))


def test_states_that_do_not_fit(run, tmp_path, dit, monkeypatch):
    state = tmp_path / "a.state.safetensors"
    run.until(after=4)
    about = read_state(state).about

    # Another clip may not take the place of one that can go on.
    go_on = r"state\.safetensors exists; go on with it \(--resume"
    with pytest.raises(ValueError, match=go_on):
        run()
    (tmp_path / "a.mp4").rename(tmp_path / "away.mp4")
    (tmp_path / "a.json").rename(tmp_path / "away.json")
    with pytest.raises(ValueError, match=go_on):
        run()

    # Its video is gone, another's, or shorter.
    with pytest.raises(ValueError, match="its video is not there"):
        run("--resume", state)
    run("--seed", "1", out="other")
    shutil.copy(tmp_path / "other.mp4", tmp_path / "a.mp4")
    with pytest.raises(ValueError, match="its video is not there"):
        run("--resume", state)
    run("--frames", "33", "--overwrite", out="other")
    assert about["pictures"] > 33
    shutil.copy(tmp_path / "other.mp4", tmp_path / "a.mp4")
    with pytest.raises(ValueError, match="its video is not there"):
        run("--resume", state)
    (tmp_path / "a.mp4").write_text("a note")
    with pytest.raises(ValueError, match="its video is not there"):
        run("--resume", state)
    (tmp_path / "away.mp4").rename(tmp_path / "a.mp4")

    # Options that would make another clip; other weights.
    for options in (["--steps", "3"], ["--prompt", "x"], ["--out", "y"], ["--seed", "1"]):
        with pytest.raises(ValueError, match=f"leave out {options[0]}"):
            run("--resume", state, *options)
    other = copy.deepcopy(dit)
    with torch.no_grad():
        other.head.head.weight[0, 0] += 1
    with monkeypatch.context() as patch:
        patch.setattr(sample, "load_dit", lambda *_, **how: other)
        with pytest.raises(ValueError, match="other weights"):
            run("--resume", state)
    assert len(run("--resume", state)) > 0


def test_damaged_states_are_refused_in_a_line(run, tmp_path):
    state = tmp_path / "a.state.safetensors"
    run.until(after=4)
    tensors = {name: tensor.clone() for name, tensor in load_file(state).items()}
    about = read_state(state).about
    good = state.read_bytes()

    def flipped(at):
        content = bytearray(good)
        content[at] ^= 1
        state.write_bytes(bytes(content))

    def wrong(tensors, about):
        write_state(state, about, tensors)

    spoiled = [
        lambda: state.write_bytes(good[: len(good) // 2]),
        lambda: save_file(tensors, state),
        lambda: flipped(-1),
        lambda: flipped(len(good) // 2),
        lambda: flipped(good.index(b"seed") + 11),
        lambda: flipped(good.index(b"a red ball")),
        lambda: wrong(tensors, about | {"begins": ""}),
        lambda: wrong(tensors, about | {"begins": 1}),
        lambda: wrong(tensors, about | {"chunks": 0}),
        lambda: wrong(tensors, about | {"tail": [1]}),
        lambda: wrong(tensors, about | {"commits": [[0, 3]]}),
        lambda: wrong(tensors, {"settings": {}}),
        lambda: wrong(tensors | {"latents": tensors["latents"] * torch.nan}, about),
        lambda: wrong(tensors | {"latents": tensors["latents"][:, :, :, :1].contiguous()}, about),
        lambda: wrong(tensors | {"draws": tensors["draws"][:7]}, about),
        lambda: wrong(tensors, about | {"settings": about["settings"] | {"novel": 1}}),
        lambda: wrong(tensors, about | {"settings": about["settings"] | {"steps": "x"}}),
        lambda: wrong(tensors, about | {"settings": []}),
        lambda: wrong(tensors, about | {"commits": [[0, 3, 999], *about["commits"][1:]]}),
    ]
    for spoil in spoiled:
        spoil()
        with pytest.raises(ValueError, match=r"a\.state\.safetensors"):
            run("--resume", state)

    # Before ee0a455 states had no checksum: this one may be whole.
    save_file(tensors, state, {"state": json.dumps(about)})
    unknown = "whether it is whole can't be checked; go on with the version that wrote it, or begin"
    with pytest.raises(ValueError, match=rf"^.*a\.state\.safetensors has no checksum, .*{unknown}"):
        run("--resume", state)
    with pytest.raises(ValueError, match=r"--resume .*a\.mp4: the state of a clip is named like"):
        run("--resume", tmp_path / "a.mp4")
    with pytest.raises(ValueError, match="no such file; a clip has one from --state-every seconds"):
        run("--resume", tmp_path / "none.state.safetensors")


def test_states_of_other_versions(run, tmp_path):
    """One that lacks what came later goes on; of any other option it is said which it is."""
    run.until(after=4)
    state = tmp_path / "a.state.safetensors"
    tensors = load_file(state)
    about = read_state(state).about
    settings = about["settings"]

    wrong = "is not a state .* wrote: {}; take the version that wrote it, or begin the clip anew"
    write_state(state, about | {"settings": settings | {"novel": 1}}, tensors)
    with pytest.raises(ValueError, match=wrong.format("novel in it is no option here")):
        run("--resume", state)
    lacking = {name: value for name, value in settings.items() if name != "recache"}
    write_state(state, about | {"settings": lacking}, tensors)
    with pytest.raises(ValueError, match=wrong.format("it lacks recache")):
        run("--resume", state)

    earlier = {name: value for name, value in settings.items() if name not in clips.ADDED}
    write_state(state, about | {"settings": earlier}, tensors)
    assert run.until("--resume", state, after=1) is not None


@pytest.mark.parametrize("sizes", [[3] * 14, [8] * 6, [1] * 40])
@torch.no_grad()
def test_decoder_reach(vae, sizes):
    """A decoder that saw the last frames within its reach makes the same pictures, bit for bit;
    one that saw a few of them does not.
    """
    reach = decoder_reach(vae)
    assert reach == 33
    assert decoder_reach(VAE22(VAEConfig(dim=4, dec_dim=4))) == 65
    sizes = [*sizes, 3]
    assert sum(sizes[1:-1]) >= reach, "not all frames count"
    latents = torch.randn(1, 48, sum(sizes), 2, 2)
    pieces = latents.split(sizes, 2)
    stream = vae.stream()
    for piece in pieces:
        last = vae.decode_chunk(piece, stream)

    def from_tail(frames):
        stream = vae.stream()
        for i, piece in enumerate(pieces):
            if sum(sizes[i:-1]) <= frames:
                shown = vae.decode_chunk(piece, stream)
        return shown

    assert torch.equal(from_tail(reach + max(sizes)), last)
    assert not torch.equal(from_tail(9), last)


def test_a_linear_codec_has_no_past(tmp_path):
    torch.manual_seed(0)
    save_file(
        {name: torch.randn(16, 1, 4, 16, 16) for name in ("basis", "dual")},
        tmp_path / "codec_VAE.safetensors",
    )
    assert decoder_reach(load_vae(tmp_path)) == 1


def test_fingerprints_are_in_the_record(run, tmp_path, capsys):
    run("--frames", "9")
    said = read_json(tmp_path / "a.json")["weights"]
    assert len(said) == 16
    run("--frames", "9", "--seed", "1", out="b")
    assert read_json(tmp_path / "b.json")["weights"] == said
    assert clips.STATE == ".state.safetensors"

    # A record that is repeated with other weights is noted.
    run("--settings", tmp_path / "a.json", out="c")
    assert "other weights" not in capsys.readouterr().err
    record = read_json(tmp_path / "a.json")
    (tmp_path / "a.json").write_text(json.dumps(record | {"weights": "0" * 16}))
    run("--settings", tmp_path / "a.json", out="d")
    assert "a.json was made with other weights: this clip will differ" in capsys.readouterr().err
    model = WanDiT(PRESETS["tiny"])
    assert sample.fingerprint(model) != said


@pytest.mark.parametrize("kind", ["image", "video"])
def test_files_that_have_changed_since_are_noted(run, tmp_path, capsys, kind):
    """A record knows a picture by what it holds, not by its name alone; the release's files too."""
    given = tmp_path / "a.png"
    if kind == "video":
        run("--frames", "9", out="given")
        given = tmp_path / "given.mp4"
    record = tmp_path / "a.json"
    length = ["--frames", {"image": 13, "video": 21}[kind]]
    run(f"--{kind}", given, *length)
    inputs = read_json(record)["inputs"]
    assert inputs.keys() == {kind, "vae", "t5"}

    def said(out):
        capsys.readouterr()
        run("--settings", record, *length, out=out)
        notes = capsys.readouterr().err
        return [line for line in notes.splitlines() if line.startswith(f"note: {record}")]

    assert said("b") == []
    assert read_json(tmp_path / "b.json")["inputs"] == inputs

    # Of the same length and the same size, under the same name.
    if kind == "image":
        Image.new("RGB", (32, 32), (200, 40, 91)).save(given)
    else:
        run("--frames", "9", "--seed", "1", "--overwrite", out="given")
    assert said("c") == [f"note: {record} was made with other {kind}: this clip will differ"]

    # Of another release; of a recipe what is not handed to the sampler; of an earlier version.
    known = read_json(record) | {"inputs": read_json(tmp_path / "c.json")["inputs"]}
    changed = json.loads(json.dumps(known))
    changed["inputs"]["t5"] = "0" * 32
    changed["recipe"]["fps"] = 12
    record.write_text(json.dumps(changed))
    assert said("d") == [f"note: {record} was made with other t5, fps: this clip will differ"]
    del known["inputs"]
    record.write_text(json.dumps(known))
    unknown = f"does not say what its {kind}, vae, t5 held"
    assert said("e") == [f"note: {record} {unknown}: whether they do still can't be checked"]


def test_an_index_of_shards_stands_for_them(tmp_path):
    """It only names them, and is the same when one is another."""
    folder = tmp_path / "text_encoder"
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text("{}")
    (folder / "model-00001-of-00001.safetensors").write_bytes(bytes(100))
    (tmp_path / "wan2.2_vae.safetensors").write_bytes(bytes(100))
    args = sample.parse(["--release", str(tmp_path)])
    before = clips.inputs_of(args)
    (folder / "model-00001-of-00001.safetensors").write_bytes(bytes(99) + b"x")
    after = clips.inputs_of(args)
    assert before["t5"] != after["t5"]
    assert before["vae"] == after["vae"]
