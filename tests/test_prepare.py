"""prepare.py on a tiny release: what it writes, where it goes on when stopped, what it refuses."""

import gc
import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from common import randn, rel
from release import DIT, make_release, write_dit

import prepare
from wan5b.data import Store, TextStore
from wan5b.distill import guided, rollout
from wan5b.extras.formats import load_dit, load_t5, load_tokenizer, load_vae
from wan5b.extras.framing import fit
from wan5b.extras.pictures import read_clips
from wan5b.extras.sampling import generate
from wan5b.extras.shards import write_shard
from wan5b.extras.texts import encode_prompts
from wan5b.flow import few_step_sigmas, shift_sigma, solve
from wan5b.kvcache import KVCache
from wan5b.t5 import NEGATIVE_PROMPT
from wan5b.util import rng
from wan5b.weights import save_dit

PROMPTS = ["a red fox", "a blue bird flies", "rain", "a red fox", "snow on a hill"]
SMALL = ["--size", "32x64", "--frames", "9"]  # 3 latent frames of 2 x 4


@pytest.fixture(autouse=True, scope="module")
def _quick_videos():
    """imageio collects garbage whenever it closes a video: keep what pytest holds out of that."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    return make_release(tmp_path_factory.mktemp("release") / "tiny")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    return path


@pytest.fixture(scope="module")
def embeddings(release, prompts, tmp_path_factory):
    out = tmp_path_factory.mktemp("text") / "text"
    run("text", "--release", release, "--prompts", prompts, "--per-shard", "2", "--out", out)
    return out


def run(*arguments) -> None:
    prepare.main([str(argument) for argument in arguments])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def video(path, count, fps=24, size=(48, 96), seed=0):
    """A file (or a folder of PNGs) of smooth moving colours. Returns the frames of the folder."""
    t, y, x = np.mgrid[:count, : size[0], : size[1]]
    red = np.sin(0.1 * (x + seed) + 0.3 * t)
    green = np.cos(0.1 * y - 0.2 * t)
    blue = np.sin(0.05 * (x + y))
    frames = (127.5 * (1 + np.stack([red, green, blue], -1))).astype(np.uint8)
    if path.suffix:
        iio.imwrite(path, frames, plugin="pyav", fps=fps, codec="libx264")
        return None
    path.mkdir()
    for i, frame in enumerate(frames):
        iio.imwrite(path / f"{i}.png", frame)
    return frames


# ----------------------------------------------------------------------------------------- commands


def test_text(release, embeddings):
    store = TextStore(embeddings)
    assert store.prompts == [NEGATIVE_PROMPT, "", *dict.fromkeys(PROMPTS)]  # each once
    assert store.facts == {"model": "tiny", "negative": NEGATIVE_PROMPT}
    assert sorted(contents(embeddings)) == [f"0000{i}.safetensors" for i in range(3)]
    encoder = load_t5(release)
    tokenizer = load_tokenizer(release)
    for i in range(0, 6, 2):  # as they were batched: the rounding may depend on it
        pair = store.prompts[i : i + 2]
        context = encode_prompts(encoder, tokenizer, pair)
        assert torch.equal(store.batch(pair, 512, torch.bfloat16), context)
        for prompt, length in zip(pair, tokenizer(pair)[1].sum(1), strict=True):
            assert store[prompt].shape == (length, 64)


def test_text_of_a_stores_captions(release, tmp_path):
    clips = tmp_path / "latents"
    write_shard(clips / "0.safetensors", {"latent": torch.zeros(2, 1)}, ["a cat", "a cat"])
    command = ["text", "--release", release, "--prompts", clips, "--negative", "bad"]
    run(*command, "--out", tmp_path / "text")
    assert TextStore(tmp_path / "text").prompts == ["bad", "", "a cat"]


def test_latents(release, tmp_path, capsys):
    clips = tmp_path / "clips"
    clips.mkdir()
    video(clips / "fast.mp4", 30, fps=30)
    video(clips / "short.mp4", 8)
    images = video(clips / "still", 9)
    (clips / "zz.mp4").write_bytes(b"damaged" * 500)
    for name in ("fast", "short", "still", "zz"):
        (clips / f"{name}.txt").write_text(f" a {name}\nclip\n")
    options = [*SMALL, "--dtype", "float32", "--per-shard", 2]
    run("latents", "--release", release, "--videos", clips, *options, "--out", tmp_path / "out")

    printed = capsys.readouterr().out
    assert "skipped 2 videos" in printed
    assert "short.mp4 has 8 frames at 24 fps, fewer than 9" in printed
    assert "zz.mp4" in printed
    store = Store(tmp_path / "out")
    assert store.prompts == ["a fast clip", "a still clip"]
    sizes = {"size": "32x64", "frames": 9, "fps": 24.0, "clips": 1}
    assert store.facts == {**sizes, "dtype": "float32", "model": "tiny"}
    assert store.shapes == {"latent": (48, 3, 2, 4)}
    vae = load_vae(release)
    expected = [next(read_clips(clips / "fast.mp4", 9, 24)), images]
    for item, frames in zip(store, expected, strict=True):
        assert torch.equal(item["latent"], vae.encode(fit(frames, 32, 64)[None])[0])

    lines = [
        {"video": "clips/still", "caption": "stands "},
        {"video": str(clips / "fast.mp4"), "caption": "红"},
    ]
    listing = tmp_path / "list.jsonl"
    listing.write_text("\n".join(map(json.dumps, lines)))
    run("latents", "--release", release, "--videos", listing, *SMALL, "--out", tmp_path / "listed")
    listed = Store(tmp_path / "listed")
    assert listed.prompts == ["stands", "红"]
    for i, j in ((0, 1), (1, 0)):
        assert torch.equal(listed[i]["latent"], store[j]["latent"].bfloat16())


def test_several_clips_of_a_video(release, tmp_path, capsys, monkeypatch):
    """As many as there are, each encoded by itself; of a video that breaks off what is whole."""
    clips = tmp_path / "clips"
    clips.mkdir()
    images = video(clips / "a", 30)
    video(clips / "b.mp4", 8)
    images_of_c = video(clips / "c", 17)
    images_of_d = video(clips / "d", 20)
    (clips / "d" / "12.png").write_bytes(b"damaged")
    for name in "abcd":
        (clips / f"{name}.txt").write_text(f"caption {name}")
    command = ["latents", "--release", release, "--videos", clips, *SMALL]
    command += ["--dtype", "float32", "--per-shard", 3]
    run(*command, "--clips", 2, "--out", tmp_path / "two")
    printed = capsys.readouterr().out
    assert "skipped 2 videos" in printed  # c is shorter than two clips, and no failure
    assert "b.mp4 has 8 frames" in printed
    assert "d: cannot read the image" in printed
    store = Store(tmp_path / "two")
    assert store.facts["clips"] == 2
    assert store.prompts == ["caption a", "caption a", "caption c", "caption d"]
    assert len(Store(tmp_path / "two").files) == 2  # --per-shard counts videos
    vae = load_vae(release)
    expected = [images[:9], images[9:18], images_of_c[:9], images_of_d[:9]]
    for item, frames in zip(store, expected, strict=True):
        assert torch.equal(item["latent"], vae.encode(fit(frames, 32, 64)[None])[0])

    run(*command, "--clips", 100, "--batch", 4, "--out", tmp_path / "all")
    assert Store(tmp_path / "all").prompts == [f"caption {name}" for name in "aaacd"]
    other = "00000.safetensors is of another run: clips 2 and 1; delete it"
    with pytest.raises(ValueError, match=other):
        run(*command, "--out", tmp_path / "two")


def test_a_video_without_a_picture_does_not_end_the_work(release, tmp_path, capsys, monkeypatch):
    clips = tmp_path / "clips"
    clips.mkdir()
    (clips / "a.mp4").touch()
    (clips / "a.txt").write_text("a")

    def no_picture(*_):
        raise ValueError("cannot read the video a.mp4: there is no picture in it")
        yield

    monkeypatch.setattr(prepare, "read_clips", no_picture)
    out = tmp_path / "out"
    run("latents", "--release", release, "--videos", clips, *SMALL, "--out", out)
    assert "skipped 1 videos" in capsys.readouterr().out
    assert len(Store(out)) == 0


def noise_of(numbers, frames, seed=7) -> torch.Tensor:
    """The noise of these items, [B, 48, frames, 2, 4]."""
    keys = [(seed, "trajectory", i) for i in numbers]
    return torch.stack([torch.randn(48, frames, 2, 4, generator=rng("cpu", *key)) for key in keys])


@pytest.mark.parametrize("causal", [False, True])
def test_trajectories(release, embeddings, tmp_path, causal):
    out = tmp_path / "out"
    options = ["--steps", 12, "--seed", 7, "--guidance", 2, "--batch", 2]
    if causal:
        options += ["--causal", "--chunk", 1]
    run("trajectories", "--release", release, "--text", embeddings, *SMALL, *options, "--out", out)
    store = Store(out)
    text = TextStore(embeddings)
    # Neither the negative prompt nor the empty one.
    assert store.prompts == list(dict.fromkeys(PROMPTS))
    assert store.shapes == {"x": (5, 48, 3, 2, 4)}
    assert store.facts == {
        "frames": 9,
        "guidance": 2.0,
        "steps": 12,
        "shift": 5.0,
        "seed": 7,
        "causal": causal,
        "prefix": 0,
        "latents": None,
        "dtype": "float32",
        "model": "tiny",
        "trained": {},
        "negative": NEGATIVE_PROMPT,
        "size": "32x64",
        "sigmas": few_step_sigmas(),
        "chunks": [1, 1, 1] if causal else [3],
    }

    model = load_dit(release)
    sigmas = [shift_sigma(1 - i / 12) for i in range(13)]
    x = torch.stack([item["x"] for item in store])  # [4, 5, C, T, H, W]
    noise = noise_of(range(4), 3)
    assert torch.equal(x[:, 0], noise)
    i = [1, 2]  # not the pair that was batched
    context = text.batch([store.prompts[k] for k in i] + [NEGATIVE_PROMPT] * 2, 512)
    field = guided(model, 2.0)
    with torch.no_grad():
        if causal:
            tokens = model.cfg.tokens_per_frame(2, 4)
            cache = KVCache(model.cfg, 4, 3, tokens)
            finished = rollout(field, noise[i], context, sigmas, [1, 1, 1], cache, solver="euler")
            chunks = list(finished)
            end = torch.cat(chunks, 2)

            # The middle of the second chunk, by hand: behind the first one's end.
            cache = KVCache(model.cfg, 4, 3, tokens)
            field(chunks[0], 0.0, context, cache=cache)
            cache.commit(1)
            half = noise[i][:, :, 1:2]
            for a, b in zip(sigmas[:6], sigmas[1:7], strict=True):
                half = half + (b - a) * field(half, a, context, cache=cache)
            assert rel(x[i, 2][:, :, 1:2], half) < 1e-5
        else:

            def alone(x, sigma):
                return field(x, sigma, context)

            end = solve(alone, noise[i], sigmas, "euler")
            half = solve(alone, noise[i], sigmas[:7], "euler")
            assert rel(x[i, 2], half) < 1e-5
    assert rel(x[i, 4], end) < 1e-5
    assert rel(x[i, 3], end) > 0.05  # the levels differ


def test_a_bidirectional_model_takes_no_cache(release, embeddings, tmp_path, monkeypatch):
    """Keys and values of all frames in all layers would be most of the memory."""
    monkeypatch.setattr(prepare, "KVCache", None)
    command = ["trajectories", "--release", release, "--text", embeddings, *SMALL, "--steps", 4]
    run(*command, "--out", tmp_path / "out")
    with pytest.raises(TypeError):
        run(*command, "--causal", "--out", tmp_path / "causal")


def clips_of_latents(folder, channels=48, size=(2, 4)):
    """Three clips of two latent frames, in two shards, a caption twice.

    Returns the first frames, float32.
    """
    latent = randn(3, channels, 2, *size, seed=3).bfloat16()
    captions = ["rain", "a red fox", "rain"]
    write_shard(folder / "00000.safetensors", {"latent": latent[:2]}, captions[:2], frames=5)
    write_shard(folder / "00001.safetensors", {"latent": latent[2:]}, captions[2:], frames=5)
    return latent[:, :, :1].float()


@pytest.mark.parametrize("causal", [False, True])
def test_image_to_video_trajectories(release, embeddings, tmp_path, causal):
    """Behind the clean first frames of clips: the same as a loop by hand, and as `generate`'s."""
    latents = tmp_path / "latents"
    clean = clips_of_latents(latents)
    out = tmp_path / "out"
    options = ["--size", "32x64", "--frames", 17, "--steps", 8, "--seed", 7, "--guidance", 2]
    options += ["--batch", 4, "--latents", latents, "--repeats", 2]
    if causal:
        options += ["--causal", "--chunk", 2]
    run("trajectories", "--release", release, "--text", embeddings, *options, "--out", out)
    store = Store(out)
    text = TextStore(embeddings)
    assert store.prompts == ["rain", "a red fox", "rain"] * 2
    assert store.shapes == {"x": (5, 48, 5, 2, 4)}
    plan = [1, 2, 2] if causal else [1, 4]
    facts = {"prefix": 1, "latents": str(latents), "chunks": plan}
    assert facts.items() <= store.facts.items()
    x = torch.stack([item["x"] for item in store])  # [6, 5, C, T, H, W]
    for level in range(5):
        assert torch.equal(x[:, level, :, :1], torch.cat([clean, clean]))
    noise = noise_of(range(6), 4)
    assert torch.equal(x[:, 0, :, 1:], noise)

    model = load_dit(release)
    sigmas = [shift_sigma(1 - i / 8) for i in range(9)]
    i = [1, 5]
    first = clean[[1, 2]]
    field = guided(model, 2.0)
    context = text.batch([store.prompts[k] for k in i] + [NEGATIVE_PROMPT] * 2, 512)
    chunks = plan[1:]
    states = []
    with torch.no_grad():
        if causal:
            cache = KVCache(model.cfg, 4, 5, model.cfg.tokens_per_frame(2, 4))
            how = {"prefix": first, "solver": "euler"}
            finished = rollout(field, noise[i], context, sigmas, chunks, cache, **how)
            end = torch.cat(list(finished), 2)
        else:
            whole = torch.cat([first, noise[i]], 2)
            for a, b in zip(sigmas, sigmas[1:], strict=False):
                states.append(whole[:, :, 1:])
                level = torch.tensor([0, a, a, a, a]).expand(4, -1)
                v = model(torch.cat([whole, whole]), level, context)
                whole = whole + (b - a) * (v[2:] + 2 * (v[:2] - v[2:]))
                whole[:, :, :1] = first  # put back after every step
            end = whole[:, :, 1:]

        how = {"causal": causal, "solver": "euler", "guidance": 2.0, "prefix": first[1:]}
        sampled = generate(model, noise[i[1:]], context[1::2], sigmas, chunks, **how)
        assert rel(x[i[1:], 4], torch.cat(list(sampled), 2)) < 1e-5
    assert rel(x[i, 4, :, 1:], end) < 1e-5
    for kept, state in enumerate(states[::2]):
        assert rel(x[i, kept, :, 1:], state) < 1e-5
    assert rel(x[5, 4, :, 1:], x[3, 4, :, 1:]) > 1e-3  # one prompt, two images and noises


