"""sample.py on a synthetic release: what it writes and repeats, its modes, stops and refusals.

Also what --compile (fuse.py) and --fp8 (fp8.py) switch on.
"""

import gc
import json
import re
import signal
import subprocess
import sys
import weakref
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import imageio.v3 as iio
import numpy as np
import odd_files
import pytest
import torch
from common import compiling, gpu, randn, rel
from PIL import Image
from release import make_release
from safetensors.torch import load_file
from torch import nn

import sample
from wan5b import fuse
from wan5b.dit import PRESETS, WanDiT
from wan5b.extras import clips as extras_clips
from wan5b.extras import (
    files,
    fp8,
    fp8_attention,
    framing,
    media,
    mp4,
    pictures,
    plan,
    random_weights,
    sampling,
    texts,
)
from wan5b.extras.formats import load_dit, load_vae
from wan5b.flow import few_step_sigmas, sampling_sigmas
from wan5b.kvcache import KVCache
from wan5b.t5 import NEGATIVE_PROMPT
from wan5b.util import rng
from wan5b.vae22 import VAE22, VAEConfig, add_residual_
from wan5b.weights import save_dit

SCRIPT = Path(sample.__file__)
SIZE = (32, 64)


@pytest.fixture(scope="module", autouse=True)
def quick_collections():
    """imageio collects garbage whenever it closes a video: 0.25 s unless torch's objects are
    frozen.
    """
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    return make_release(tmp_path_factory.mktemp("sample") / "release")


@pytest.fixture(scope="module")
def vae(release):
    return load_vae(release)


def read(out):
    """What a run left at `out` (no suffix): .frames as the mp4 shows them, .latents, .record."""
    return SimpleNamespace(
        frames=iio.imread(out.with_name(out.name + ".mp4"), plugin="pyav"),
        latents=load_file(out.with_name(out.name + ".safetensors"))["latents"],
        record=json.loads(out.with_name(out.name + ".json").read_text(encoding="utf-8")),
    )


@pytest.fixture
def run(release, tmp_path):
    """run(*options, out=name) -> what was written."""

    def call(*options, out="a", size=True):
        base = ["--release", release, "--device", "cpu", "--latents", "--out", tmp_path / out]
        base += ["--frames", 21] + ["--size", "32x64"] * size
        if "--prompt" not in options:
            base += ["--prompt", "a red ball"]
        if "--weights" not in options:
            base += ["--mode", "few"]  # of the release itself the recipe has 50 steps
        sample.main(sample.parse([str(option) for option in (*base, *options)]))
        return read(tmp_path / out)

    return call


