"""Prompts that change in mid-clip: --at, --interpolate, --recache, and what they come to."""

import pytest
import torch

import sample
from wan5b.extras import plan
from wan5b.extras.chunking import blended, spread, switches
from wan5b.extras.clips import Clip, contexts, rows_of

BASE = ["--random-weights", "--preset", "tiny", "--device", "cpu", "--size", "32x64"]


def planned(tmp_path, *options):
    given = [*BASE, "--out", tmp_path / "a", *options]
    return plan.plan(sample.parse([str(option) for option in given]))


# Chunks of 3 latent frames begin with pictures 0, 9, 21, 33 ...; at 24 a second.
@pytest.mark.parametrize(
    ("seconds", "prefix", "chunks", "begins"),
    [
        ([], 0, [3] * 5, [0]),
        ([0.3], 0, [3] * 5, [0, 1]),
        ([9 / 24], 0, [3] * 5, [0, 1]),
        ([9.1 / 24], 0, [3] * 5, [0, 2]),
        ([0.3, 1.1], 0, [3] * 5, [0, 1, 3]),
        ([0.3], 1, [3] * 5, [0, 1]),  # behind an image they begin with pictures 1, 13, 25 ...
        ([0.6], 1, [3] * 5, [0, 2]),
        ([0.0001], 0, [1] * 5, [0, 1]),
    ],
)
def test_prompts_change_with_the_chunk_that_begins_then_or_later(seconds, prefix, chunks, begins):
    assert switches(seconds, prefix, chunks, 24) == begins


@pytest.mark.parametrize(
    ("seconds", "wrong"),
    [
        (
            [0.3, 0.31],
            r"--at 0.31: no chunk is left for the prompt before it; the next",
        ),
        ([0.5, 0.3], r"--at 0.3: no chunk is left"),
        ([1.8, 0.3], r"--at 0.3: no .*, which begins with the last one; let the times rise, or"),
        ([0], r"--at 0: no chunk is left .* begin at 0.38, 0.88, 1.38 seconds"),
        ([9], r"--at 9: the last chunk begins at 1.88 seconds; give an earlier time, or more"),
    ],
)
def test_times_that_do_not_fit(seconds, wrong):
    with pytest.raises(ValueError, match=wrong):
        switches(seconds, 0, [3] * 5, 24)


def test_a_change_may_take_several_chunks():
    assert spread(["a", "b"], [0, 2], 5) == ["a", "a", "b", "b", "b"]
    assert blended(["a", "a", "b", "b", "b"], 1) == {}
    assert blended(["a", "a", "b", "b", "b"], 2) == {2: ("a", 1 / 2)}
    assert blended(["a", "a", "b", "b", "b"], 3) == {2: ("a", 1 / 3), 3: ("a", 2 / 3)}
    assert blended(["a", "b"], 9) == {1: ("a", 1 / 9)}
    # One that is changed again meanwhile ends there.
    assert blended(["a", "b", "a", "b"], 9) == {i: ("ab"[i - 1 & 1], 1 / 9) for i in (1, 2, 3)}


def test_contexts_of_one_text_are_one_tensor():
    rows = rows_of(["a", "b", ""], torch.tensor([[1.0], [3.0], [9.0]]), 1)
    clip = Clip(["a", "b"], 0, None, ["a", "b", "b", "a"], {1: ("a", 0.25)})
    first, mixed, second, again = contexts(clip, rows)
    assert first is again
    assert (float(first), float(mixed), float(second)) == (1, 1.5, 3)
    assert second is rows["b"]
    guided = rows_of(["a", "b", ""], torch.tensor([[1.0], [3.0], [9.0]]), 5)
    assert guided["b"].tolist() == [[3], [9]]


def test_the_command_line(tmp_path):
    options = ["--frames", 57, "--prompt", "a", "b", "--at", 0.6, "--interpolate", 2, "--recache"]
    job = planned(tmp_path, *options)
    (clip,) = job.clips
    assert clip.prompts == ["a", "b"]
    assert clip.texts == ["a", "a", "b", "b", "b"]
    assert clip.blends == {2: ("a", 0.5)}
    assert job.sampler["recache"] is True
    assert len(planned(tmp_path, "--frames", 57, "--prompt", "a", "b", "--shots").clips) == 1


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        ("--prompt a b --at 1 2", "2 prompts, of which the first begins, and 2 times; give one"),
        ("--prompt a b --at 1 --shots", "--shots are of equal lengths: leave --at out"),
        ("--prompt a b --at -1", "--at .*: must be seconds, 0 or more"),
        ("--prompt a b --at nan", "--at .*: must be seconds, 0 or more"),
        ("--prompt a b --at 1 --interpolate 0", "--interpolate 0: must be above 0"),
        ("--prompt a b --at 1 --mode bidirectional", "--at needs chunks"),
        (
            "--prompt a b --shots --recache --recipe longlive2 --frames 253",
            "scene cuts need neither",
        ),
        (
            "--prompt a b --shots --sink-rope relative --recipe longlive2 --frames 253",
            "a sink that follows the window .* has no scene cuts",
        ),
    ],
)
def test_what_contradicts_itself(tmp_path, options, wrong):
    with pytest.raises(ValueError, match=wrong):
        planned(tmp_path, "--frames", 57, *options.split())


def test_a_prompt_that_the_clip_never_reaches_is_named(tmp_path, capsys):
    options = ["--frames", 57, "--prompt", "a", "b", "--at", "1.3"]  # the last two of five chunks
    planned(tmp_path, *options, "--interpolate", 2)
    assert "note" not in capsys.readouterr().err
    planned(tmp_path, *options, "--interpolate", 4)
    says = "note: --interpolate 4: the clip ends 50% of the way there"
    assert says in capsys.readouterr().err


def test_what_does_nothing_is_named(tmp_path, capsys):
    planned(tmp_path, "--frames", 57, "--prompt", "a", "--recache", "--interpolate", 3)
    assert "note: --interpolate, --recache has no effect here" in capsys.readouterr().err
    planned(tmp_path, "--prompt", "a", "--mode", "bidirectional", "--sink-rope", "relative")
    assert "--sink-rope" in capsys.readouterr().err