def test_the_image_matters(release, embeddings, tmp_path):
    """Same prompts and noise, other images, both ways."""
    ends = []
    for name in "ab":
        (tmp_path / name).mkdir()
        latent = randn(1, 48, 1, 2, 4, seed=ord(name))
        write_shard(tmp_path / name / "0.safetensors", {"latent": latent}, ["rain"])
        for causal in ([], ["--causal", "--chunk", 1]):
            out = tmp_path / f"{name}{len(causal)}"
            options = [*SMALL, "--steps", 4, "--latents", tmp_path / name, *causal, "--out", out]
            run("trajectories", "--release", release, "--text", embeddings, *options)
            ends.append(Store(out)[0]["x"])
    for one, other in zip(ends[:2], ends[2:], strict=True):
        assert torch.equal(one[0, :, 1:], other[0, :, 1:])
        assert rel(one[4, :, 1:], other[4, :, 1:]) > 1e-4


def test_errors_of_given_latents(release, embeddings, tmp_path):
    clips_of_latents(tmp_path / "latents")
    clips_of_latents(tmp_path / "wide", size=(2, 6))
    clips_of_latents(tmp_path / "other", channels=16)
    hen = {"latent": randn(1, 48, 1, 2, 4)}
    write_shard(tmp_path / "unknown" / "0.safetensors", hen, ["a hen"])
    given = ["trajectories", "--text", embeddings, *SMALL]

    def refused(match, latents, *options):
        command = [*given, "--release", tmp_path / "no release"]
        with pytest.raises(ValueError, match=match) as error:
            run(*command, "--latents", latents, *options, "--out", tmp_path / "out")
        assert "\n" not in str(error.value)

    needs = r"32x64 takes \(48, 'any', 2, 4\), --frames > 1"
    refused(rf"wide has latents \(48, 2, 2, 6\); {needs}", tmp_path / "wide")
    refused(rf"other has latents \(16, 2, 2, 4\); {needs}", tmp_path / "other")
    refused(rf"has latents \(\); .*{needs}", embeddings)
    refused("nowhere is no folder of shards", tmp_path / "nowhere")
    refused(r"lacks 1 prompts \('a hen'\); see prepare.py text", tmp_path / "unknown")
    refused("--frames > 1", tmp_path / "latents", "--frames", 1)
    refused("--frames > 1", tmp_path / "latents", "--frames", 1, "--causal")
    uneven = "--frames 9 is not 1 latent frames and chunks of 3; nearest: 13 or 25"
    refused(uneven, tmp_path / "latents", "--causal")

    command = [*given, "--release", release, "--steps", 4, "--out", tmp_path / "o"]
    run(*command, "--latents", tmp_path / "latents")
    other = r"is of another run: .*prefix 1 and 0, .*latents and None; delete it"
    with pytest.raises(ValueError, match=other):
        run(*command)