def blurred(frames):
    """Means over 8x8 pixels: finer noise, which random networks make, is lost in the codec."""
    return frames.reshape(len(frames), SIZE[0] // 8, 8, SIZE[1] // 8, 8, 3).mean((2, 4))


def save_picture(path, height=50, width=70, seed=0):
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(path)
    return path


def forbidden(*_, **__):
    raise AssertionError("called")


@pytest.fixture
def no_networks(monkeypatch):
    for name in ("load_vae", "load_dit"):
        monkeypatch.setattr(sample, name, forbidden)
    monkeypatch.setattr(texts, "load_t5", forbidden)
    for name in ("random_vae", "random_dit"):
        monkeypatch.setattr(random_weights, name, forbidden)


# ------------------------------------------------------------------------------------ text to video


def test_text_to_video(run, tmp_path):
    made = run("--frames", 33, "--seed", 5)
    assert made.frames.shape == (33, *SIZE, 3)
    assert made.latents.shape == (1, 48, 9, 2, 4)
    meta = iio.immeta(tmp_path / "a.mp4", plugin="pyav")
    assert (meta["fps"], meta["duration"]) == (24, pytest.approx(33 / 24, abs=1e-3))
    record, settings = made.record, made.record["settings"]
    assert record["frames_written"] == 33
    assert (record["size"], record["chunks"], record["sigmas"]) == (
        [*SIZE],
        [3, 3, 3],
        few_step_sigmas(),
    )
    assert settings.keys() == vars(sample.parse([])).keys()
    assert (settings["prompt"], settings["seed"], settings["frames"]) == (["a red ball"], [5], 33)
    assert settings["out"] == str(tmp_path / "a.mp4")

    again = sample.parse(["--settings", str(tmp_path / "a.json"), "--out", str(tmp_path / "v1.5")])
    sample.main(again)
    assert torch.equal(
        read(tmp_path / "v1.5").latents, made.latents
    )  # and the dot in the name is no suffix
    assert not torch.equal(run("--frames", 33, "--seed", 6, out="seed").latents, made.latents)
    assert not torch.equal(
        run("--frames", 33, "--seed", 5, "--prompt", "a dog", out="prompt").latents, made.latents
    )


def test_frames_are_the_latents_decoded_as_a_whole(run, vae):
    """In order, with no seam between chunks."""
    made = run("--frames", 33, "--window", 6)
    expected = media.to_frames(vae.decode(made.latents)[0]).numpy()
    ours, whole = blurred(made.frames), blurred(expected)
    distance = np.abs(ours[:, None] - whole[None]).mean((2, 3, 4))
    assert distance.diagonal().max() < 4
    assert np.array_equal(distance.argmin(1), np.arange(33))


def test_prompts_and_seeds(run, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("\n  a blue square \r\n\n雨中的街道\n", encoding="utf-8")
    options = ("--prompts", tmp_path / "prompts.txt", "--seed", 1, 22, 1, "--frames", 9)
    with pytest.raises(FileNotFoundError):
        run(*options)  # of the reader: the clips have longer names than --out
    assert capsys.readouterr().out.startswith("6 x 9 frames")  # a seed given twice is one clip
    names = [f"a-{i:03d}-{seed}" for i in range(3) for seed in (1, 22)]
    assert sorted(file.stem for file in tmp_path.glob("*.mp4")) == names
    clips = [read(tmp_path / name) for name in names]
    assert len({clip.latents.numpy().tobytes() for clip in clips}) == 6
    prompts = [clip.record["settings"]["prompt"] for clip in clips[::2]]
    assert prompts == [["a red ball"], ["a blue square"], ["雨中的街道"]]
    # No clip depends on its company: each can be repeated alone.
    sample.main(
        sample.parse(["--settings", str(tmp_path / f"{names[5]}.json"), "--out", f"{tmp_path}/b"])
    )
    assert torch.equal(read(tmp_path / "b").latents, clips[5].latents)
    with pytest.raises(
        ValueError, match=f"{names[5]}.mp4 exists"
    ):  # a repetition names the same file
        sample.main(sample.parse(["--settings", str(tmp_path / f"{names[5]}.json")]))
    with pytest.raises(ValueError, match="a-000-1.mp4 exists"):
        run(*options)


def test_renoising_does_not_repeat_the_noise(run, monkeypatch):
    """On the CPU both come from generators of the same kind: they must not be seeded alike."""
    rollout = sampling.rollout

    def spy(field, noise, *args, renoise, **kwargs):
        first, *others = noise
        fresh = renoise(0, 0, first)
        assert abs((fresh * first).mean()) < 0.1
        assert (fresh - first).abs().mean() > 0.5
        return rollout(field, [first, *others], *args, renoise=renoise, **kwargs)

    monkeypatch.setattr(sampling, "rollout", spy)
    run("--frames", 9)


@pytest.mark.parametrize("mode", ["few", "bidirectional", "few-bidirectional"])
def test_low_memory_gives_the_same(run, mode, tmp_path, monkeypatch):
    save_picture(tmp_path / "a.gif")
    options = ("--mode", mode, "--steps", 2, "--frames", 25, "--image", tmp_path / "a.gif")
    add, given = mp4.VideoWriter.add, []
    monkeypatch.setattr(
        mp4.VideoWriter, "add", lambda self, frames, *_: given.append(frames) or add(self, frames)
    )
    made, held = run(*options), run(*options, "--low-memory", out="held")
    assert torch.equal(made.latents, held.latents)
    streamed, late = torch.cat(given).chunk(2)
    assert torch.equal(streamed, late)
    assert len(made.frames) == len(held.frames) == 25


@pytest.mark.parametrize("low_memory", [False, True])
def test_order_of_memory(run, monkeypatch, low_memory):
    """The text encoder is gone when the DiT comes; with --low-memory the DiT is gone when decoding
    begins.
    """
    load_t5, load_dit, decode, alive = texts.load_t5, sample.load_dit, VAE22.decode_chunk, {}

    def kept(name, load):
        def call(*args, **kwargs):
            alive.setdefault("seen", []).append(
                (name, [k for k in ("t5", "dit") if k in alive and alive[k]()])
            )
            made = load(*args, **kwargs)
            if isinstance(made, nn.Module):
                alive[name] = weakref.ref(made)
            return made

        return call

    monkeypatch.setattr(texts, "load_t5", kept("t5", load_t5))
    monkeypatch.setattr(sample, "load_dit", kept("dit", load_dit))
    monkeypatch.setattr(VAE22, "decode_chunk", kept("decode", decode))
    run("--frames", 9, *["--low-memory"] * low_memory)
    assert alive["seen"] == [("t5", []), ("dit", []), ("decode", [] if low_memory else ["dit"])]


def test_a_single_frame_and_a_sheet(run, tmp_path):
    made = run("--frames", 1, "--chunk", 1, "--sheet")
    assert made.frames.shape == (1, *SIZE, 3)
    assert iio.imread(tmp_path / "a.png").shape == (32, 4 * 64, 3)
    run("--frames", 33, "--sheet", out="long")
    sheet = iio.imread(tmp_path / "long.png")
    assert sheet.shape == (4 * 32, 4 * 64, 3)
    assert (
        np.unique(sheet.reshape(4, 32, 4, 64, 3).mean((1, 3, 4))).size == 16
    )  # 16 different frames


# ------------------------------------------------------------------------------------- given frames


def test_image_to_video(run, tmp_path, vae):
    images = [save_picture(tmp_path / f"{seed}.png", seed=seed) for seed in (1, 2)]
    clips = [run("--image", image, "--frames", 13, out=image.stem) for image in images]
    for clip, image in zip(clips, images, strict=True):
        assert clip.record["chunks"] == [3]
        first = vae.encode(framing.fit(pictures.read_image(image), *SIZE)[None])
        assert torch.equal(clip.latents[:, :, :1], first)
    assert (
        rel(clips[0].latents[:, :, 1:], clips[1].latents[:, :, 1:]) > 1e-5
    )  # the rest depends on the image


def test_size_follows_the_image(run, tmp_path, monkeypatch):
    fitting, shapes = files.fitting_size, []

    def smaller(height, width):
        shapes.append((height, width))
        return fitting(height, width, 64 * 128)

    monkeypatch.setattr(plan, "fitting_size", smaller)
    made = run("--image", save_picture(tmp_path / "high.png", 300, 150), "--frames", 13, size=False)
    assert made.frames.shape == (13, 128, 64, 3)
    run("--frames", 9, out="text", size=False)
    assert shapes == [(300, 150), (704, 1280)]


def test_video_goes_on(run, tmp_path, vae):
    writer = mp4.VideoWriter(tmp_path / "given.mp4")
    writer.add(
        (torch.arange(12).view(12, 1, 1, 1) * torch.ones(12, 48, 80, 3) * 20).to(torch.uint8)
    )
    writer.close()
    made = run("--video", tmp_path / "given.mp4", "--prefix", 5, "--frames", 17)
    assert made.record["chunks"] == [3]
    given = iio.imread(tmp_path / "given.mp4", plugin="pyav")[-5:]
    assert torch.equal(made.latents[:, :, :2], vae.encode(framing.fit(given, *SIZE)[None]))
    assert np.abs(made.latents[:, :, 2:].numpy()).max() > 0
    # Of another rate, the frames that lie 1 / 24 s apart.
    odd_files.write_video(tmp_path / "fast.mp4", odd_files.numbered(40), rate=60)
    first = plan.first_frames(None, tmp_path / "fast.mp4", 9)
    assert odd_files.indices(first) == [19, 22, 24, 27, 29, 32, 34, 37, 39]

    with pytest.raises(ValueError, match="12 frames at 24 fps, 13 are needed"):
        run("--video", tmp_path / "given.mp4", "--prefix", 13, out="b")
    with pytest.raises(ValueError, match="6 frames are not 4k . 1; nearest valid: 5 or 9"):
        run("--video", tmp_path / "given.mp4", "--prefix", 6, out="b")


# -------------------------------------------------------------------------------------------- modes


@pytest.mark.parametrize("solver", ["unipc", "euler"])
@pytest.mark.parametrize("mode", ["many", "bidirectional"])
def test_modes_with_guidance(run, mode, solver, tmp_path, vae):
    options = ("--mode", mode, "--solver", solver, "--steps", 3, "--frames", 9)
    text = run(*options)
    assert text.record["sigmas"] == sampling_sigmas(3)
    assert text.latents.isfinite().all()
    image = save_picture(tmp_path / "a.png")
    made = run(*options, "--frames", 13, "--image", image, out="image")
    assert torch.equal(
        made.latents[:, :, :1], vae.encode(framing.fit(pictures.read_image(image), *SIZE)[None])
    )
    assert made.latents.isfinite().all()
    assert made.record["chunks"] == [3]
    other = run(*options, "--negative", "a dog", out="negative")
    assert rel(other.latents, text.latents) > 1e-4
    plain = run(*options, "--negative", "a dog", "--guidance", 1, out="plain")
    unguided = run(*options, "--guidance", 1, out="unguided")
    assert rel(plain.latents, unguided.latents) < 1e-5  # scale 1 is the conditional branch alone


def test_the_negative_prompt_of_training(run, release, tmp_path, capsys):
    """Guidance leads away from what the weights were trained with in place of a text; records of
    versions that took upstream's for all weights are repeated as they were.
    """
    said = {"stage": "ar", "chunk": 3, "training": {"negative": "a dog"}}
    save_dit(load_dit(release), tmp_path / "ar.safetensors", said)
    options = ("--weights", tmp_path / "ar.safetensors", "--steps", 2, "--frames", 9)
    own = run(*options)
    assert torch.equal(own.latents, run(*options, "--negative", "a dog", out="dog").latents)
    upstream = run(*options, "--negative", NEGATIVE_PROMPT, out="upstream")
    assert rel(upstream.latents, own.latents) > 1e-4

    def repeated(record, out):
        (tmp_path / f"{out}-of.json").write_text(json.dumps(record))
        return run("--settings", tmp_path / f"{out}-of.json", *options, out=out).latents

    assert torch.equal(repeated(own.record, "again"), own.latents)
    assert "will differ" not in capsys.readouterr().err
    del own.record["recipe"]["negative"]
    assert torch.equal(repeated(own.record, "earlier"), upstream.latents)


@pytest.mark.parametrize("mode", ["few", "few-bidirectional"])
def test_few_steps_do_not_see_the_negative_prompt(run, mode):
    plain = run("--mode", mode)
    assert torch.equal(plain.latents, run("--mode", mode, "--negative", "a dog", out="b").latents)


def test_few_steps_over_the_whole_clip(run, tmp_path, vae):
    """From the command line: one chunk of any length, the levels of few steps; behind an image."""
    text = run("--mode", "few-bidirectional", "--frames", 17)
    assert (text.record["chunks"], text.record["sigmas"]) == ([5], few_step_sigmas())
    assert text.latents.isfinite().all()
    assert (
        rel(text.latents, run("--mode", "few", "--frames", 17, "--chunk", 1, out="b").latents) > 0.1
    )

    image = save_picture(tmp_path / "a.png")
    made = run("--mode", "few-bidirectional", "--frames", 17, "--image", image, out="image")
    assert made.record["chunks"] == [4]
    first = vae.encode(framing.fit(pictures.read_image(image), *SIZE)[None])
    assert torch.equal(made.latents[:, :, :1], first)
    assert made.latents.isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("given", [0, 2])
def test_few_steps_over_the_whole_clip_are_this_loop(given):
    """x0 of the whole clip at every level, noised anew; the prefix is clean throughout."""
    model = WanDiT(PRESETS["tiny"]).init_weights(torch.Generator().manual_seed(0))
    whole, context = randn(2, 48, 5, 2, 4), randn(2, 24, 64, seed=1)
    prefix, noise = whole[:, :, :given], whole[:, :, given:]
    draws, x = rng("cpu", 7, "renoise"), noise
    for sigma, following in pairwise(few_step_sigmas()):
        level = torch.tensor([0.0] * given + [sigma] * (5 - given)).expand(2, 5)
        v = model(torch.cat([prefix, x], 2), level, context)[:, :, given:]
        x = x - sigma * v
        if following > 0:
            x = (1 - following) * x + following * torch.randn(x.shape, generator=draws)

    how = {"causal": False, "solver": "renoise", "seed": 7, "prefix": prefix if given else None}
    made = list(sampling.generate(model, noise, context, few_step_sigmas(), [5 - given], **how))
    assert len(made) == (2 if given else 1)
    assert rel(made[-1], x) < 1e-5
    assert torch.equal(torch.cat(made, 2)[:, :, :given], prefix)


@torch.no_grad()
@pytest.mark.parametrize("causal", [False, True])
def test_guidance_1_runs_one_branch(causal, monkeypatch):
    """Half the work, for what both branches would give."""
    model = WanDiT(PRESETS["tiny"]).init_weights(torch.Generator().manual_seed(0))
    rows, compute = [], WanDiT.compute
    monkeypatch.setattr(
        WanDiT, "compute", lambda self, x, *args: rows.append(len(x)) or compute(self, x, *args)
    )
    noise, context = randn(1, 48, 4, 2, 4), randn(2, 24, 64, seed=1)

    def clip(guidance):
        how = {"causal": causal, "solver": "euler", "guidance": guidance}
        made = sampling.generate(model, noise, context, sampling_sigmas(3), [2, 2], **how)
        return torch.cat(list(made), 2)

    one = clip(1.0)
    assert set(rows) == {1}
    assert rel(one, clip(1 + 1e-9)) < 1e-5  # not quite 1: both branches
    assert rows[len(rows) // 2 :] == [2] * (len(rows) // 2)
    assert rel(one, clip(2.0)) > 1e-3


def test_bidirectional_one_step_is_one_call_of_the_network(run, release):
    """--steps 1 --guidance 1: x0 = x - sigma v(x), with the level that the released sampler shows
    the network.
    """
    made = run("--mode", "bidirectional", "--steps", 1, "--guidance", 1, "--frames", 5, "--seed", 3)
    prompts = texts.encode_prompts(
        texts.load_t5(release), texts.load_tokenizer(release), ["a red ball"]
    )
    (noise,), sigma = sampling.draw_noise(3, [2], (48, 2, 4)), sampling_sigmas(1)[0]
    with torch.no_grad():
        v = load_dit(release)(noise, int(1000 * sigma) / 1000, prompts.float())
    assert rel(made.latents, noise - sigma * v) < 1e-4


def test_given_frames_are_clean_at_every_step(run, tmp_path, vae, monkeypatch):
    """Bidirectional: the network sees the image itself at level 0, whatever the solver made of that
    frame.
    """
    forward, seen = WanDiT.forward, []

    def spy(self, x, sigma, context):
        seen.append((x, sigma))
        return forward(self, x, sigma, context)

    monkeypatch.setattr(WanDiT, "forward", spy)
    image = save_picture(tmp_path / "a.png")
    run(
        "--mode",
        "bidirectional",
        "--solver",
        "euler",
        "--steps",
        3,
        "--frames",
        13,
        "--image",
        image,
    )
    clean = vae.encode(framing.fit(pictures.read_image(image), *SIZE)[None])
    assert len(seen) == 3
    for (x, level), sigma in zip(seen, sampling_sigmas(3), strict=False):
        assert torch.equal(x[:, :, :1], torch.cat([clean, clean]))
        assert torch.equal(
            level, torch.tensor([0, sigma, sigma, sigma], dtype=torch.float64).expand(2, 4)
        )


@torch.no_grad()
@pytest.mark.parametrize("given", [0, 1])
@pytest.mark.parametrize("mode", sampling.MODES.values(), ids=sampling.MODES)
def test_a_batch_is_its_clips(mode, given):
    """`generate` with two clips at a time, as the demo does it; without chance: few is one step."""
    model = WanDiT(PRESETS["tiny"]).init_weights(torch.Generator().manual_seed(0))
    x, text = randn(2, 48, 3, 2, 4), randn(4, 24, 64, seed=1)
    noise = x[:, :, given:]
    sigmas = sampling_sigmas(3) if mode.guided else few_step_sigmas([1000])
    how = {"causal": mode.causal, "solver": mode.solver, "guidance": 2.0 if mode.guided else None}

    def clips(rows):
        context = text[rows + [row + 2 for row in rows] if mode.guided else rows]
        start = x[rows, :, :given] if given else None
        made = sampling.generate(
            model, noise[rows], context, sigmas, [noise.shape[2]], prefix=start, **how
        )
        return torch.cat(list(made), 2)

    together = clips([0, 1])
    assert together.shape == x.shape
    assert rel(together, torch.cat([clips([0]), clips([1])])) < 1e-5


def test_metadata_of_an_export(run, release, tmp_path):
    weights = tmp_path / "export.safetensors"
    save_dit(
        load_dit(release), weights, {"levels": [1000, 500], "shift": 3.0, "chunk": 2, "prefix": 1}
    )
    args = [
        "--release",
        str(release),
        "--weights",
        str(weights),
        "--prompt",
        "a",
        "--size",
        "32x64",
        "--device",
        "cpu",
    ]

    def record(*options):
        sample.main(sample.parse([*args, "--overwrite", "--out", f"{tmp_path}/a.mp4", *options]))
        return json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))

    made = record("--frames", "17")
    assert made["trained"] == {"levels": [1000, 500], "shift": 3.0, "chunk": 2, "prefix": 1}
    assert made["sigmas"] == few_step_sigmas([1000, 500], 3.0)
    assert made["chunks"] == [1, 2, 2]
    over = record("--frames", "17", "--chunk", "4", "--shift", "5")
    assert over["sigmas"] == few_step_sigmas([1000, 500], 5.0)
    assert over["chunks"] == [1, 4]
    given = record(
        "--frames", "13", "--chunk", "3", "--image", str(save_picture(tmp_path / "image.png"))
    )
    assert given["chunks"] == [3]  # the image is the first chunk


def test_window_bounds_the_memory(run, monkeypatch):
    """30 latent frames in a cache of 6 equal a cache of 30 whose window is 6, unlike no window."""
    made = []

    class Spy(KVCache):
        def __init__(self, cfg, batch, frames, *args):
            super().__init__(cfg, batch, self.capacities.pop(0) or frames, *args)
            made.append(self.capacity)

        capacities = [None, 30, None, None]

    monkeypatch.setattr(fp8_attention, "KVCache", Spy)
    monkeypatch.setattr(
        VAE22, "decode_chunk", lambda self, latent, state: torch.zeros(1, 3, 1, *SIZE)
    )  # quicker
    long = ("--frames", 117)
    window = run(*long, "--window", 6, "--sink", 1)
    whole = run(*long, "--window", 6, "--sink", 1, out="b")
    every = run(*long, out="c")
    assert made == [6, 30, 30]
    assert rel(window.latents, whole.latents) < 1e-5
    assert rel(window.latents, every.latents) > 1e-4
    run("--window", 100, out="d")
    assert made[3] == 6, "a window beyond the clip needs no memory beyond the clip"


@pytest.mark.parametrize("low_memory", [False, True])
def test_clips_share_a_cache(run, tmp_path, monkeypatch, low_memory):
    """So that its CUDA graphs are of use to all of them; what it held of the clip before does not
    show.
    """
    made = []

    def spy(*args):
        made.append(KVCache(*args))
        return made[-1]

    monkeypatch.setattr(fp8_attention, "KVCache", spy)
    options = ("--frames", 33, "--window", 5, "--sink", 1, *["--low-memory"] * low_memory)
    with pytest.raises(FileNotFoundError):  # of the reader: the clips have longer names than --out
        run(*options, "--seed", 1, 2)
    assert len(made) == 1
    alone = run(*options, "--seed", 2, out="alone")
    assert torch.equal(read(tmp_path / "a-000-2").latents, alone.latents)


# -------------------------------------------------------------------------------------------- stops


def stop_at(monkeypatch, call, error):
    """Have the call-th chunk (from 0) raise in place of being decoded."""
    decode, calls = VAE22.decode_chunk, iter(range(1000))

    def stopping(self, latent, state):
        if next(calls) == call:
            raise error
        return decode(self, latent, state)

    monkeypatch.setattr(VAE22, "decode_chunk", stopping)


@pytest.mark.parametrize("low_memory", [False, True])
def test_ctrl_c_leaves_what_was_finished(run, tmp_path, monkeypatch, low_memory):
    whole = run("--frames", 45, out="whole")
    stop_at(monkeypatch, 2, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        run("--frames", 45, "--sheet", *["--low-memory"] * low_memory)
    assert {file.name for file in tmp_path.glob("a*")} == {
        "a.mp4",
        "a.json",
        "a.png",
        "a.safetensors",
    }
    made = read(tmp_path / "a")
    assert made.frames.shape == (21, *SIZE, 3)
    assert made.record["frames_written"] == 21
    assert torch.equal(
        made.latents, whole.latents[:, :, :6]
    )  # what the frames show, and nothing more


def test_ctrl_c_before_the_first_frame_leaves_nothing(run, tmp_path, monkeypatch):
    stop_at(monkeypatch, 0, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        run("--sheet")
    assert not list(tmp_path.glob("a*"))


def test_ctrl_c_ends_all_clips(run, tmp_path, monkeypatch):
    stop_at(monkeypatch, 3, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        run("--seed", 1, 2, 3)
    assert [file.name for file in sorted(tmp_path.glob("*.mp4"))] == ["a-000-1.mp4", "a-000-2.mp4"]


def test_failure_leaves_what_was_finished(run, tmp_path, monkeypatch):
    stop_at(monkeypatch, 2, RuntimeError("out of memory"))
    with pytest.raises(RuntimeError, match="out of memory"):
        run("--frames", 45)
    made = read(tmp_path / "a")
    assert made.frames.shape == (21, *SIZE, 3)
    assert (made.record["frames_written"], made.record["settings"]["frames"]) == (21, 45)


def test_failure_to_encode_is_raised(run, tmp_path, monkeypatch):
    monkeypatch.setattr(mp4.VideoWriter, "_encode", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run("--sheet")
    assert not (tmp_path / "a.mp4").exists()


def test_write_of_a_video_alone(tmp_path):
    """As train.py uses it."""
    vae = random_weights.random_vae("tiny", "cpu")
    sample.write(
        vae, iter([randn(1, 48, 3, 2, 4), randn(1, 48, 3, 2, 4, seed=1)]), tmp_path / "a.mp4"
    )
    assert [file.name for file in tmp_path.iterdir()] == ["a.mp4"]
    assert iio.imread(tmp_path / "a.mp4", plugin="pyav").shape == (21, *SIZE, 3)


def test_ctrl_c_in_a_terminal(tmp_path):
    """The signal itself, at whatever moment it comes."""
    options = "--random-weights --preset tiny --size 32x64 --frames 4001 --chunk 1 --window 3"
    options += " --prompt a --device cpu"
    command = [sys.executable, SCRIPT, *options.split(), "--out", tmp_path / "a"]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        bar = ""
        while not re.search(r" [1-9]\d*/4001", bar):  # frames have been written
            read = process.stderr.read(1)
            assert read, bar
            bar += read
        process.send_signal(signal.SIGINT)
        _, rest = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in rest
    assert {file.name for file in tmp_path.iterdir()} == {"a.mp4", "a.json"}
    written = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))["frames_written"]
    assert 0 < written < 4001
    assert len(iio.imread(tmp_path / "a.mp4", plugin="pyav")) == written


# ----------------------------------------------------------------------------------------- refusals


def test_existing_files_are_kept(run, tmp_path, no_networks, monkeypatch):
    for suffix in (".mp4", ".json", ".png", ".safetensors"):
        file = tmp_path / f"a{suffix}"
        file.write_text("mine")
        with pytest.raises(ValueError, match=re.escape(f"{file} exists; ") + ".*--overwrite"):
            run("--sheet")
        assert file.read_text() == "mine"
        file.unlink()
    (tmp_path / "a.png").write_text("mine")
    monkeypatch.undo()
    run()  # no sheet is asked for
    assert (tmp_path / "a.png").read_text() == "mine"
    assert run("--overwrite", "--frames", 9).frames.shape[0] == 9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--frames 82", "--frames 82 is not chunks of 3; nearest: 81 or 93 (chunks count"),
        ("--frames 2", "nearest: 9 or 21 (chunks count latent frames, and k + 1 of these are 4k"),
        ("--frames 0", "--frames 0 is not chunks of 3; nearest: 9 or 21"),
        ("--frames 25", "chunks of 3; nearest: 21 or 33"),
        ("--frames 5", "chunks of 3; nearest: 9"),
        (
            "--frames 81 --image {image}",
            "1 latent frames and chunks of 3; nearest: 73 or 85",
        ),
        ("--frames 5 --image {image}", "nearest: 13 or 25"),
        ("--frames 1 --image {image}", "nearest: 13 or 25"),
        ("--size 70x96", "nearest valid: 64 or 96 by 96"),
        ("--size 64", "HEIGHTxWIDTH"),
        ("--image {dir}/none.png", "cannot read the image {dir}/none.png"),
        ("--image {text}", "cannot read the image {text}"),
        ("--video {dir}/none.mp4", "cannot read the video {dir}/none.mp4"),
        ("--video {text}", "cannot read the video {text}"),
        ("--video {image} --prefix 5", "cannot read the video {image}"),
        ("--video {image} --prefix 0", "--prefix 0: must be above 0"),
        ("--image {image} --video {image}", "not both"),
        ("--prompts {dir}/none.txt", "cannot read the prompts {dir}/none.txt"),
        ("--prompts {latin}", "cannot read the prompts {latin}"),
        ("--prompts {empty}", "{empty} holds no prompts"),
        (
            "--settings {dir}/none.json",
            "cannot read --settings {dir}/none.json: No such file or directory",
        ),
        ("--settings {text}", "{text} is not a JSON that this sample.py wrote"),
        ("--settings {other}", "{other} is not a JSON that this sample.py wrote"),
        (
            "--settings {older}",
            "{older} is not a JSON that this sample.py wrote: it lacks at, chunk, ",
        ),
        ("--window 2", "--window 2: no room"),
        (
            "--image {image} --frames 37 --window 3",
            "--window 3: a chunk of 3 frames fills it, and none would see the image or video in "
            "front; give --window 4 or more, or --sink",
        ),
        ("--window 3 --sink 1", "--window 3: no room for --sink 1 and a chunk of 3"),
        ("--window 6 --sink -1", "--sink -1: must be 0 or more"),
        (
            "--sink 1",
            "no --window: no room for --sink 1 and a chunk of 3 frames; give --window 4 or more",
        ),
        ("--window 0", "--window 0: must be above 0"),
        ("--chunk 0", "--chunk 0: must be above 0"),
        ("--steps 0", "--steps 0: must be above 0"),
        ("--shift 0", "--shift 0.0: must be above 0"),
        ("--shift inf", "--shift inf: must be above 0, and finite"),
        ("--shift nan", "--shift nan: must be above 0"),
        ("--fp8", "--fp8 needs bfloat16 on a GPU"),
        ("--fp8-attention", "float8 attention needs a Hopper GPU (H100, H200), not cpu: leave out"),
        (
            "--fp8-attention --mode bidirectional",
            "float8 attention is for clips made chunk by chunk",
        ),
        ("--release {dir}/none", "{dir}/none: no such file or folder"),
        ("--weights {dir}/none.pt", "{dir}/none.pt: no such file or folder"),
        ("--out {text}/a", "cannot make the folder {text} (File exists: {text})"),
    ],
)
def test_refusals(run, tmp_path, no_networks, options, message, capsys):
    """One line each, before any network is loaded."""
    names = {"dir": tmp_path, "image": save_picture(tmp_path / "a.png")}
    for name, content in {
        "text": b"hello",
        "latin": b"caf\xe9",
        "other": b'{"frames": 5}',
        "older": b'{"settings": {"frames": 5}}',
        "empty": b"\n  \n",
    }.items():
        names[name] = tmp_path / name
        names[name].write_bytes(content)
    with pytest.raises((OSError, ValueError), match=re.escape(message.format(**names))) as error:
        run(*options.format(**names).split())
    assert "\n" not in str(error.value)
    assert capsys.readouterr() == ("", "")


def test_no_device_that_is_not_there():
    for device in ("tpu", *["cuda"] * (not torch.cuda.is_available())):
        with pytest.raises(ValueError, match=f"argument --device: invalid choice: '{device}'"):
            sample.parse(["--device", device])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--steps 8 --solver euler", "--steps, --solver has no effect"),
        ("--guidance 9 --negative blurry", "--guidance, --negative has no effect"),
        ("--prefix 5", "--prefix has no effect"),
        (
            "--mode bidirectional --steps 1 --window 3 --sink 1 --chunk 2",
            "--chunk, --window, --sink",
        ),
        ("--mode few-bidirectional --steps 1", "--steps has no effect"),
    ],
)
def test_options_without_effect_are_named(run, capsys, options, says):
    run("--frames", 9, *options.split())
    assert f"note: {says}" in capsys.readouterr().err


