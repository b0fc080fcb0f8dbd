"""LongLive 2 from the command line against what its own code made (golden/longlive2), and scenes.

Real are the options, the recognition, the recipe, the network and what is saved; the noise, the
text's and the image's embeddings are the vectors', and no pixels are decoded.
"""

import json
from types import SimpleNamespace

import pytest
import torch
from common import rel
from PIL import Image
from release import random_weights
from safetensors.torch import load_file
from test_longlive2 import ABOUT, CASES, CUT, FOLDER

import sample
from wan5b.distill import rollout
from wan5b.extras import chunking, sampling
from wan5b.extras.formats import load_dit
from wan5b.extras.plan import plan
from wan5b.extras.recipes import Recipe, load
from wan5b.flow import sampling_sigmas
from wan5b.kvcache import KVCache
from wan5b.vae22 import VAE22, VAEConfig

LONGLIVE = "longlive2 (checkpoint_format): chunk by chunk, "
NO_CUTS = """
causal = true
steps = 4
chunk = 2
window = 6
sink = 2
"""


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The network is tiny."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tensors():
    return load_file(FOLDER / "cases.safetensors")


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """A VAE is all that is read of it."""
    folder = tmp_path_factory.mktemp("shots")
    vae = random_weights(VAE22(VAEConfig(dim=4, dec_dim=8)), 1)
    torch.save(vae.state_dict(), folder / "Wan2.2_VAE.pth")
    Image.new("RGB", (96, 64)).save(folder / "image.png")
    return folder


@pytest.fixture
def run(release, tensors, tmp_path, monkeypatch):
    """run(noise, image, *options) -> .latents, .record of sample.py with the vectors' inputs."""

    def embed(texts, *_):
        rows = [ABOUT["texts"].index(text) for text in texts]
        return tensors["context"][rows]

    def pixels(self, latents, state):
        return torch.zeros(1, 3, 1, 16 * latents.shape[3], 16 * latents.shape[4])

    monkeypatch.setattr(sample, "embed", embed)
    monkeypatch.setattr(VAE22, "decode_chunk", pixels)

    def call(noise, image, *options, out="a"):
        def draw_noise(seed, chunks, size, first):
            assert (sum(chunks), *size) == (noise.shape[2], noise.shape[1], *noise.shape[3:])
            return iter(noise.split(chunks, 2))

        height, width = noise.shape[3:]
        base = ["--release", release, "--weights", FOLDER / "model_bf16.pt", "--device", "cpu"]
        base += ["--negative", "negative", "--size", f"{16 * height}x{16 * width}"]
        base += ["--latents", "--out", tmp_path / out]
        if image is not None:
            base += ["--image", release / "image.png"]
            monkeypatch.setattr(VAE22, "encode", lambda *_: image)
        args = sample.parse([str(option) for option in (*base, *options)])
        monkeypatch.setattr(sample, "draw_noise", draw_noise)
        sample.main(args)
        latents = load_file(tmp_path / f"{out}.safetensors")["latents"]
        record = json.loads((tmp_path / f"{out}.json").read_text())
        return SimpleNamespace(latents=latents, record=record)

    return call


@pytest.mark.parametrize("name", CASES)
def test_equals_its_own_code(run, tensors, name, tmp_path, monkeypatch, capsys):
    """Every case: chunk, window and sink are the vectors', all else is the recipe's."""
    case = CASES[name]
    noise = tensors[f"{name}.noise"].transpose(1, 2)
    image = tensors.get(f"{name}.image")
    if image is not None:
        noise = noise[:, :, 1:]
        image = image.transpose(1, 2)
    options = ["--frames", 4 * case["frames"] - 3]
    for option, key in (("chunk", "block"), ("window", "window"), ("sink", "sink")):
        options += [f"--{option}", case[key]]
    if case["steps"] != 4:
        options += ["--steps", case["steps"]]
    if case["guidance"] != 1:
        options += ["--guidance", case["guidance"]]

    # The vectors' scenes are not of equal lengths.
    prompts = [text.removeprefix(CUT) for text in case["prompts"]]
    begins = [0]
    for i in range(1, len(prompts)):
        if case["prompts"][i].startswith(CUT) or prompts[i] != prompts[i - 1]:
            begins.append(i)
    options += ["--prompt", *(prompts[i] for i in begins)]
    if len(begins) > 1:
        options.append("--shots")
        monkeypatch.setattr(chunking, "starts", lambda *_: begins)
    if name == "prompt_switch":
        (tmp_path / "own.toml").write_text(NO_CUTS)
        options += ["--recipe", tmp_path / "own.toml"]
    made = run(noise, image, *options)
    expected = tensors[f"{name}.latents"].transpose(1, 2)
    assert rel(made.latents, expected) < 1e-6
    if name != "prompt_switch":
        said = capsys.readouterr().out.splitlines()[-1]
        solver = f"{case['steps']} steps of unipc, shift 5, guidance {case['guidance']:g}, "
        memory = f"chunks of {case['block']}, window {case['window']}, sink {case['sink']}"
        assert said == LONGLIVE + solver + memory


def reference(tensors, noise, image, prompts, cuts):
    """8 / 32 / 8, four steps of UniPC, as the vectors' code does it: texts by chunk."""
    model = load_dit(FOLDER / "model_bf16.pt", part="generator")
    one = {text: tensors["context"][ABOUT["texts"].index(text)][None] for text in prompts}
    chunks = [8] * len(prompts)
    if image is not None:
        chunks[0] = 7
    cache = KVCache(model.cfg, 1, min(32, 8 * len(prompts)), 2, 32, 8)
    how = {"prefix": image, "prefix_inside": image is not None, "cuts": cuts, "solver": "unipc"}
    context = [one[text] for text in prompts]
    with torch.no_grad():
        made = rollout(model, noise, context, sampling_sigmas(4, 5.0), chunks, cache, **how)
        return torch.cat([*([] if image is None else [image]), *made], 2)


