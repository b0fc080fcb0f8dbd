"""Options of sample.py that are given twice, empty, or in a record: what counts of them; and what
outputs may never replace.
"""

import json
import sys

import pytest
import torch

import sample
from wan5b.extras import cli, clips, plan

BASE = ["--random-weights", "--preset", "tiny", "--device", "cpu", "--size", "32x64"]
BASE += ["--frames", "9"]


def planned(*options):
    return plan.plan(sample.parse([*BASE, *map(str, options)]))


@pytest.fixture
def record(tmp_path):
    """A record of another run, and that run's options."""
    path = tmp_path / "old.json"
    video = ["--video", "old.mp4", "--prefix", "5"]
    options = vars(sample.parse([*BASE, *video, "--prompt", "old", "--seed", "7"]))
    path.write_text(json.dumps({"settings": options}))
    return path, options


def test_lists_that_are_given_several_times_count_as_a_whole(tmp_path):
    args = [
        "--prompt",
        "a",
        "--seed",
        1,
        "--prompt",
        "b",
        "c",
        "--seed",
        2,
        "--lora",
        "x",
        "--lora",
    ]
    parsed = sample.parse([*map(str, args), "y:0.5"])
    assert (parsed.prompt, parsed.seed, parsed.lora) == (["a", "b", "c"], [1, 2], ["x", "y:0.5"])
    job = planned("--prompt", "a", "--prompt", "b", "--out", tmp_path / "o")
    assert [clip.prompts for clip in job.clips] == [["a"], ["b"]]
    assert sample.parse([]).prompt == []  # nothing is left of the calls before


def test_a_list_replaces_a_recorded_one(record):
    path, _ = record
    args = sample.parse(["--settings", str(path), "--seed", "1", "--prompt", "a", "--seed", "2"])
    assert (args.seed, args.prompt) == ([1, 2], ["a"])
    assert sample.parse(["--settings", str(path)]).seed == [7]


def test_what_stands_in_for_recorded_options(record):
    path, options = record

    def changed(*given):
        args = vars(sample.parse(["--settings", str(path), *given]))
        return {name: value for name, value in args.items() if value != options[name]}

    source = {"settings": str(path)}
    assert changed() == source
    assert changed("--prompts", "new.txt") == source | {"prompts": "new.txt", "prompt": []}
    given = {"image": "new.png", "video": None, "prefix": None}
    assert changed("--image", "new.png") == source | given
    assert changed("--release", "r") == source | {"release": "r", "random_weights": False}
    assert changed("--shift", "3") == source | {"shift": 3.0}


@pytest.mark.parametrize("change", [{"seed": []}, {"novel": 1}], ids=str)
def test_records_of_other_versions_are_refused(record, change):
    path, options = record
    path.write_text(json.dumps({"settings": options | change}))
    with pytest.raises(
        ValueError, match="old.json is not a JSON .* wrote: .*(seed is|novel in it)"
    ):
        sample.parse(["--settings", str(path)])


# What a record of 3565b53 held, the version in front of --fp8-vae and --vae-device.
EARLIER = [
    *("release", "weights", "prompts", "image", "video", "settings", "resume", "recipe", "size"),
    *("random_weights", "shots", "recache", "sheet", "latents", "report", "overwrite"),
    *("compile", "fp8", "low_memory", "frames", "chunk", "window", "sink", "prefix", "steps"),
    *("interpolate", "shift", "guidance", "state_every", "at", "sink_rope", "seed", "prompt"),
    *("negative", "lora", "out", "preset", "mode", "solver", "device", "dtype"),
]


def test_records_of_earlier_versions_are_repeated(record):
    """What they lack had no part in their clips. An option that is new here fails this test: does a
    record without it still make the same clip? Then it belongs into ADDED.
    """
    path, options = record
    path.write_text(json.dumps({"settings": {name: options[name] for name in EARLIER}}))
    args = vars(sample.parse(["--settings", str(path)]))
    assert args == options | {"settings": str(path)}
    assert {name: args[name] for name in options.keys() - EARLIER} == clips.ADDED
    given = vars(sample.parse(["--settings", str(path), "--vae-device", "cpu"]))
    assert given == args | {"vae_device": "cpu"}


