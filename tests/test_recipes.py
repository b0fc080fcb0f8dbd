"""Recipes: what they come to, which one a file calls for, what overrides them, what is refused."""

import json
import re
import shutil
import sys

import av
import numpy as np
import pytest
import torch
from common import GOLDEN
from PIL import Image
from release import make_release
from safetensors.torch import save_file

import sample
from wan5b.extras import recipes
from wan5b.extras.formats import load_dit, read_metadata
from wan5b.extras.plan import plan
from wan5b.extras.recipes import from_metadata, load, looks_like, recognise
from wan5b.weights import save_dit

LONGLIVE = GOLDEN / "longlive2" / "model_bf16.pt"
DIFFUSERS = GOLDEN / "formats" / "diffusers"
NAMES = ["fastwan", "longlive2", "longlive2-stage1", "turbo", "wan22"]


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    return make_release(tmp_path_factory.mktemp("recipes") / "release")


@pytest.fixture
def planned(release, tmp_path):
    """planned("--option", ...) -> what sample.py would do, with the release unless told."""
    Image.new("RGB", (64, 32)).save(tmp_path / "a.png")

    def call(*options):
        base = ["--release", release, "--prompt", "a", "--device", "cpu", "--size", "32x64"]
        base += ["--out", tmp_path / "a"]
        return plan(sample.parse([str(option) for option in (*base, *options)]))

    return call


def levels(job):
    return [round(sigma, 4) for sigma in job.sampler["sigmas"]]


# ------------------------------------------------------------------------------- what they come to

# Numbers of the makers' own code. name -> levels (first, second, ..., or how many), what else the
# sampler is given, chunks of 93 pixel frames of text and of an image.
FACTS = {
    "longlive2": (
        [0.9998, 0.9373, 0.8331, 0.6247, 0],
        {"causal": True, "solver": "unipc", "guidance": 1, "window": 32, "sink": 8},
        ([8, 8, 8], [7, 8, 8]),
    ),
    "longlive2-stage1": (
        51,
        {"causal": True, "solver": "unipc", "guidance": 3, "window": None, "sink": 0},
        ([8, 8, 8], [7, 8, 8]),
    ),
    "fastwan": (
        [1, 0.757, 0.522, 0],
        {"causal": False, "solver": "renoise", "guidance": 1},
        ([24], None),
    ),
    "turbo": (
        [1, 0.9375, 0.8333, 0.625, 0],
        {"causal": False, "solver": "renoise", "guidance": 1},
        ([24], [23]),
    ),
    "wan22": (
        51,
        {"causal": False, "solver": "unipc", "guidance": 5},
        ([24], [23]),
    ),
}
DEFAULT = {"longlive2": 509, "longlive2-stage1": 125, "fastwan": 121, "turbo": 121, "wan22": 121}


@pytest.mark.parametrize("name", NAMES)
def test_published_recipes(planned, tmp_path, name):
    expected, how, (text, image) = FACTS[name]
    job = planned("--recipe", name, "--frames", 93)
    if isinstance(expected, int):
        assert len(levels(job)) == expected
        assert levels(job)[:2] == [0.9998, 0.9957]  # 5 u / (1 + 4 u), u = .999 and .999 * .98
    else:
        assert levels(job) == expected
    assert job.sampler.items() >= how.items()
    assert job.sampler["chunks"] == text
    assert (job.frames, job.fps) == (93, 24)
    assert planned("--recipe", name).frames == DEFAULT[name]

    recipe = load(name)
    assert all((recipe.title, recipe.about, recipe.source, recipe.licence))
    given = ("--recipe", name, "--frames", 93, "--image", tmp_path / "a.png")
    if image is None:
        with pytest.raises(ValueError, match=f"{name} is for text only"):
            planned(*given)
        with pytest.raises(ValueError, match=f"{name} is for text only"):
            planned("--recipe", name, "--video", "x.mp4")
        return
    job = planned(*given)
    assert job.sampler["chunks"] == image
    assert job.sampler.get("prefix_inside", False) == name.startswith("longlive")
    if name == "wan22":
        assert len(levels(job)) == 41
    elif isinstance(expected, list):
        assert levels(job) == expected