def test_what_an_export_says_of_itself_is_used(run, release, tmp_path, capsys):
    """Window and mode by default; a note where the command line wants another mode."""
    model = load_dit(release)
    for stage, own in (("ar", "many"), ("dmd", "few"), ("teacher", "bidirectional")):
        path = tmp_path / "weights" / f"{stage}.safetensors"
        save_dit(model, path, {"stage": stage, "window": 3, "chunk": 3})
        options = ["--weights", path, "--frames", 21] + ["--steps", 1] * (own != "few")
        made = run(*options, out=stage)
        assert "note" not in capsys.readouterr().err
        assert made.record["sampler"]["causal"] == (own != "bidirectional")
        assert made.record["sampler"]["solver"] == ("renoise" if own == "few" else "unipc")
        if own != "bidirectional":
            assert made.record["sampler"]["window"] == 3
        other = "few" if own == "many" else "many"
        run(*options, "--mode", other, "--steps", 1, "--overwrite", out=stage)
        said = f"note: these weights are of stage {stage}, made for --mode {own}"
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("seed", [-1, 2**32, 2**63, 2**64])
def test_seeds_that_would_be_others_are_refused(run, no_networks, seed):
    with pytest.raises(ValueError, match=f"--seed {seed}: must be from 0 to 4294967295"):
        run("--seed", 0, seed)