def test_what_other_versions_did_otherwise_is_named(record):
    """Before --at and --sink-rope noise was another; of what is new nothing is known."""
    path, options = record
    earlier = {name: options[name] for name in EARLIER if name not in ("at", "sink_rope")}

    def line(settings):
        path.write_text(json.dumps({"settings": settings}))
        with pytest.raises(ValueError, match="old.json") as refused:
            sample.parse(["--settings", str(path)])
        return str(refused.value).partition("wrote: ")[2]

    way_out = "take the version that wrote it, or give options in place of --settings"
    assert line(earlier) == f"it lacks at, sink_rope; {way_out}"
    later = options | {"novel": 1, "again": 2}
    assert line(later) == f"again, novel in it is no option here; {way_out}"
    assert line(earlier | {"novel": 1}).startswith(
        "it lacks at, sink_rope; novel in it is no option"
    )


@pytest.mark.parametrize(
    "name", ["release", "weights", "prompts", "image", "video", "size", "settings", "out"]
)
def test_empty_names_are_refused(name):
    """A script's unset variable is no wish for a clip without the image."""
    with pytest.raises(ValueError, match=f"--{name} is empty"):
        planned("--prompt", "x", f"--{name}", "")


def test_a_shift_that_is_as_good_as_none():
    with pytest.raises(ValueError, match="--shift 1e-300: must be at least 1e-6"):
        planned("--prompt", "x", "--shift", "1e-300")


@pytest.mark.parametrize("out", [".", "a/..", "a/."])
def test_folders_by_their_dots(tmp_path, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    (job,) = planned("--prompt", "x", "--out", out).clips
    assert str(job.path) in ("sample.mp4", "a/../sample.mp4", "a/sample.mp4")


def test_what_is_read_is_never_replaced(tmp_path):
    """--overwrite is meant for what earlier runs wrote."""
    (tmp_path / "a.json").write_text("a prompt")
    (tmp_path / "link.mp4").symlink_to(tmp_path / "a.json")
    given = ["--prompts", tmp_path / "a.json", "--overwrite"]
    for out in ("a", "link"):
        with pytest.raises(ValueError, match=f"{out}.(json|mp4) is what this run reads"):
            planned(*given, "--out", tmp_path / out)
    assert planned(*given, "--out", tmp_path / "b").clips[0].prompts == ["a prompt"]


def too_large():
    torch.empty(2**60, dtype=torch.uint8)


def out_of_gpu():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to\nmore")


def out_of_host():
    raise MemoryError


@pytest.mark.parametrize("fail", [too_large, out_of_gpu, out_of_host])
def test_too_little_memory_is_one_line(monkeypatch, capsys, fail):
    monkeypatch.setattr(sys, "argv", ["sample.py"])
    monkeypatch.setattr(cli.signals, "while_running", lambda: None)
    with pytest.raises(SystemExit) as ended:
        cli.script(fail)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("sample.py: error: out of memory; take a smaller size")
    with pytest.raises(RuntimeError, match="a fault of the program"):
        cli.script(lambda: (_ for _ in ()).throw(RuntimeError("a fault of the program")))


@pytest.mark.parametrize("out", ["file/a", "/dev/null/a", "n" * 230, "ü" * 120])
def test_what_cannot_be_written_is_refused_before_anything_is_made(tmp_path, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"(cannot make the folder|bytes too long).*another --out"):
        planned("--prompt", "a", "--out", out)
    planned("--prompt", "a", "--out", "n" * 120)


def test_a_home_that_is_none_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (clip,) = planned("--prompt", "a", "--out", "~nobody-here/a").clips
    assert str(clip.path) == "~nobody-here/a.mp4"
