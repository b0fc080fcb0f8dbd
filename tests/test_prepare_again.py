"""prepare.py started again when its inputs have changed under their names: it never mixes the old
and the new in silence.
"""

import json
import shutil

import numpy as np
import pytest
import torch
from odd_files import write_video
from PIL import Image
from safetensors.torch import load_file, save_file

import prepare
from wan5b.data import Store

SMALL = ["--size", "32x64", "--frames", "5"]
OTHERS = "00000.safetensors is of another run: what videos, stores or weights hold"


def run(*arguments):
    prepare.main([str(argument) for argument in arguments])


def movie(path, levels):
    return write_video(
        path,
        np.array(levels, np.uint8)[:, None, None, None].repeat(32, 1).repeat(64, 2).repeat(3, 3),
    )


@pytest.fixture
def latents(release, tmp_path):
    """The command that makes latents of clips/, where a video and a folder of images are."""
    clips = tmp_path / "clips"
    (clips / "b").mkdir(parents=True)
    movie(clips / "a.mp4", [10] * 6)
    for i in range(5):
        Image.new("RGB", (64, 32), (40 * i, 0, 0)).save(clips / f"b/{i}.png")
    for name in "ab":
        (clips / f"{name}.txt").write_text(name)
    command = ["--release", release, "--videos", clips, "--out", tmp_path / "out", *SMALL]
    run("latents", *command)
    return ["latents", *command]


def test_nothing_changed(latents, tmp_path):
    before = (tmp_path / "out/00000.safetensors").read_bytes()
    run(*latents)
    assert (tmp_path / "out/00000.safetensors").read_bytes() == before
    assert Store(tmp_path / "out").prompts == ["a", "b"]


def replace_video(clips):
    movie(clips / "a.mp4", range(0, 240, 20))


def replace_image(clips):
    Image.effect_noise((64, 32), 90).save(clips / "b/3.png")


def add_image(clips):
    Image.new("RGB", (64, 32)).save(clips / "b/00.png")


@pytest.mark.parametrize("change", [replace_video, replace_image, add_image])
def test_videos_that_were_replaced(latents, tmp_path, change):
    change(tmp_path / "clips")
    with pytest.raises(ValueError, match=OTHERS):
        run(*latents)
    shutil.rmtree(tmp_path / "out")
    run(*latents)
    run(*latents)


def test_another_vae_of_the_same_name(latents, release):
    path = release / "Wan2.2_VAE.pth"
    held = torch.load(path)
    torch.save({name: tensor + 1e-3 for name, tensor in held.items()}, path)
    with pytest.raises(ValueError, match=OTHERS):
        run(*latents)


def test_another_text_encoder_and_model_of_the_same_name(release, tmp_path):
    (tmp_path / "p.txt").write_text("a\n")
    text = ["text", "--release", release, "--prompts", tmp_path / "p.txt", "--out", tmp_path / "t"]
    run(*text)
    paths = ["trajectories", "--release", release, "--text", tmp_path / "t", *SMALL]
    paths += ["--steps", 4, "--out", tmp_path / "o"]
    run(*paths)
    run(*text)
    run(*paths)

    path = next(release.glob("models_t5*"))
    held = torch.load(path)
    torch.save({name: tensor * 1.01 for name, tensor in held.items()}, path)
    with pytest.raises(ValueError, match=OTHERS):
        run(*text)
    shutil.rmtree(tmp_path / "t")
    run(*text)
    with pytest.raises(ValueError, match=OTHERS):
        run(*paths)
    shutil.rmtree(tmp_path / "o")
    run(*paths)
    path = next(release.glob("diffusion*.safetensors"))
    save_file({name: tensor * 1.01 for name, tensor in load_file(path).items()}, path)
    with pytest.raises(ValueError, match=OTHERS):
        run(*paths)


def test_trajectories_of_stores_that_were_made_anew(latents, release, tmp_path, capsys):
    """Prompts may come, behind those that were there; what a clip holds may not change. Earlier
    versions noted neither embeddings nor clips.
    """
    text = ["text", "--release", release, "--out", tmp_path / "t", "--per-shard", 1, "--prompts"]
    run(*text, tmp_path / "out")
    paths = ["trajectories", "--release", release, "--text", tmp_path / "t", *SMALL]
    paths += ["--latents", tmp_path / "out", "--steps", 4, "--out", tmp_path / "o"]
    run(*paths)
    (tmp_path / "p.txt").write_text("a\nb\nc\n")
    run(*text, tmp_path / "p.txt")
    run(*paths)

    replace_image(tmp_path / "clips")
    replace_video(tmp_path / "clips")
    shutil.rmtree(tmp_path / "out")
    run(*latents)
    with pytest.raises(ValueError, match=OTHERS):
        run(*paths)

    shutil.rmtree(tmp_path / "o")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "held_by_stores", lambda text, clips: prepare.nothing)
        run(*paths)
    capsys.readouterr()
    run(*paths)
    said = f"note: {tmp_path}/o has 1 shards of an earlier version, 00000.safetensors the first: "
    assert said in capsys.readouterr().err


def test_a_video_that_cannot_be_looked_at_ends_nothing(latents, tmp_path, capsys):
    (tmp_path / "clips/b/9.png").symlink_to("nowhere")
    (tmp_path / "clips/b/0.png").unlink()
    shutil.rmtree(tmp_path / "out")
    run(*latents)
    assert "skipped 1 videos" in capsys.readouterr().out
    assert Store(tmp_path / "out").prompts == ["a"]


@pytest.mark.parametrize("name", ["", ".", "..", "./"])
def test_a_line_that_names_no_video(release, tmp_path, name):
    (tmp_path / "l.jsonl").write_text(json.dumps({"video": name, "caption": "x"}))
    command = ["--release", release, "--videos", tmp_path / "l.jsonl", "--out", tmp_path / "out"]
    with pytest.raises(ValueError, match="every line of .*l.jsonl must be"):
        run("latents", *command, *SMALL)