def test_levels_are_exact():
    for steps in (4, 12, 48, 100):
        sigmas = [shift_sigma(1 - i / steps, 5.0) for i in range(steps + 1)]
        assert sigmas[:: steps // 4] == few_step_sigmas()


def test_trajectories_of_an_export(release, embeddings, tmp_path, capsys):
    """The weights' own record goes with the trajectories, and chunk and shift are its.

    They may be stored as bfloat16.
    """
    record = {"stage": "ar", "step": 3, "chunk": 1, "shift": 3.0}
    save_dit(load_dit(release), tmp_path / "ar.safetensors", record)
    save_dit(load_dit(release), tmp_path / "teacher.safetensors", {"stage": "teacher"})
    common = ["trajectories", "--text", embeddings, *SMALL, "--steps", "4", "--release", release]
    weights = ["--weights", tmp_path / "ar.safetensors"]
    noise = f"no record of causal training in {release}: expect noise"
    run(*common, *weights, "--causal", "--dtype", "bfloat16", "--out", tmp_path / "a")
    assert "note" not in capsys.readouterr().err
    run(*common, "--causal", "--chunk", "1", "--shift", 3, "--out", tmp_path / "b")
    assert noise in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"ar.safetensors is of stage ar: give --causal"):
        run(*common, *weights, "--out", tmp_path / "c")
    teacher = ["--weights", tmp_path / "teacher.safetensors"]
    with pytest.raises(ValueError, match=r"teacher.safetensors is of stage teacher: no --causal"):
        run(*common, *teacher, "--causal", "--out", tmp_path / "c")
    a = Store(tmp_path / "a")
    b = Store(tmp_path / "b")
    assert a.facts["trained"] == record
    assert (a.facts["chunks"], a.facts["shift"]) == ([1, 1, 1], 3.0)
    assert a.facts["model"] == "ar.safetensors"
    assert torch.equal(a[1]["x"], b[1]["x"].bfloat16())