def test_a_prompt_that_is_cut_says_so(run, capsys):
    long = "a " * 600 + "blue whale"
    run("--frames", 9, "--prompt", long)
    assert "is cut to 512" in capsys.readouterr().err
    # A negative one counts for nothing without guidance.
    run("--frames", 9, "--mode", "few", "--negative", long, out="other")
    assert "is cut to 512" not in capsys.readouterr().err


def test_home_with_settings(tmp_path):
    """~ of an option beside --settings is the home folder, as without."""
    settings = vars(sample.parse(["--random-weights", "--prompt", "x"]))
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"settings": settings}))
    assert sample.parse(["--settings", str(path), "--image=~/a.png"]).image == str(
        Path.home() / "a.png"
    )


@pytest.mark.parametrize(
    "change",
    [
        {"device": "cuda:77"},
        {"mode": "fast"},
        {"dtype": "float16"},
        {"frames": "9"},
        {"frames": True},
        {"seed": 0},
        {"seed": ["0"]},
        {"prompt": "a red ball"},
        {"prompt": [1]},
        {"size": [32, 64]},
        {"out": None},
        {"window": 3.0},
        {"sheet": 1},
        {"guidance": "5"},
    ],
    ids=str,
)
def test_settings_are_checked_like_a_command_line(tmp_path, change):
    settings = vars(sample.parse(["--random-weights", "--prompt", "x"]))
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"settings": settings}))
    again = vars(sample.parse(["--settings", str(path)]))
    assert again == settings | {"settings": str(path)}
    path.write_text("\ufeff" + json.dumps({"settings": settings | change}))
    with pytest.raises(ValueError, match=f"a.json is not a JSON .* {next(iter(change))} is "):
        sample.parse(["--settings", str(path)])