def test_all_are_known():
    assert recipes.known() == NAMES
    assert load("longlive2").cut_prefix == "The scene transitions. "
    assert load("longlive2").cut_gap == 8
    assert load("turbo").licence.startswith("CC BY-NC-SA")


def test_a_video_goes_in_front(planned, monkeypatch):
    """Its frames are chunks of their own; only an image is inside the first chunk."""
    video = np.zeros((9, 32, 64, 3), "u1")
    monkeypatch.setattr(sys.modules["wan5b.extras.plan"], "read_video", lambda *_, **__: video)
    job = planned("--recipe", "longlive2", "--video", "x", "--frames", 105)
    assert job.sampler["chunks"] == [8, 8, 8]  # behind 3 latent frames
    assert job.sampler["prefix_inside"] is False
    assert planned("--recipe", "turbo", "--video", "x", "--frames", 105).sampler["chunks"] == [24]


# ------------------------------------------------------------------------------------- recognition


def test_what_files_say(release, tmp_path, monkeypatch):
    """And why."""
    found = recognise(str(release), str(LONGLIVE), {})
    assert found[:2] == ("longlive2", "checkpoint_format")
    assert found.recipe == load("longlive2")
    assert recognise(str(release), None, {})[:2] == ("wan22", "the release itself")
    assert recognise("x", str(release), {}) is None  # its layout does not say whose weights

    # A file in the working folder has no folder in its name.
    monkeypatch.chdir(tmp_path)
    save_file({"a": torch.zeros(1)}, "own.safetensors")
    assert recognise("x", "own.safetensors", {}) is None
    said = {"recipe": "turbo", "stage": "dmd"}  # as tools/convert.py says it
    assert recognise("x", "own.safetensors", said)[:2] == ("turbo", "its metadata")

    pipeline = tmp_path / "pipeline"
    shutil.copytree(DIFFUSERS, pipeline)
    index = json.loads((pipeline / "model_index.json").read_text())
    assert index["_class_name"] == "WanPipeline"
    for source in (pipeline, pipeline / "transformer"):
        assert recognise(str(source), None, {})[:2] == ("wan22", "model_index.json")
        assert recognise(str(release), str(source), {}).name == "wan22"
    index["_class_name"] = "WanDMDPipeline"
    (pipeline / "model_index.json").write_text(json.dumps(index))
    shards = pipeline / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    for source in (pipeline, pipeline / "transformer", shards):
        assert recognise(str(release), str(source), {})[:2] == ("fastwan", "model_index.json")
    for other in ("WanImageToVideoPipeline", None, 5, ["WanPipeline"]):
        index["_class_name"] = other
        (pipeline / "model_index.json").write_text(json.dumps(index))
        assert recognise(str(pipeline), None, {}) is None
    (pipeline / "model_index.json").write_text("[]")
    with pytest.raises(ValueError, match=r"model_index.json is truncated"):
        recognise(str(pipeline), None, {})

    bare = tmp_path / "bare.safetensors"
    save_file(load_dit(release).state_dict(), bare)
    assert recognise(str(release), str(bare), {}) is None


@pytest.mark.parametrize(
    ("form", "name"),
    [
        ("longlive_generator_merged_lora", "longlive2"),
        ("longlive_generator_merged_bf16", "longlive2"),
        ("something else", None),
        (None, None),
        (["longlive_generator_merged_lora"], None),
    ],
)
def test_what_a_trainers_file_says(tmp_path, form, name):
    path = tmp_path / "model.pt"
    held = {"generator": {"model.w": torch.ones(2)}, "step": 3}
    torch.save(held if form is None else held | {"checkpoint_format": form}, path)
    found = recognise(None, str(path), {})
    assert (found and found.name) == name


STAGES = {
    "dmd": (True, "renoise", 1),
    "sid": (True, "renoise", 1),
    "ode": (True, "renoise", 1),
    "ar": (True, "unipc", 5),
    "teacher": (False, "unipc", 5),
}