def test_first_frames_that_no_one_gives_are_noted(release, embeddings, tmp_path, capsys):
    """Weights of image to video have never made a first frame in training."""
    weights = tmp_path / "ar.safetensors"
    save_dit(load_dit(release), weights, {"stage": "ar", "chunk": 1, "prefix": 1})
    common = ["trajectories", "--text", embeddings, *SMALL, "--steps", "4", "--release", release]
    run(*common, "--weights", weights, "--causal", "--out", tmp_path / "out")
    assert "ar.safetensors was trained behind given first frames" in capsys.readouterr().err


def test_trajectories_lead_away_from_what_training_had_for_no_text(release, embeddings, tmp_path):
    """Whatever negative prompt the texts were prepared with."""
    model = load_dit(release)
    save_dit(model, tmp_path / "ar.safetensors", {"stage": "ar", "training": {"negative": ""}})
    common = ["trajectories", "--release", release, *SMALL, "--steps", 4, "--causal"]
    common += ["--weights", tmp_path / "ar.safetensors"]
    run(*common, "--text", embeddings, "--out", tmp_path / "a")
    prompts = list(dict.fromkeys(PROMPTS))
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    texts = ["text", "--release", release, "--prompts", tmp_path / "prompts.txt"]
    run(*texts, "--negative", "", "--out", tmp_path / "empty")
    run(*common, "--text", tmp_path / "empty", "--out", tmp_path / "b")
    a = Store(tmp_path / "a")
    b = Store(tmp_path / "b")
    assert a.prompts == b.prompts == prompts
    assert a.facts["negative"] == ""
    assert all(rel(a[i]["x"], b[i]["x"]) < 1e-5 for i in range(len(a)))

    save_dit(model, tmp_path / "ar.safetensors", {"stage": "ar"}, overwrite=True)
    run(*common, "--text", embeddings, "--out", tmp_path / "c")
    assert rel(Store(tmp_path / "c")[0]["x"], a[0]["x"]) > 1e-4