def test_not_a_number_is_no_picture(run, release, tmp_path):
    """Weights that overflow leave no black clip without a word."""
    model = load_dit(release)
    with torch.no_grad():
        model.head.head.weight.mul_(1e38)
    path = tmp_path / "x.safetensors"
    save_dit(model, path, {"stage": "dmd"})
    with pytest.raises(ValueError, match="a.mp4: a chunk is not finite"):
        run("--frames", 9, "--weights", path)
    for option in (["--mode", "many", "--guidance", "nan"], ["--shift", "inf"]):
        with pytest.raises(ValueError, match=r"--(guidance nan|shift inf): must be"):
            run("--frames", 9, *option)


def test_every_option_is_explained():
    """The help is the script's docstring."""
    for name in vars(sample.parse([])):
        assert f"\n--{name.replace('_', '-')} " in sample.__doc__, name


def test_a_folder_as_output(run, tmp_path):
    """An ending slash: sample.mp4 in there, which is not overwritten either. So without, once the
    folder is there.
    """
    with pytest.raises(FileNotFoundError):  # what `run` reads afterwards has another name
        run("--frames", 9, "--out", f"{tmp_path}/new/")
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == [
        f"sample.{suffix}" for suffix in ("json", "mp4", "safetensors")
    ]
    with pytest.raises(ValueError, match="new/sample.mp4 exists"):
        run("--frames", 9, "--out", f"{tmp_path}/new/")
    with pytest.raises(ValueError, match="new/sample.mp4 exists"):
        run("--frames", 9, "--out", f"{tmp_path}/new")


