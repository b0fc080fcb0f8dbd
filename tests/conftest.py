"""Fixtures: of the tests of training, and a release to change."""

import dataclasses
import json
import runpy
import shutil
import signal
import sys

import pytest
import torch
from release import make_release
from training import DIT, ROOT, config, finish, make_data

from wan5b import fsdp
from wan5b.extras import budget, log


@pytest.fixture
def quick_and_clean(monkeypatch):
    """A World takes SIGTERM for itself; the speed of this machine does not matter here."""
    monkeypatch.setattr(budget, "matmul_rate", lambda device, dtype: 1.0)
    monkeypatch.setattr(log, "curves", lambda folders: None)  # half a second each
    handler = signal.getsignal(signal.SIGTERM)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the networks are tiny
    yield
    torch.set_num_threads(threads)
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture(scope="session")
def pristine(tmp_path_factory):
    """A tiny release, for all to read."""
    return make_release(tmp_path_factory.mktemp("pristine") / "release")


@pytest.fixture
def release(pristine, tmp_path):
    """A copy of it, for one test to change."""
    return shutil.copytree(pristine, tmp_path / "release")


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A folder of data and weights, for all to read: see make_data."""
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """Run folders of dmd, with an average, and of a teacher, without.

    The last checkpoints name the networks' sizes.
    """
    folder = tmp_path_factory.mktemp("trained")
    for stage, ema in (("dmd", 0.5), ("teacher", 0.0)):
        finish(config(data, stage, folder / stage, steps=2, ema=ema))
        sizes = json.dumps(dataclasses.asdict(DIT))
        (folder / stage / "step-0000002/config.json").write_text(sizes)
    return folder


@pytest.fixture
def command(monkeypatch, capsys):
    """Run `python train.py ...` in this process -> its exit code and the lines of stderr.

    No network is built.
    """

    def forbidden(*_):
        raise AssertionError("a network is built")

    def run(*arguments):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
            patch.setattr(fsdp.World, "shard", forbidden)
            with pytest.raises(SystemExit) as stopped:
                runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
        return stopped.value.code, capsys.readouterr().err.splitlines()

    return run