A, B, C = "A", "B", "C"
COMMANDS = {
    "text": (189, [A], False, [A] * 6, {}),
    "image": (189, [A], True, [A] * 6, {}),
    "shots": (221, [A, B], False, [A] * 4 + [CUT + B, B, B], {4: 8}),
    "image, shots": (
        *(221, [A, B, C], True),
        *([A] * 3 + [CUT + B, B] + [CUT + C, C], {3: 8, 5: 8}),
    ),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_as_its_makers_sample_it(run, tensors, name, monkeypatch):
    """The recipe as it is, without an option but --frames and --shots; equal shares."""
    shown = []

    def spy(field, noise, context, *args, **how):
        texts = list(context)
        shown.extend(texts)
        return rollout(field, noise, texts, *args, **how)

    monkeypatch.setattr(sampling, "rollout", spy)
    frames, prompts, behind, texts, cuts = COMMANDS[name]
    draws = torch.Generator().manual_seed(7)
    whole = torch.randn(1, 48, (frames + 3) // 4, 2, 4, generator=draws)
    image = whole[:, :, :1] if behind else None
    noise = whole[:, :, 1:] if behind else whole
    options = ["--frames", frames, "--prompt", *prompts, *["--shots"] * (len(prompts) > 1)]
    made = run(noise, image, *options)
    expected = reference(tensors, noise, image, texts, cuts)
    assert rel(made.latents, expected) < 1e-6
    # Of one text one tensor, by which the cache knows that it has its keys.
    assert len(shown) == len(texts)
    assert len({id(text) for text in shown}) == len(set(texts))
    assert made.record["chunks"] == [8 - behind] + [8] * (len(texts) - 1)
    assert made.record["settings"]["prompt"] == prompts
    assert made.record["recipe"]["name"] == "longlive2"

    # The record repeats it.
    if len(prompts) > 1:
        again = run(
            noise, image, "--settings", made.record["settings"]["out"][:-3] + "json", out="b"
        )
        assert torch.equal(again.latents, made.latents)
        assert again.record["settings"]["shots"] is True


# ------------------------------------------------------------------------------------------- scenes

LONG = load("longlive2")


@pytest.mark.parametrize(
    ("scenes", "chunks", "expected"),
    [
        (1, 3, [0]),
        (2, 7, [0, 4]),
        (3, 7, [0, 3, 5]),
        (3, 8, [0, 3, 6]),
        (4, 4, [0, 1, 2, 3]),
    ],
)
def test_equal_shares(scenes, chunks, expected):
    assert chunking.starts(scenes, chunks) == expected


def test_texts_of_scenes():
    shown = chunking.scene_texts(["A", CUT + "B", "A"], 6, LONG)
    assert shown == ["A", "A", CUT + "B", "B", CUT + "A", "A"]  # no prefix twice
    plain = Recipe(causal=True, chunk=3)
    assert chunking.scene_texts(["A", "B"], 3, plain) == ["A", "A", "B"]
    assert chunking.scene_cuts(2, 0, [3, 3, 3], plain) == {}
    assert chunking.scene_cuts(1, 0, [8, 8], LONG) == {}
    assert chunking.scene_cuts(3, 1, [7, 8, 8, 8], LONG) == {2: 8, 3: 8}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--frames 29", r"--shots: 2 prompts for 1 chunks; give --frames 61, or fewer prompts"),
        ("--frames 29 --image {image}", "give --frames 61"),
        (
            "--mode bidirectional",
            "--shots needs chunks: here the whole clip is made at once; leave it out",
        ),
        ("--recipe fastwan", "--shots needs chunks"),
        ("--frames 61 --window 16", "a window of 16 has no room .*; give --window 24 or a smaller"),
        ("--frames 13 --chunk 2 --sink 6", "the first scene has 2 latent frames, fewer than .* 6"),
        ("--frames 81", "--frames 81 is not chunks of 8; nearest: 61 or 93"),
        ("--frames 81 --image {image}", "--frames 81 is not chunks of 8; nearest: 61 or 93"),
        (
            "--frames 9 --image {image} --chunk 1 --sink 1",
            "a first chunk of 1 has no room behind 1",
        ),
    ],
)
def test_scenes_that_do_not_fit(release, tmp_path, options, says, monkeypatch):
    image = release / "image.png"
    words = ["--random-weights", "--preset", "tiny", "--recipe", "longlive2", "--prompt", "A", "B"]
    words += ["--shots", "--device", "cpu", "--out", str(tmp_path / "a")]
    words += options.format(image=image).split()
    with pytest.raises(ValueError, match=says):
        plan(sample.parse(words))


def test_scenes_are_one_clip_a_seed(release, tmp_path, capsys):
    words = ["--random-weights", "--preset", "tiny", "--prompt", "A", "B", "C", "--shots"]
    words += ["--device", "cpu", "--frames", "33", "--seed", "1", "2", "--out", f"{tmp_path}/a"]
    job = plan(sample.parse(words))
    assert [clip.path.name for clip in job.clips] == ["a-000-1.mp4", "a-000-2.mp4"]
    assert [clip.prompts for clip in job.clips] == [["A", "B", "C"]] * 2
    assert job.clips[0].texts == ["A", "B", "C"]
    assert job.sampler["cuts"] == {}
    assert capsys.readouterr().out.startswith("2 x 33 frames")
