"""Interrupted clips in clumsy hands: moved, copied, taken up by two, ended again at once, beside
other people's files. What was made is never lost, and never joined to another clip.
"""

import os
import shutil

import pytest
import torch
from PIL import Image
from release import make_release
from resuming import runner
from safetensors.torch import load_file

import sample
from wan5b.extras import mp4
from wan5b.extras.resume import read_state, write_state
from wan5b.util import read_json


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    return make_release(tmp_path_factory.mktemp("again") / "release")


@pytest.fixture(scope="module")
def whole(release, tmp_path_factory):
    """The pictures of a clip that was never interrupted."""
    with pytest.MonkeyPatch.context() as patch:
        return runner(release, tmp_path_factory.mktemp("whole"), patch, 69)()


@pytest.fixture
def run(release, tmp_path, monkeypatch):
    return runner(release, tmp_path, monkeypatch, 69)


@pytest.fixture
def state(tmp_path):
    return tmp_path / "a.state.safetensors"


def names(folder):
    return {path.name for path in folder.iterdir()} - {"a.png"}


def kill(state):
    """The files of an ended process as those of a killed one: a partial mp4, and no record."""
    about = read_state(state).about | {"video": "a.0.partial.mp4"}
    write_state(state, about, load_file(state))
    state.with_name("a.mp4").rename(state.with_name("a.0.partial.mp4"))
    state.with_name("a.json").unlink()


@pytest.mark.parametrize("folder", ["b", "50% naïve [x] b"])
def test_a_copy_goes_on_where_it_lies(run, whole, tmp_path, state, folder):
    """In a folder of its own, with any name; the first one stays as it was."""
    first = run.until(after=3)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("a.*")}
    there = tmp_path / folder
    there.mkdir()
    for suffix in (".mp4", ".json", ".state.safetensors"):
        shutil.copy(tmp_path / f"a{suffix}", there)
    rest = run("--resume", there / state.name)
    assert torch.equal(torch.cat([first, rest]), whole)
    assert names(there) == {"a.mp4", "a.json"}
    assert {path.name: path.read_bytes() for path in tmp_path.glob("a.*")} == before
    assert read_json(there / "a.json")["settings"]["out"] == str(there / "a.mp4")

    # So does one under another name.
    shutil.copy(state, there / "b.state.safetensors")
    shutil.copy(tmp_path / "a.mp4", there / "b.mp4")
    (there / "a.mp4").unlink()
    assert torch.equal(run("--resume", there / "b.state.safetensors"), rest)
    assert names(there) == {"a.json", "b.mp4", "b.json"}


def test_ended_again_at_once(run, whole, tmp_path, state):
    """Before its first chunk, with other paths than before: the state is still this video's."""
    first = run.until(after=3)
    moved = shutil.copytree(run.release, tmp_path / "moved")
    for _ in range(2):
        assert run.until("--resume", state, "--release", moved, "--state-every", 7, after=0) is None
        assert read_state(state).about["pictures"] == len(first)
    rest = run("--resume", state, "--release", moved)
    assert torch.equal(torch.cat([first, rest]), whole)


def test_ended_between_the_video_and_its_record(run, whole, tmp_path, state):
    """The mp4 has its name already, the state still calls it by its partial one."""

    def keep(made):
        if made == 4 and state.exists():
            shutil.copy(state, tmp_path / "kept")

    first = run.until(after=4, meanwhile=keep)
    shutil.copy(tmp_path / "kept", state)
    about = read_state(state).about
    assert about["video"].endswith(".partial.mp4")
    assert about["pictures"] < len(first)
    (tmp_path / "a.json").unlink()
    rest = run("--resume", state)
    assert torch.equal(rest, whole[about["pictures"] :])


def test_a_video_that_the_disk_cuts_short_leaves_the_state_before(run, whole, state, monkeypatch):
    first = run.until(after=3)
    end = mp4.VideoWriter._end

    def full(self):
        self._end_encoder = lambda: self.file.does_not_exist
        with pytest.raises(AttributeError):
            end(self)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(mp4.VideoWriter, "_end", full)
        with pytest.raises(OSError, match="No space left"):
            run("--resume", state, "--state-every", "60")
    assert read_state(state).about["pictures"] == len(first)
    rest = run("--resume", state)
    assert torch.equal(torch.cat([first, rest]), whole)


def test_one_process_at_a_time(run, whole, tmp_path, state):
    """Neither while the first one still runs, nor twice from one state."""
    refused = []

    def second(made):
        if state.exists() and len(refused) < 2:
            with pytest.raises(ValueError, match="in use by another process") as caught:
                sample.main(sample.parse(["--resume", str(state)]))
            refused.append(str(caught.value))

    first = run.until(after=4, meanwhile=second)
    assert refused
    kill(state)
    refused.clear()
    rest = run("--resume", state, "--state-every", "60", meanwhile=second)
    assert len(refused) == 2
    assert torch.equal(torch.cat([first, rest]), whole)
    assert names(tmp_path) == {"a.mp4", "a.json"}