# ------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("kind", ["text", "latents", "trajectories"])
def test_going_on_gives_the_same_files(
    kind, processes, release, prompts, embeddings, tmp_path, monkeypatch
):
    if kind == "latents":
        (tmp_path / "clips").mkdir()
        for i in range(3):
            video(tmp_path / "clips" / f"{i}.mp4", 9, seed=10 * i)
            (tmp_path / "clips" / f"{i}.txt").write_text(f"clip {i}")
    options = {
        "text": ["--prompts", prompts, "--per-shard", 2],
        "latents": ["--videos", tmp_path / "clips", *SMALL, "--per-shard", 1],
        "trajectories": ["--text", embeddings, *SMALL, "--steps", 4, "--per-shard", 1],
    }
    command = [kind, *options[kind], "--release", release]
    run(*command, "--out", tmp_path / "whole")
    expected = contents(tmp_path / "whole")
    assert len(expected) >= 3

    out = tmp_path / "parts"
    made = []

    def stop_at_the_second(path, *args, **facts):
        if made:
            raise KeyboardInterrupt
        made.append(path.name)
        write_shard(path, *args, **facts)

    with monkeypatch.context() as m:
        m.setattr(prepare, "write_shard", stop_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            run(*command, "--out", out)
    assert list(contents(out)) == made == ["00000.safetensors"]
    stamp = (out / made[0]).stat().st_mtime_ns
    monkeypatch.setattr(prepare, "WORLD_SIZE", processes)
    for rank in reversed(range(processes)):
        monkeypatch.setattr(prepare, "RANK", rank)
        run(*command, "--out", out)
        if (rank, processes) == (1, 2):
            assert set(contents(out)) == {*sorted(expected)[1::2], *made}
    assert contents(out) == expected
    assert (out / made[0]).stat().st_mtime_ns == stamp  # not made again


def test_more_processes_than_shards(release, prompts, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "WORLD_SIZE", 2)
    monkeypatch.setattr(prepare, "RANK", 1)
    run("text", "--release", release, "--prompts", prompts, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_longer_list_goes_on_at_whole_shards(release, tmp_path):
    listing = tmp_path / "p.txt"
    out = tmp_path / "o"
    command = ["text", "--release", release, "--prompts", listing, "--per-shard", 2, "--out", out]
    listing.write_text("a\nb")
    run(*command)
    before = contents(out)
    listing.write_text("a\nb\nc")
    run(*command)
    assert before.items() < contents(out).items()
    listing.write_text("a\nb\nc\nd\n")
    other = "00002.safetensors is of another run: what .* hold, inputs, --per-shard; delete it"
    with pytest.raises(ValueError, match=other):
        run(*command)
    (out / "00002.safetensors").unlink()
    run(*command)
    assert TextStore(out).prompts[2:] == list("abcd")


def test_the_script_stops_and_fails_politely(release, embeddings, tmp_path):
    script = [sys.executable, "prepare.py", "trajectories", "--release", release, *SMALL]
    script += ["--out", tmp_path / "o"]
    failed = subprocess.run([*script, "--text", "nowhere"], capture_output=True, text=True)
    assert failed.returncode == 2
    assert failed.stderr.startswith("prepare.py: error: nowhere is no folder")
    assert failed.stderr.count("\n") == 1

    command = [*script, "--text", embeddings, "--steps", "20000", "--per-shard", "1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    for line in iter(lambda: process.stderr.read(1), ""):
        if line == "%":  # the progress bar: at work
            break
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, printed = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in printed
    assert not (tmp_path / "o").exists()


# ------------------------------------------------------------------------------------------- errors


def test_errors_of_options(release, embeddings, prompts, tmp_path):
    def refused(match, *arguments):
        with pytest.raises(ValueError, match=match):
            run(*arguments, "--release", release, "--out", tmp_path / "out")
        assert not (tmp_path / "out").exists()

    ode = ["trajectories", "--text", embeddings, *SMALL]
    sides = "nearest valid: 32 or 64 by 64"
    for size, frames, match in (
        ("30x64", 9, f"size 30x64 is not HEIGHTxWIDTH in multiples of 32; {sides}"),
        ("axb", 9, "size axb is not HEIGHTxWIDTH"),
        ("32x64", 8, "8 frames are not 4k . 1; nearest valid: 5 or 9"),
    ):
        options = ["--size", size, "--frames", frames]
        refused(match, "trajectories", "--text", embeddings, *options)
        refused(match, "latents", "--videos", tmp_path, *options)
    refused("--steps 50 must be a multiple of 4", *ode, "--steps", 50)
    refused("--steps 0 must", *ode, "--steps", 0)
    uneven = "--frames 9 is not chunks of 2; nearest: 5 or 13"
    refused(uneven, *ode, "--causal", "--chunk", 2)
    refused("--per-shard 0: must be above 0", *ode, "--per-shard", 0)
    refused("--batch -1: must be above 0", "text", "--prompts", prompts, "--batch", -1)
    refused("--repeats 0: must be above 0", *ode, "--repeats", 0)
    refused("--chunk 0: must be above 0", *ode, "--causal", "--chunk", 0)
    refused("--shift 0.0: must be above 0", *ode, "--shift", 0)
    refused("--shift inf: must be above 0, and finite", *ode, "--shift", "inf")
    nowhere = tmp_path / "nowhere"
    weights = tmp_path / "nowhere.safetensors"
    refused("nowhere is no folder", "trajectories", "--text", nowhere)
    refused("cannot read .*nowhere", "text", "--prompts", nowhere)
    refused("nowhere.safetensors: no such file", *ode, "--weights", weights)
    refused("nowhere: no such file or folder", "latents", "--videos", nowhere, *SMALL)
    with pytest.raises(ValueError, match="spiece.model: no such file"):
        run("text", "--prompts", prompts, "--release", tmp_path, "--out", tmp_path / "out")


def test_a_folder_that_cannot_be_written_to_is_found_first(
    release, embeddings, prompts, tmp_path, monkeypatch
):
    (tmp_path / "file").touch()
    for name in ("load_t5", "load_vae", "load_dit"):
        monkeypatch.setattr(prepare, name, None)
    video(tmp_path / "clips.mp4", 9)
    (tmp_path / "clips.jsonl").write_text('{"video": "clips.mp4", "caption": "a"}')
    for command in (
        ("text", "--prompts", prompts),
        ("latents", "--videos", tmp_path / "clips.jsonl", *SMALL),
        ("trajectories", "--text", embeddings, *SMALL),
    ):
        with pytest.raises(ValueError, match="file is no folder; choose another --out"):
            run(*command, "--release", release, "--out", tmp_path / "file")


def test_errors_of_another_latent_space(release, embeddings, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    write_dit(other, replace(DIT, in_dim=16, out_dim=16))
    command = ["trajectories", "--release", other, "--text", embeddings, *SMALL]
    with pytest.raises(ValueError, match="16 latent channels where 48 are needed"):
        run(*command, "--out", tmp_path / "out")


def test_errors_of_video_lists(release, tmp_path):
    clips = tmp_path / "clips"
    clips.mkdir()
    out = tmp_path / "out"
    command = ["latents", "--release", release, *SMALL, "--out", out]

    def refused(match, videos):
        with pytest.raises(ValueError, match=match):
            run(*command, "--videos", videos)
        assert not out.exists()

    refused("clips names 0 videos", clips)
    refused("nowhere: no such file or folder; name a folder or a .jsonl file", tmp_path / "nowhere")
    (clips / "a.mp4").touch()
    refused("cannot read .*a.txt", clips)
    listing = tmp_path / "list.jsonl"
    for line in (
        "video.mp4",
        "[1]",
        '{"video": "clips/a.mp4"}',
        '{"video": 1, "caption": "x"}',
        '{"video": "a", "caption": 1}',
    ):
        listing.write_text(line)
        refused("every line of .*list.jsonl must be", listing)
    listing.write_text('{"video": "clips/a.mp4", "caption": "x"}')
    for option in ("--clips", "--fps"):
        with pytest.raises(ValueError, match=rf"{option} 0(.0)?: must be above 0"):
            run(*command, "--videos", listing, option, 0)
    lines = [json.dumps({"video": f"clips/{name}.mp4", "caption": "x"}) for name in "ab"]
    listing.write_text("\n".join(lines))
    refused("names 2 videos, 1 of them missing: .*b.mp4", listing)


def test_errors_of_a_folder_with_other_shards(release, embeddings, prompts, tmp_path):
    out = tmp_path / "out"
    command = ["trajectories", "--release", release, "--text", embeddings, *SMALL]
    command += ["--steps", 4, "--out", out]
    run(*command)
    before = contents(out)
    for change, match in {
        ("--guidance", 5): "guidance 6.0 and 5.0; delete it or change --out",
        ("--seed", 1): "seed 0 and 1",
        ("--dtype", "bfloat16"): "dtype float32 and bfloat16",
        ("--per-shard", 2): "inputs, --per-shard",
    }.items():
        with pytest.raises(ValueError, match=f"00000.safetensors is of another run: .*{match}"):
            run(*command, *change)
    with pytest.raises(ValueError, match="is of another run: .*steps 4 and None"):
        run("text", "--release", release, "--prompts", prompts, "--out", out)
    assert contents(out) == before
    stray = out / "00007.safetensors"
    shutil.copy(out / "00000.safetensors", stray)
    with pytest.raises(ValueError, match="00007.safetensors is of another run"):
        run(*command)
    stray.write_bytes(before["00000.safetensors"][:-9])
    with pytest.raises(ValueError, match="00007.safetensors is damaged"):
        run(*command)