@pytest.mark.parametrize("stage", STAGES)
def test_our_own(stage):
    said = {"stage": stage, "levels": [1000, 500], "shift": 3.0, "chunk": 2, "prefix": 1}
    said |= {"window": 6, "step": 7, "training": {"negative": "bad"}}
    recipe = from_metadata(said)
    causal = stage != "teacher"
    assert (recipe.causal, recipe.solver, recipe.guidance) == STAGES[stage]
    assert (recipe.chunk, recipe.prefix, recipe.window) == ((2, 1, 6) if causal else (0, 0, 0))
    rounded = [round(sigma, 4) for sigma in recipe.sigmas(False)]
    if recipe.solver == "renoise":
        assert rounded == [1, 0.75, 0]  # 3 * .5 / (1 + 2 * .5)
    else:
        assert (len(rounded), len(recipe.sigmas(True))) == (51, 41)
        assert rounded[0] == 0.9997  # 3 * .999 / (1 + 2 * .999)
    assert recipe.negative == "bad"
    assert recognise("x", "y", said)[:2] == (stage, "its metadata")


def test_an_export_may_say_more(release, tmp_path, planned):
    """Fields of a recipe, in our own header: how LongLive's are sampled, say."""
    assert from_metadata({}) is None
    assert from_metadata({"step": 3, "training": {}, "chunk": None}) is None
    assert from_metadata({"chunk": 3.0}).chunk == 3  # as JSON may have it
    said = {"stage": "dmd", "levels": [1000, 500], "solver": "unipc", "steps": 4, "chunk": 8}
    said |= {"window": 32, "sink": 8, "image": "inside", "cut_gap": 8, "cut_prefix": "Cut. "}
    path = tmp_path / "x.safetensors"
    save_dit(load_dit(release), path, said)
    assert from_metadata(read_metadata(path)).cut_prefix == "Cut. "
    job = planned("--weights", path, "--frames", 93, "--image", tmp_path / "a.png")
    assert levels(job) == [0.9998, 0.9373, 0.8331, 0.6247, 0]
    assert (job.sampler["chunks"], job.sampler["sink"]) == ([7, 8, 8], 8)

    for wrong, says in (
        ({"sink": "8"}, "sink must be int, got '8'"),
        ({"sink": -1}, "sink must be at least 0"),
        ({"solver": "dpm"}, "solver must be one of unipc euler renoise, got 'dpm'"),
        ({"window": 2.5}, "window must be int, got 2.5"),
    ):
        save_dit(load_dit(release), path, wrong, overwrite=True)
        with pytest.raises(ValueError, match=re.escape(f"{path}: {says}")):
            planned("--weights", path)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("Wan2.2-TI2V-5B-Turbo/model.pt", "turbo"),
        ("loras/Wan22_TI2V_5B_Turbo_lora_rank_64_fp16.safetensors", "turbo"),
        ("Wan2_2_5B_FastWanFullAttn_lora_rank_128_bf16.safetensors", "fastwan"),
        ("LongLive-2.0-5B/model_bf16.pt", "longlive2"),
        ("LongLive2-5B-stage1-bf16/model.pt", "longlive2-stage1"),
        ("wan2.2_ti2v_5B_fp16.safetensors", "wan22"),
        ("Wan2_2-TI2V-5B_fp8_e4m3fn_scaled_KJ.safetensors", "wan22"),
        ("model.pt", ""),
        ("Turbo/fastwan.pt", "fastwan"),
    ],
)
def test_names_are_hints(path, name):
    assert looks_like(path) == name


# --------------------------------------------------------------------------- the command line