def test_what_has_come_in_the_way_is_kept(run, whole, tmp_path, state):
    first = run.until(after=3)
    kill(state)
    (tmp_path / "a.mp4").write_bytes(b"holidays")
    with pytest.raises(ValueError, match=r"a\.mp4 is another clip, not this state's; move it away"):
        run("--resume", state)
    assert (tmp_path / "a.mp4").read_bytes() == b"holidays"
    rest = run("--resume", state, "--overwrite")
    assert torch.equal(torch.cat([first, rest]), whole)
    assert read_json(tmp_path / "a.json")["settings"]["overwrite"] is False


def test_clips_of_one_image_are_told_apart(run, tmp_path, state):
    """Two seeds begin with the same picture."""
    run.until("--image", tmp_path / "a.png", "--frames", "73", after=3)
    run("--image", tmp_path / "a.png", "--frames", "73", "--seed", "1", out="other")
    os.replace(tmp_path / "other.mp4", tmp_path / "a.mp4")
    with pytest.raises(ValueError, match="its video is not there, or is another's"):
        run("--resume", state)


def test_no_report_of_another_clip(run, tmp_path, state):
    """The clip that is replaced had one; the part that replaces it has none yet."""
    run("--frames", "33", "--report")
    assert (tmp_path / "a.report.json").exists()
    run.until("--overwrite", after=3)
    assert names(tmp_path) == {"a.mp4", "a.json", "a.state.safetensors"}


RECIPE = """
about = "A test's."
source = "it"
causal = true
solver = "renoise"
levels = [1000, 750, 500, 250]
chunk = 3
"""


def test_a_recipe_that_was_changed_meanwhile(run, tmp_path, state):
    recipe = tmp_path / "my.toml"
    recipe.write_text(RECIPE)
    run.until("--recipe", recipe, after=3)
    recipe.write_text(RECIPE.replace("750, ", ""))
    with pytest.raises(ValueError, match="begun with another sampler.*name the recipe"):
        run("--resume", state)
    recipe.write_text(RECIPE)
    recipe.rename(tmp_path / "mine.toml")
    assert run.until("--resume", state, "--recipe", tmp_path / "mine.toml", after=1) is not None


def test_another_picture(run, tmp_path, state):
    """Under the same name; the same one under another name goes on."""
    picture = tmp_path / "a.png"
    content = picture.read_bytes()
    first = run.until("--image", picture, "--frames", "73", after=3)
    before = names(tmp_path)
    Image.new("RGB", (64, 32), (200, 40, 91)).save(picture)
    with pytest.raises(ValueError, match="begun with another image; name the files"):
        run("--resume", state)
    assert names(tmp_path) == before
    (tmp_path / "b.png").write_bytes(content)
    rest = run("--resume", state, "--image", tmp_path / "b.png")
    assert len(first) + len(rest) == 73
    assert read_json(tmp_path / "a.json")["inputs"]["image"]


def test_another_text_encoder(run, tmp_path, state):
    """What is left of the clip would be shown other contexts."""
    run.until(after=3)
    moved = shutil.copytree(run.release, tmp_path / "moved")
    file = moved / "models_t5_umt5-xxl-enc-bf16.pth"
    weights = torch.load(file)
    weights["token_embedding.weight"][5] += 1
    torch.save(weights, file)
    with pytest.raises(ValueError, match="begun with another t5; name the files"):
        run("--resume", state, "--release", moved)
    assert run.until("--resume", state, after=1) is not None


def test_a_state_that_says_nothing_of_its_files(run, tmp_path, state, capsys):
    """Of an earlier version: it goes on, and nobody is told that they are known to be the same."""
    run.until("--image", tmp_path / "a.png", "--frames", "73", after=3)
    about = read_state(state).about
    del about["inputs"]
    write_state(state, about, load_file(state))
    capsys.readouterr()
    run("--resume", state)
    said = "does not say what its image, t5 held: whether they do still can't be checked"
    assert f"note: {state} {said}" in capsys.readouterr().err
    assert "inputs" not in read_json(tmp_path / "a.json")


def test_another_vae(run, tmp_path, state, monkeypatch):
    run.until(after=3)
    before = names(tmp_path)
    load = sample.load_vae

    def other(*arguments):
        vae = load(*arguments)
        next(vae.parameters()).data[0] += 1
        return vae

    with monkeypatch.context() as patch:
        patch.setattr(sample, "load_vae", other)
        with pytest.raises(ValueError, match="another VAE decoded the clip so far"):
            run("--resume", state)
    assert names(tmp_path) == before