def test_a_prompt_of_any_bytes_is_recorded(run, tmp_path):
    """As Python hands over what a terminal of another encoding sends; the record repeats it."""
    first = run("--frames", 9, "--prompt", "caf\udce9")
    sample.main(
        sample.parse(["--settings", str(tmp_path / "a.json"), "--out", str(tmp_path / "b")])
    )
    assert read(tmp_path / "b").record["settings"]["prompt"] == ["caf\udce9"]
    assert torch.equal(read(tmp_path / "b").latents, first.latents)


def test_refusals_without_prompt_or_release(release, no_networks):
    with pytest.raises(ValueError, match="no prompt: give --prompt"):
        sample.main(sample.parse(["--release", str(release)]))
    with pytest.raises(ValueError, match="name the release folder"):
        sample.main(sample.parse(["--prompt", "a"]))


def test_refusal_of_a_folder_that_is_read_only(run, no_networks, monkeypatch, tmp_path):
    monkeypatch.setattr(extras_clips.os, "access", lambda *_: False)  # root may write everywhere
    with pytest.raises(ValueError, match=f"cannot write to the folder {tmp_path}; "):
        run()


def test_refusal_in_a_terminal(release):
    command = [sys.executable, SCRIPT, "--release", release, "--prompt", "a", "--image", "none.png"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("sample.py: error: cannot read the image none.png: ")
    assert done.stderr.count("\n") == 1
    assert not done.stdout


@pytest.mark.parametrize(
    ("mode", "given", "size", "first", "expected"),
    [  # without --frames: 81, or what chunks fill next; `given` latent frames of a video in front
        ("few", 0, 3, None, [3] * 7),
        ("few", 1, 3, None, [3] * 7),  # 85
        ("few", 0, 3, 1, [1] + [3] * 7),
        ("few", 3, 3, 1, [3] * 6),
        ("few", 0, 4, None, [4] * 6),  # 93
        ("few", 25, 3, None, [3]),  # more is given than 81
        ("bidirectional", 0, 3, 1, [21]),
        ("bidirectional", 1, 3, None, [20]),
        ("few-bidirectional", 1, 3, 1, [20]),
        ("few-bidirectional", 25, 3, None, [1]),
    ],
)
def test_default_length(monkeypatch, tmp_path, mode, given, size, first, expected):
    monkeypatch.setattr(plan, "open_dit", lambda *_, **__: (PRESETS["tiny"], {}))
    monkeypatch.setattr(plan, "read_metadata", lambda _: {"chunk": size, "prefix": first})
    monkeypatch.setattr(plan, "read_video", lambda _, last, fps: np.zeros((last, 32, 64, 3), "u1"))
    options = ["--release", "x", "--prompt", "a", "--mode", mode, "--out", f"{tmp_path}/a.mp4"]
    if given:
        options += ["--video", "x", "--prefix", str(4 * given - 3)]
    job = plan.plan(sample.parse([*options, "--device", "cpu"]))
    assert job.sampler["chunks"] == expected
    assert job.frames == 4 * (given + sum(expected)) - 3


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit, match="0"):
        sample.parse(["--help"])
    shown = capsys.readouterr().out
    explained = re.findall(r"^--([a-z0-9-]+) ", shown, re.MULTILINE)
    assert sorted(explained) == sorted(name.replace("_", "-") for name in vars(sample.parse([])))
    assert all(f"{mode} " in shown for mode in sampling.MODES)