def test_the_file_decides_and_the_command_line_overrides(planned, capsys, tmp_path):
    """One line says what was found and how it will be sampled."""

    def line(*options):
        job = planned(*options)
        said = capsys.readouterr()
        return job, said.out.splitlines()[-1], said.err

    start = "longlive2 (checkpoint_format): chunk by chunk, 4 steps of unipc, shift 5, guidance 1"
    job, said, notes = line("--weights", LONGLIVE, "--frames", 189)
    assert said == f"{start}, chunks of 8, window 32, sink 8"
    assert not notes
    assert job.options["part"] == "generator"

    two, _, _ = line("--weights", LONGLIVE, "--steps", 2)
    assert levels(two) == [0.9998, 0.8331, 0]
    options = ("--solver", "euler", "--guidance", 3, "--chunk", 4, "--window", 12, "--sink", 2)
    job, said, _ = line("--weights", LONGLIVE, *options, "--shift", 8, "--frames", 61)
    assert said.endswith("4 steps of euler, shift 8, guidance 3, chunks of 4, window 12, sink 2")
    assert job.sampler["chunks"] == [4] * 4
    assert line("--weights", LONGLIVE, "--sink", 0)[0].sampler["sink"] == 0
    assert len(levels(planned("--image", tmp_path / "a.png", "--steps", 30))) == 31

    # A recipe overrides what the file says, a mode what the recipe says.
    job, said, notes = line("--weights", LONGLIVE, "--recipe", "turbo", "--shift", 1)
    other = "note: these weights call for longlive2 (checkpoint_format); --recipe turbo may give"
    assert notes.startswith(other)
    assert (
        said == "turbo (--recipe): the whole clip at once, 4 steps of renoise, shift 1, guidance 1"
    )
    assert levels(job) == [1, 0.75, 0.5, 0.25, 0]  # as published
    job, said, notes = line("--mode", "few")
    assert said.startswith("wan22 (the release itself, --mode few): chunk by chunk, 4 steps of ren")
    assert "no record of causal training in these weights: expect noise" in notes
    assert levels(job) == [1, 0.9375, 0.8333, 0.625, 0]
    job, said, _ = line("--weights", LONGLIVE, "--mode", "many")
    assert (len(levels(job)), job.sampler["guidance"], job.sampler["window"]) == (51, 5, 32)
    _, said, notes = line("--weights", LONGLIVE, "--mode", "bidirectional", "--chunk", 8)
    assert said.endswith(
        "--mode bidirectional): the whole clip at once, 50 steps of unipc, shift 5, guidance 5"
    )
    assert "note: --chunk has no effect here" in notes
    _, _, notes = line("--recipe", "fastwan", "--window", 8, "--sink", 1, "--steps", 3)
    assert "note: --steps, --window, --sink has no effect here" in notes


def test_what_a_clip_is_made_of_is_said(planned, tmp_path, capsys):
    """In latent frames: how many are given, and how the others come."""
    image = ("--image", tmp_path / "a.png")
    shots = ("--weights", LONGLIVE, "--prompt", "b", "--shots")
    for options, says in (
        (("--frames", 9), "1 x 9 frames, 32x64; 3 latent frames"),
        (("--frames", 9, *image), "1 x 9 frames, 32x64; 3 latent frames (1 given, 2 made)"),
        (
            ("--frames", 93, *image, *shots),
            "1 x 93 frames, 32x64; 24 latent frames (1 given, 1 chunk of 7, 2 chunks of 8); "
            "1 scene cut",
        ),
    ):
        planned(*options)
        assert capsys.readouterr().out.splitlines()[0] == says


def test_a_json_that_is_no_index(planned, release):
    with pytest.raises(ValueError, match="config.json is no index of shards; name the folder"):
        planned("--weights", release / "config.json")


def test_weights_that_say_nothing(planned, release, tmp_path, capsys):
    """Sampled as their name suggests, else as few, which is said, with the names of the recipes."""
    few = ("for --mode few", "few (the default): chunk by chunk, 4 steps of", [3, 3])
    turbo = ("by its name for turbo", "turbo (by its name alone): the whole clip at once, 4", [6])
    for name, (taken, how, chunks) in (("x", few), ("Wan2_2-TI2V-5B-Turbo_fp16", turbo)):
        path = tmp_path / "weights" / f"{name}.safetensors"
        path.parent.mkdir(exist_ok=True)
        save_file(load_dit(release).state_dict(), path)
        shutil.copy(release / "config.json", path.parent)
        job = planned("--weights", path, "--frames", 21)
        said = capsys.readouterr()
        assert said.err == (
            f"note: {path} does not say how it is sampled: taken {taken}, which may be "
            f"wrong; say it with --recipe: {', '.join(NAMES)}\n"
        )
        assert said.out.splitlines()[-1].startswith(how)
        assert job.sampler["chunks"] == chunks
        planned("--weights", path, "--recipe", "turbo")
        assert not capsys.readouterr().err


