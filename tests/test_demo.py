"""The demo from end to end in a few steps a stage: its parts fit, sample.py takes what it made."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import demo

ROOT = Path(__file__).parent.parent


def test_what_is_left_of_a_demo_is_not_trained_on(tmp_path):
    for name in ("release", "latents"):
        (tmp_path / name / name).mkdir(parents=True)
        with pytest.raises(ValueError, match=f"{name} exists; delete it or choose another --out"):
            demo.demo(tmp_path / name, 96, 0, 1, 1)


@pytest.mark.parametrize("clips", [0, 2, 100])
def test_clips_are_made_a_shard_at_a_time(clips, tmp_path):
    """Fewer would be made than asked for, or none, and the first stage found no data."""
    with pytest.raises(ValueError, match=f"--clips {clips}: they are made 96 at a time"):
        demo.demo(tmp_path / "out", clips, 0, 1, 1)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_demo_and_sampling_from_its_export(tmp_path):
    out = tmp_path / "demo"
    demo = ROOT / "examples" / "tiny" / "demo.py"
    command = [
        sys.executable,
        demo,
        "--out",
        out,
        "--steps",
        "4",
        "--clips",
        "96",
        "--longest",
        "3",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads((out / "report.json").read_text())
    rows = report["rows"]
    causal = ("ar", "ode", "dmd-data", "dmd")
    assert list(rows) == ["teacher x1", *(f"{name} x{n}" for name in causal for n in (1, 3))]
    assert all(0 <= row["colour"] <= 1 for row in rows.values())
    assert all(len(line["drift"]) == 9 for line in report["curves"].values())
    assert 0.15 < report["another"] < 0.3
    assert (out / "sheet.png").exists()
    assert (out / "drift.png").exists()
    assert (out / "dmd" / "curves.png").exists()

    clip = tmp_path / "clip.mp4"
    options = ["--release", out / "release", "--weights", out / "dmd" / "dmd.safetensors"]
    options += ["--prompt", "a red ring moves left", "--size", "64x64", "--frames", "105"]
    options += ["--sheet", "--out", clip]
    sample = [sys.executable, ROOT / "sample.py", *options]
    done = subprocess.run(sample, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(clip.with_suffix(".json").read_text())["frames_written"] == 105

    again = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert again.returncode != 0
    assert "exists" in again.stderr
