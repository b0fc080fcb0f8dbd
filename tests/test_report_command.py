"""tools/report.py: what it reads, writes, prints and refuses."""

import json
import runpy
import shutil
import sys
import tracemalloc
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from health import as_pictures, journey, still
from odd_files import write_video
from PIL import Image

from wan5b.extras import measures, report, report_plot
from wan5b.extras.videos import Shown

TOOL = Path(__file__).parent.parent / "tools" / "report.py"


@pytest.fixture(scope="module")
def two_clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    write_video(folder / "moves.mp4", as_pictures(journey(90)))
    write_video(folder / "rests.mkv", as_pictures(still(30)))
    return folder


@pytest.fixture
def command(monkeypatch, capsys, tmp_path, two_clips):
    """Run the tool in a folder of two clips -> exit code, lines of stdout, lines of stderr."""
    monkeypatch.chdir(shutil.copytree(two_clips, tmp_path, dirs_exist_ok=True))

    def run(*arguments):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["report.py", *map(str, arguments)])
            with pytest.raises(SystemExit) as stopped:
                runpy.run_path(str(TOOL), run_name="__main__")
        printed = capsys.readouterr()
        return stopped.value.code or 0, printed.out.splitlines(), printed.err.splitlines()

    return run


def files():
    return sorted(str(path) for path in Path().rglob("*") if path.is_file())


CLIPS = ["moves.mp4", "rests.mkv"]


def test_one_video(command):
    pytest.importorskip("matplotlib")
    code, lines, errors = command("moves.mp4", "--chunk", 3)
    assert (code, len(lines), errors) == (0, 1, [])
    assert lines[0].startswith("moves.mp4: luma ")
    assert files() == ["moves.mp4", "moves.report.json", "moves.report.png", "rests.mkv"]
    found = json.loads(Path("moves.report.json").read_text())
    assert found == report.report("moves.mp4", 3)
    assert found["chunk_from"] == "given"
    with Image.open("moves.report.png") as plot:
        assert plot.size == (1320, 960)
        assert len(plot.convert("RGB").getcolors(10**6)) > 50


def test_several_videos(command):
    """A line each, then a table; in another folder, which is made."""
    code, lines, errors = command(*CLIPS, "--out", "made/here", "--no-plot")
    assert (code, errors) == (0, [])
    assert [line.split(":")[0] for line in lines[:2]] == CLIPS
    assert lines[3].split() == ["frames", *report.SHOWN, "moves", "pulse", "cuts", "returns"]
    assert [line.split()[:2] for line in lines[4:]] == [["moves.mp4", "90"], ["rests.mkv", "30"]]
    assert "STATIC" in lines[1]
    assert "STATIC" in lines[5]
    assert files() == ["made/here/moves.report.json", "made/here/rests.report.json", *CLIPS]


def test_nothing_is_overwritten(command, monkeypatch):
    """What is in the way is found before any video is read."""
    monkeypatch.setattr(report, "measure", None)
    for name in ("rests.report.json", "rests.report.png"):
        Path(name).write_text("mine")
        code, lines, errors = command(*CLIPS)
        assert (code, lines) == (2, [])
        assert errors == [f"report.py: error: {name} exists; choose another --out, or --overwrite"]
        assert files() == sorted([*CLIPS, name])
        Path(name).unlink()

    with pytest.raises(ValueError, match="moves.mp4 exists"):
        report.write("moves.mp4", {})
    with pytest.raises(ValueError, match="moves.mp4 exists"):
        report_plot.write("moves.mp4", {})


