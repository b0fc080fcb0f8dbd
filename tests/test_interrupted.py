"""Ctrl-C and SIGTERM in the midst of loading and writing: they end a script as themselves, and no
file is called broken for them.
"""

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from common import GOLDEN
from test_untrusted import checkpoint
from training import ENVIRONMENT

import prepare
from wan5b import data, t5, util, weights
from wan5b.extras import checkpoints, log, pictures, scaled, signals, stills

FORMATS = GOLDEN / "formats"


@pytest.fixture(autouse=True)
def _handlers(monkeypatch):
    """Those of a script."""
    monkeypatch.setattr(util, "INTERRUPTED", [])
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)
    before = {number: signal.getsignal(number) for number in numbers}
    signals.while_running()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_at_any_time_while_a_file_is_opened():
    """A real signal, by a timer. torch.asarray, which safetensors calls, forgets it: a fourth of
    these tries once ended with a corrupt file.
    """
    signal.signal(signal.SIGALRM, signal.getsignal(signal.SIGTERM))
    file = FORMATS / "comfy/wan2.2_ti2v_5B_fp16.safetensors"
    began = time.perf_counter()
    weights.open_tensors(file)
    seconds = time.perf_counter() - began
    chance = random.Random(0)
    ended = 0
    for _ in range(200):
        util.INTERRUPTED.clear()
        try:
            signal.setitimer(signal.ITIMER_REAL, chance.uniform(1e-5, seconds))
            weights.open_tensors(file)
            signal.setitimer(signal.ITIMER_REAL, 0)
        except SystemExit:
            ended += 1

    assert ended > 20


# ----------------------------------------------------------------------------- where all is caught


class Forgets:
    """Stands for a library: it is interrupted, forgets that, and takes it for another error."""

    def __init__(self, error: Exception):
        self.error = error

    def __call__(self, *_, **__):
        with contextlib.suppress(SystemExit):
            signal.raise_signal(signal.SIGTERM)
        raise self.error


def place_of_weights(patch, tmp_path):
    patch.setattr(weights, "safe_open", Forgets(ValueError("of no shape: UntypedStorage")))
    weights.open_tensors(FORMATS / "comfy/wan2.2_ti2v_5B_fp16.safetensors")


def place_of_pickles(patch, tmp_path):
    patch.setattr(torch, "load", Forgets(RuntimeError("of no location: UntypedStorage")))
    weights.open_tensors(FORMATS / "original/Wan2.2_VAE.pth")


def place_of_stores(patch, tmp_path):
    patch.setattr(data, "safe_open", Forgets(ValueError("of no shape: UntypedStorage")))
    data.open_shard(tmp_path / "x.safetensors")


def place_of_the_tokenizer(patch, tmp_path):
    patch.setattr(t5.sentencepiece, "SentencePieceProcessor", Forgets(RuntimeError("internal")))
    t5.Tokenizer(b"x")


def place_of_scaled_files(patch, tmp_path):
    patch.setattr(scaled.json, "loads", Forgets(ValueError("Expecting value")))
    scaled._check_formats(tmp_path / "x", {}, {})


def place_of_checkpoints(patch, tmp_path):
    _, path = checkpoint(tmp_path, 1)
    signals.while_running()  # training has taken SIGTERM for itself
    patch.setattr(checkpoints.Reader, "read_metadata", Forgets(EOFError("ran out of input")))
    checkpoints.check_checkpoint(path)


def place_of_pictures(patch, tmp_path):
    (tmp_path / "x.png").touch()
    patch.setattr(pictures, "read_still", Forgets(OSError("broken data stream")))
    pictures.read_image(tmp_path / "x.png")


def place_of_exif(patch, tmp_path):
    """Where a note is printed, and all goes on."""
    patch.setattr(stills.Image, "Exif", Forgets(SyntaxError("not a TIFF file")))
    stills.Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "x.png")
    stills.read_still(tmp_path / "x.png")


def place_of_curves(patch, tmp_path):
    patch.setattr(log, "draw", Forgets(ImportError("of another ABI")))
    log.curves([tmp_path])


def place_of_videos_to_skip(patch, tmp_path):
    """A damaged one is left out, and all goes on."""
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos/x.mp4").touch()
    (tmp_path / "videos/x.txt").write_text("a caption")
    patch.setattr(prepare, "read_clips", Forgets(ValueError("of no shape: UntypedStorage")))
    given = ["--release", str(FORMATS / "original"), "--videos", str(tmp_path / "videos")]
    prepare.main(["latents", *given, "--out", str(tmp_path / "out"), "--size", "32x32"])


def place_of_what_is_written(patch, tmp_path):
    with util.replacing(tmp_path / "x"):
        Forgets(RuntimeError("unexpected pos 704 vs 598"))()


PLACES = {name: value for name, value in globals().items() if name.startswith("place_of")}


@pytest.mark.parametrize("place", PLACES)
def test_no_file_is_broken_by_it(tmp_path, monkeypatch, place):
    with pytest.raises(SystemExit) as ended:
        PLACES[place](monkeypatch, tmp_path)
    assert ended.value.code == 143


def test_what_is_broken_without_it_is_told(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match="truncated, corrupt or no safetensors file"):
        weights.open_tensors(tmp_path / "x.safetensors")


def test_not_where_locks_are_taken():
    """They would stay locked, and other threads wait for them without an end."""
    left = []
    condition = threading.Condition()
    interrupted = partial(signal.raise_signal, signal.SIGTERM)
    condition._lock = SimpleNamespace(__enter__=interrupted, __exit__=lambda *_: left.append(True))
    with pytest.raises(SystemExit) as ended, condition:
        time.sleep(5)
    assert ended.value.code == 143
    assert left


# ----------------------------------------------------------------------------------------- scripts

SCRIPT = """
import os, signal, sys, time
from wan5b.extras.cli import script

def interrupt():
    try:
        signal.raise_signal({number})
    except BaseException:
        pass

class Dropped:
    def __del__(self):
        signal.raise_signal({number})

def main():
{body}

script(main)
"""
ENDINGS = {
    "forgotten": ("    interrupt()\n    raise ValueError('of no shape')", None, ""),
    "a fault": ("    interrupt()\n    raise RuntimeError('unexpected')", None, ""),
    # What could not be written on the way out is told.
    "a full disk": (
        "    interrupt()\n    raise OSError('cannot write x: the disk is full')",
        2,
        "a.py: error: cannot write x: the disk is full\n",
    ),
    # Python only prints what is raised there, and goes on.
    "clean-up": ("    Dropped()\n    time.sleep(20)", None, ""),
}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("ending", ENDINGS)
def test_a_script_ends_as_by_the_signal(tmp_path, ending, number):
    body, code, said = ENDINGS[ending]
    (tmp_path / "a.py").write_text(SCRIPT.format(number=int(number), body=body))
    command = [sys.executable, tmp_path / "a.py"]
    how = {"capture_output": True, "text": True, "env": os.environ | ENVIRONMENT}
    ended = subprocess.run(command, timeout=15, **how)
    assert (ended.returncode, ended.stderr) == (code or 128 + number, said)