# ---------------------------------------------------------------------------------- compile and fp8


def test_pieces_are_not_compiled_unless_asked_for(monkeypatch):
    monkeypatch.setattr(torch, "compile", forbidden)
    h, bias, x = randn(2, 3), randn(3), randn(2, 3)
    assert torch.equal(add_residual_(h.clone(), bias, x), h + bias + x)


def test_compiled_piece_gives_the_same(monkeypatch):
    calls, compile = [], torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda *args, **kwargs: calls.append(args) or compile(*args, **kwargs)
    )
    piece = fuse.fused(lambda x, scale: torch.nn.functional.silu(x * scale) + x)
    x, scale = randn(64, 48), randn(48, seed=1)
    with compiling():
        fuse.enable()
        with torch.no_grad():
            fused = piece(x, scale), piece(2 * x, scale)
    assert len(calls) == 1
    for y, like in zip(fused, (x, 2 * x), strict=True):
        assert rel(y, piece(like, scale)) < 1e-6


def test_fp8_rounding():
    """Within half a step of e4m3 (2^-4 relative, 2^-10 of the scale near 0); each row on its own
    scale.
    """
    x = randn(8, 64) * torch.logspace(-6, 6, 8)[:, None]
    x[3], x[4, 0] = 0, 1e9
    q, scale = fp8.quantize(x)
    assert q.dtype == torch.float8_e4m3fn
    assert scale.shape == (8, 1)
    error = (q.float() * scale - x).abs()
    assert (error <= torch.maximum(x.abs() * 2**-4, scale * 2**-10) * 1.001).all()
    assert torch.allclose((q.float() * scale).abs().amax(1), x.abs().amax(1), rtol=1e-5)