def test_a_lora_makes_another_model(planned, tmp_path, capsys):
    """By its name, which is a hint again."""
    lora = GOLDEN / "formats" / "lora" / "kijai_diff_fp16.safetensors"
    turbo = tmp_path / "Wan22_TI2V_5B_Turbo_lora_rank_64_fp16.safetensors"
    shutil.copy(lora, turbo)
    base = ("--release", GOLDEN / "formats" / "original")
    planned(*base, "--lora", turbo)
    assert f"by its name {turbo} makes these weights turbo" in capsys.readouterr().err
    planned(*base, "--lora", lora)
    planned(*base, "--lora", turbo, "--recipe", "turbo")
    assert not capsys.readouterr().err


def test_the_part_that_its_makers_sample(planned, tmp_path, release, capsys):
    """Of LongLive's trainer the generator, of others the average."""
    state = load_dit(release).state_dict()
    parts = {
        name: {f"model.{k}": v for k, v in state.items()} for name in ("generator", "generator_ema")
    }
    path = tmp_path / "model.pt"
    torch.save(parts, path)
    shutil.copy(release / "config.json", tmp_path)
    assert planned("--weights", path, "--recipe", "longlive2-stage1").options["part"] == "generator"
    assert "part" not in planned("--weights", path, "--recipe", "turbo").options
    torch.save({"ema": parts["generator"]}, path)
    assert "part" not in planned("--weights", path, "--recipe", "longlive2").options
    assert "has no part generator, which the recipe samples; it has ema" in capsys.readouterr().err
    torch.save({"generator": {"x": torch.ones(1)}, "generator_ema": parts["generator"]}, path)
    with pytest.raises(ValueError, match="model.pt .* keys that don't fit"):
        planned("--weights", path, "--recipe", "longlive2")


def test_settings_repeat_a_recipe(tmp_path, capsys):
    """Options first, then a recipe of one's own, in a file at any rate."""
    own = tmp_path / "own.toml"
    own.write_text(
        '\ufeffcausal = true\nsolver = "euler"\nlevels = [1000, 600]\nchunk = 2\nfps = 16\n'
    )
    words = ["--random-weights", "--preset", "tiny", "--device", "cpu", "--size", "32x32"]
    words += ["--prompt", "a", "--frames", "13", "--recipe", str(own), "--latents"]
    sample.main(sample.parse([*words, "--out", str(tmp_path / "a")]))
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["settings"]["recipe"] == str(own)
    assert (record["recipe"]["name"], record["recipe"]["from"]) == ("own", "--recipe")
    assert record["recipe"]["levels"] == [1000, 600]
    assert [round(sigma, 4) for sigma in record["sigmas"]] == [1, 0.8824, 0]  # 5 * .6 / 3.4
    assert record["chunks"] == [2, 2]

    sample.main(sample.parse(["--settings", str(tmp_path / "a.json"), "--out", f"{tmp_path}/b"]))
    first, second = ((tmp_path / f"{name}.safetensors").read_bytes() for name in "ab")
    assert first == second
    with av.open(str(tmp_path / "a.mp4")) as file:
        assert file.streams.video[0].average_rate == 16
    assert "will differ" not in capsys.readouterr().err

    # One that has been edited since is noted; a longer clip is none of its business.
    own.write_text(own.read_text().replace("600", "500"))
    more = ["--frames", "21", "--out", str(tmp_path / "c")]
    sample.main(sample.parse(["--settings", str(tmp_path / "a.json"), *more]))
    said = "a.json was made with other sigmas: this clip will differ"
    assert said in capsys.readouterr().err


# ------------------------------------------------------------------------------------------ errors