def test_overwrite(command):
    Path("rests.report.json").write_text("old")
    assert command("rests.mkv", "--overwrite", "--no-plot")[0] == 0
    assert json.loads(Path("rests.report.json").read_text())["frames"] == 30


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["none.mp4"], "cannot read the video none.mp4: there is no such file here"),
        (
            ["text.mp4"],
            "cannot read the video text.mp4: it is damaged, or of no format that is read here: "
            "videos are mp4, mov, webm, ..., images jpg, png, ...",
        ),
        (["half.mp4"], "cannot read the video half.mp4: it is "),
        (["moves.mp4", "--chunk", 0], "--chunk 0: must be 1 or more"),
        ([*CLIPS, "--out", "one.json"], "--out one.json is one file, for 2 videos; name a folder"),
        (["moves.mp4", "sub/moves.mp4", "--out", "."], "two videos would have the report"),
        (["moves.mp4", "--out", "moves.json"], "moves.json is the name of the clip's settings"),
    ],
)
def test_one_line_for_what_is_wrong(command, arguments, says):
    Path("text.mp4").write_text("no video")
    content = Path("moves.mp4").read_bytes()
    Path("half.mp4").write_bytes(content[: len(content) // 2])
    before = files()
    code, lines, errors = command(*arguments)
    assert (code, lines, len(errors)) == (2, [], 1)
    assert says in errors[0]
    assert files() == before


def test_without_matplotlib(command, monkeypatch):
    monkeypatch.setattr(report_plot, "find_spec", lambda name: None)
    code, lines, errors = command("moves.mp4")
    assert (code, errors) == (0, [])
    assert lines[0] == "no plot: matplotlib is not installed (pip install -e '.[plot]')"
    assert lines[1].startswith("moves.mp4: ")
    assert files() == ["moves.mp4", "moves.report.json", "rests.mkv"]


def test_a_name_that_terminals_would_obey(command):
    Path("rests.mkv").rename("a\x1b[31m$b$.mkv")
    code, lines, _ = command("a\x1b[31m$b$.mkv")
    assert code == 0
    assert lines[0].startswith("a\\x1b[31m$b$.mkv: ")


@pytest.mark.parametrize("name", ["", "/", "nothing.y4m"])
def test_what_is_no_video_is_named(command, name):
    Path("nothing.y4m").write_bytes(b"YUV4MPEG2 W16 H16 F24:1\nFRAME\n")
    code, lines, errors = command("--", name)
    assert (code, lines, len(errors)) == (2, [], 1)
    assert name in errors[0]
    assert "PosixPath" not in errors[0]


# ------------------------------------------------------------------------------------------- chunks


@pytest.mark.parametrize(
    ("record", "chunk"),
    [
        ({"chunks": [3, 3, 3]}, 3),
        ({"chunks": [1, 8, 8, 8]}, 8),
        ({"chunks": [2, 3, 3]}, 3),
        ({"chunks": [21]}, None),
        ({"chunks": [3, "3"]}, None),
        ({"fps": 24}, None),
    ],
)
def test_the_chunk_is_what_sample_wrote(command, record, chunk):
    Path("moves.json").write_text(json.dumps(record))
    notes = []
    assert report.recorded_chunk(Path("moves.mp4"), notes) == (
        chunk,
        "moves.json" if chunk else None,
    )
    assert notes == []


def test_a_chunk_that_is_given_comes_before_the_recorded_one(command):
    Path("rests.json").write_text(json.dumps({"chunks": [3, 3, 3]}))
    found = report.report("rests.mkv")
    assert (found["chunk"], found["chunk_from"]) == (3, "rests.json")
    assert found["pulse"]["known"]
    found = report.report("rests.mkv", 5)
    assert (found["chunk"], found["chunk_from"]) == (5, "given")
    Path("rests.json").unlink()
    found = report.report("rests.mkv")
    assert (found["chunk"], found["chunk_from"]) == (None, None)
    assert not found["pulse"]["known"]


def test_a_record_that_cannot_be_read_is_noted(command):
    Path("moves.json").write_text("[1, 2")
    code, lines, errors = command("moves.mp4", "--no-plot")
    assert (code, len(lines), len(errors)) == (0, 1, 1)
    assert errors[0].startswith("note: no chunks: moves.json is truncated")


# ------------------------------------------------------------------------------------------- memory


def test_memory_does_not_grow_with_the_length():
    """But for ten numbers a frame. Of the 160 more frames not even a tenth is held."""
    clip = as_pictures(journey(40))
    peaks = []
    for frames in (80, 240):
        source = (Shown(Fraction(i, 24), Fraction(i + 1, 24), clip[i % 40]) for i in range(frames))
        tracemalloc.start()
        series = measures.measure(source, 12)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(series.luma) == frames
    assert peaks[1] < peaks[0] + 16 * clip[0].nbytes
    assert np.isfinite(series.luma).all()