def test_fp8_rounding_of_gelu():
    """Within the same steps of gelu(x), though its maximum is not looked for; below 0 too."""
    x = 3 * randn(8, 64)
    x[0], x[1], x[2, 0], x[3], x[4] = (
        x[0] - 30,
        -0.7518,
        1e4,
        0,
        x[4] * 1e-3,
    )  # -0.7518: where gelu is lowest
    y = nn.functional.gelu(x, approximate="tanh")
    q, scale = fp8.quantize(x, gelu=True)
    assert q.float().isfinite().all()
    assert (
        (q.float() * scale - y).abs() <= torch.maximum(y.abs() * 2**-4, scale * 2**-10) * 1.001
    ).all()
    assert (scale * 448 <= y.abs().amax(1, keepdim=True).clamp(min=0.1701) * 1.00001).all()


def test_fp8_replaces_the_linear_layers_of_the_blocks():
    model = WanDiT(PRESETS["tiny"])
    before = sum(isinstance(m, nn.Linear) for m in model.modules())
    size = sum(p.nbytes for p in model.blocks.parameters())
    fp8.quantize_blocks(model)
    kinds = [type(m) for m in model.blocks.modules()]
    assert nn.Linear not in kinds
    assert kinds.count(fp8.Fp8Linear) == 10 * len(model.blocks)
    assert (
        sum(isinstance(m, nn.Linear) for m in model.modules())
        == before - 10 * len(model.blocks)
        == 6
    )
    assert sum(p.nbytes for p in model.blocks.parameters()) < 0.3 * size


@gpu
def test_fp8_linear_on_the_gpu():
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs compute capability 8.9")
    linear = nn.Linear(1024, 2048, device="cuda", dtype=torch.bfloat16)
    x = randn(2, 3, 40, 1024).cuda().bfloat16()
    x[0, 0, 0] *= 1000  # a row of its own scale
    with torch.no_grad():
        y = fp8.Fp8Linear(linear)(x)
        assert y.dtype == torch.bfloat16
        expected = nn.functional.linear(x.float(), linear.weight.float(), linear.bias.float())
    assert rel(y[0, 0, 0], expected[0, 0, 0]) < 5e-2
    assert rel(y[1], expected[1]) < 5e-2
    model = WanDiT(PRESETS["tiny"]).init_weights(torch.Generator().manual_seed(0)).cuda().bfloat16()
    context = randn(1, model.cfg.text_len, model.cfg.text_dim, seed=1).cuda().bfloat16()
    inputs = randn(1, 48, 2, 4, 6).cuda(), 0.5, context
    with torch.no_grad():
        whole = model(*inputs)
        assert rel(fp8.quantize_blocks(model)(*inputs), whole) < 0.2


@gpu
def test_clip_on_the_gpu(tmp_path):
    """bfloat16, pinned copies beside the stream: the mp4 shows the decoded latents, and twice the
    same bytes.
    """
    options = "--random-weights --preset tiny --size 32x64 --frames 33 --prompt a --latents"
    options += " --window 6 --device cuda"
    for name in ("a", "b"):
        sample.main(sample.parse([*options.split(), "--out", str(tmp_path / name)]))
    made = read(tmp_path / "a")
    assert torch.equal(made.latents, read(tmp_path / "b").latents)
    _, decoder = random_weights.random_networks("tiny", torch.device("cuda"), torch.bfloat16)
    assert isinstance(decoder.cfg, VAEConfig)
    expected = media.to_frames(decoder.bfloat16().decode(made.latents.cuda())[0]).cpu().numpy()
    assert np.abs(blurred(made.frames) - blurred(expected)).mean((1, 2, 3)).max() < 6


@gpu
def test_compiled_clip_on_the_gpu(tmp_path):
    """As without --compile, for all clips that share a cache and its CUDA graphs."""
    options = (
        "--random-weights --preset tiny --size 32x64 --frames 33 --prompt a --latents --window 6"
    )
    options += " --seed 1 2 --device cuda --dtype float32"
    with compiling():
        for name, more in (("a", ""), ("b", "--compile"), ("c", "--compile --low-memory")):
            out = ["--out", str(tmp_path / name)]
            sample.main(sample.parse([*options.split(), *more.split(), *out]))
    for clip in ("000-1", "000-2"):
        plain, compiled, late = (read(tmp_path / f"{name}-{clip}").latents for name in "abc")
        assert rel(compiled, plain) < 1e-3
        assert torch.equal(late, compiled)