CAUSAL = "causal = true\nsteps = 4\nchunk = 8\n"
WRONG = [
    ("speed = 1", "unknown keys ['speed']"),
    ('steps = "4"', "steps must be int, got '4'"),
    ("steps = 4.0", "steps must be int, got 4.0"),
    ("steps = 4\ncausal = 1", "causal must be bool, got 1"),
    ("steps = true", "steps must be int, got True"),
    ("steps = -1", "steps must be at least 0 and below 1001, got -1"),
    ("steps = 2000", "steps must be at least 0 and below 1001, got 2000"),
    ("levels = 1000", "levels must be a list of float, got 1000"),
    ('levels = ["a"]', "levels must be a list of float"),
    ("levels = [500, 750]", "levels: steps must fall within 1000 >= step > 0"),
    ("levels = [1200, 750]", "levels: steps must fall within 1000 >= step > 0"),
    ("levels = [nan]", "levels: steps must fall within"),
    ("steps = 4\nshift = 0", "shift must be at least 1e-06"),
    ("steps = 4\nshift = nan", "shift must be at least 1e-06"),
    ("steps = 4\nguidance = inf", "guidance must be at least"),
    ('steps = 4\nsolver = "dpm"', "solver must be one of unipc euler renoise, got 'dpm'"),
    ('steps = 4\nimage = "behind"', "image must be one of front inside none, got 'behind'"),
    ("steps = 4\nframes = 82", "frames: 82 frames are not 4k + 1; nearest valid: 81 or 85"),
    ("steps = 4\nfps = 0", "fps must be at least 1"),
    (CAUSAL + "sink = -1", "sink must be at least 0"),
    # What does not go together.
    ('solver = "renoise"\nsteps = 4', "renoise goes down levels: give them in place of steps"),
    ('solver = "renoise"\nsteps = 4\nlevels = [1000]', "give either steps or levels"),
    ("", "give either steps or levels"),
    ('solver = "renoise"\nlevels = [1000]\nguidance = 3', "guidance must be 1 with renoise"),
    ("levels = [1000]\nimage_steps = 3", "image_steps needs steps"),
    ("steps = 4\nchunk = 8", "chunk needs causal"),
    ("steps = 4\nwindow = 8\nsink = 1\ncut_gap = 8", "cut_gap, sink, window needs causal"),
    ('steps = 4\nimage = "inside"', 'image "inside" needs chunks of 2 or more'),
    (CAUSAL.replace("8", "1") + 'image = "inside"', 'image "inside" needs chunks of 2 or more'),
    ("causal = true\nsteps = 4", "causal needs chunk"),
    (CAUSAL + 'cut_prefix = "Cut. "', "cut_prefix needs cut_gap"),
    (CAUSAL + "window = 12\nsink = 8", "window 12 has no room for sink 8 and a chunk"),
    (CAUSAL + "sink = 8", "window 0 has no room for sink 8 and a chunk"),
    ("steps = = 4", "is truncated, corrupt or not TOML"),
]


@pytest.mark.parametrize(("text", "says"), WRONG, ids=[says for _, says in WRONG])
def test_wrong_files(tmp_path, text, says):
    path = tmp_path / "own.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(says)) as error:
        load(str(path))
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_names_that_are_none(planned, tmp_path):
    for name in ("longlive", "configs", str(tmp_path)):
        with pytest.raises(
            ValueError, match=f"--recipe {name}: not one of {', '.join(NAMES)}, and"
        ):
            planned("--recipe", name)
    with pytest.raises(ValueError, match=r"--recipe .*none.toml: no such file; by name there are"):
        load(str(tmp_path / "none.toml"))
    (tmp_path / "latin.toml").write_bytes(b"title = 'caf\xe9'")
    with pytest.raises(ValueError, match=r"latin.toml is truncated, corrupt or not TOML"):
        load(str(tmp_path / "latin.toml"))


def test_frames_that_chunks_do_not_allow(planned, tmp_path):
    image = ("--image", tmp_path / "a.png")
    for given in ((), image):  # the image is the first of the 8
        says = r"--frames 81 is not chunks of 8; nearest: 61 or 93 \(81 are 21 latent frames"
        with pytest.raises(ValueError, match=says):
            planned("--weights", LONGLIVE, "--frames", 81, *given)
    with pytest.raises(ValueError, match="--window 12: no room for --sink 8 and a chunk of 8"):
        planned("--weights", LONGLIVE, "--window", 12)
    with pytest.raises(ValueError, match="a first chunk of 1 has no room behind 1 given frames"):
        planned("--weights", LONGLIVE, "--chunk", 1, *image)

    # What the recipe says of the first chunk, --chunk cannot change.
    recipe = tmp_path / "own.toml"
    recipe.write_text(CAUSAL + 'image = "inside"\nprefix = 1')
    with pytest.raises(ValueError, match="1 given frames; the recipe's prefix says its size"):
        planned("--weights", LONGLIVE, "--recipe", recipe, "--chunk", 8, "--frames", 33, *image)
