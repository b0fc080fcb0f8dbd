"""Random numbers by keys, atomic writes, errors in one line."""

import json
import os
import platform
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from wan5b import util
from wan5b.util import nearest, replacing, rng, write_json, write_tensors

# ------------------------------------------------------------------------------------------- chance


def test_rng_is_a_function_of_its_keys():
    def draw(*keys):
        return torch.randn(4, generator=rng("cpu", *keys)).tolist()

    # On any machine.
    known = [1.2326147556304932, -0.48139655590057373, 0.4628756046295166, 1.065154790878296]
    assert draw(0, 12, 3, "noise") == pytest.approx(known)

    # In any process.
    code = "import torch; from wan5b.util import rng; g = rng('cpu', 0, 12, 3, 'noise')\n"
    code += "print(torch.randn(4, generator=g).tolist())"
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert json.loads(run.stdout) == draw(0, 12, 3, "noise")

    keys = [
        (0, 12, 3, "noise"),
        (0, 12, 3, "level"),
        (0, 12, 4, "noise"),
        (0, 13, 3, "noise"),
        (1, 12, 3, "noise"),
        (0, 123, "noise"),
    ]
    assert len({tuple(draw(*others)) for others in keys}) == 6
    with pytest.raises(AssertionError):
        rng("cpu", 0, 1.5)


# -------------------------------------------------------------------------------------------- files


def test_replacing_makes_the_folder_and_the_whole_file(tmp_path):
    path = tmp_path / "new" / "folder" / "a.txt"
    for text in ("first", "second"):
        with replacing(path) as partial:
            assert partial.parent == path.parent
            assert partial.suffix == ".partial"
            partial.write_text(text)
        assert path.read_text() == text
        assert list(path.parent.iterdir()) == [path]


def test_what_others_write_stays_and_what_killed_ones_left_goes(tmp_path):
    path = tmp_path / "a.txt"
    left = subprocess.run(
        [sys.executable, "-c", LEAVE, str(path)], check=True, capture_output=True, text=True
    )
    left = tmp_path / left.stdout
    assert left.read_text() == "half"
    alive = tmp_path / f"a.txt.{platform.node()}-{os.getppid()}.partial"
    other_host = tmp_path / "a.txt.nowhere-1.partial"
    other_file = tmp_path / left.name.replace("a.txt", "a.txt.more")
    for file in (alive, other_host, other_file):
        file.touch()
    with replacing(path) as partial:
        assert partial not in (left, alive, other_host)
        partial.write_text("whole")
    assert set(tmp_path.iterdir()) == {path, alive, other_host, other_file}


LEAVE = """
import os, sys
from wan5b.util import replacing
with replacing(sys.argv[1]) as partial:
    partial.write_text("half")
    print(partial.name, end="", flush=True)
    os._exit(0)
"""


def test_safetensors_own_file_goes_too(tmp_path):
    """A kill while it is filled, under a name by chance, does not leave it for good."""
    path = tmp_path / "a.safetensors"
    code = KILLED_IN_SAFETENSORS
    killed = subprocess.run(
        [sys.executable, "-c", code, str(path)], cwd=Path(__file__).parent.parent
    )
    assert killed.returncode == -signal.SIGKILL
    assert [file for file in tmp_path.rglob("*") if file.name.startswith(".tmp")]
    write_tensors(path, {"x": torch.zeros(2)})
    assert [*tmp_path.iterdir()] == [path]


KILLED_IN_SAFETENSORS = """
import os, signal, sys, threading, torch
from pathlib import Path
from wan5b.util import write_tensors

def watch():
    while not any(file.name.startswith(".tmp") for file in Path(sys.argv[1]).parent.rglob("*")):
        pass
    os.kill(os.getpid(), signal.SIGKILL)

threading.Thread(target=watch).start()
write_tensors(sys.argv[1], {"x": torch.zeros(2**27)})
"""


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_what_was_there(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fail():
        with replacing(path) as partial:
            partial.write_text("half")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_renamed_is_on_the_disk(tmp_path, monkeypatch):
    """The content before the rename, the folder's names after it."""
    path = tmp_path / "a.txt"
    seen = []
    monkeypatch.setattr(util, "sync", lambda synced: seen.append((synced, path.exists())))
    with replacing(path) as partial:
        partial.touch()
    assert seen == [(partial, False), (tmp_path, True)]


def test_write_tensors(tmp_path):
    path = tmp_path / "new" / "a.safetensors"
    x = torch.arange(6.0).view(2, 3)
    write_tensors(path, {"x": x, "transposed": x.t()}, {"key": "value"})
    assert path.stat().st_mode & 0o777 == 0o644
    with safe_open(path, "pt") as f:
        assert f.metadata() == {"key": "value"}
        assert f.get_tensor("x").equal(x)
        assert f.get_tensor("transposed").equal(x.t())


def test_write_json(tmp_path):
    """Readable as it stands; what UTF-8 can't hold, as of a command line in latin1, comes back."""
    value = {"prompt": "红色 caf\udce9", "sizes": [1, 2]}
    write_json(tmp_path / "a.json", value)
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert "红色" in text
    assert text.endswith("}\n")
    assert json.loads(text) == value


# ------------------------------------------------------------------------------------------- errors


def test_nearest():
    assert [nearest(n, 4, 1) for n in (-3, 0, 1, 4, 82)] == ["1 or 5"] * 4 + ["81 or 85"]
    assert nearest(70, 32, 32) == "64 or 96"


@pytest.mark.parametrize(
    ("body", "code", "says"),
    [
        ("return None", 0, ""),
        ("raise ValueError('5 frames')", 2, "a.py: error: 5 frames\n"),
        ("raise FileNotFoundError('x')", 2, "a.py: error: x\n"),
        ("raise KeyboardInterrupt", 130, ""),
        ("raise InterruptedError", 143, ""),
    ],
)
def test_script(tmp_path, body, code, says):
    (tmp_path / "a.py").write_text(
        f"from wan5b.extras.cli import script\n\ndef main():\n    {body}\n\nscript(main)\n"
    )
    run = subprocess.run([sys.executable, tmp_path / "a.py"], capture_output=True, text=True)
    assert run.returncode == code
    assert run.stderr == says
