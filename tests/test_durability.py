"""What a kill, a full disk or a second process can do to what a run writes: nothing that was there
is lost.
"""

import errno
import json
import os
import platform
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from wan5b import fsdp, util
from wan5b.extras import checkpoints, log
from wan5b.extras.digest import NOTHING, digest
from wan5b.optim import AdamW

ROOT = Path(__file__).parent.parent


def optimizer() -> AdamW:
    torch.manual_seed(0)
    return AdamW(nn.Linear(4, 4), fsdp.World("cpu"), {}, 1e-3, (0.9, 0.99), 0.0, ema=True)


# ------------------------------------------------------------------------------------- checkpoints

KILLED = """
import os, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_durability as t
from wan5b import util
from wan5b.extras import checkpoints

folder = Path(sys.argv[1])
made = t.optimizer()
checkpoints.save(made.world, folder, {{"generator": made}}, {{"step": 1}}, keep=1)
for n in range(1, 1000):
    child = os.fork()
    if child == 0:
        count = 0

        def counted(call):
            def wrapper(*args, **options):
                global count
                count += 1
                if count == n:
                    os._exit(9)
                return call(*args, **options)
            return wrapper

        for name in ("replace", "fsync", "open", "unlink", "rmdir", "rename", "write"):
            setattr(os, name, counted(getattr(os, name)))
        checkpoints.save(made.world, folder, {{"generator": made}}, {{"step": 1 + n}}, keep=1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    complete = checkpoints.complete(folder)
    assert complete, f"killed before call {{n}}: no checkpoint is left"
    checkpoints.load(made.world, complete[-1], {{"generator": made}})
    print(n, status, complete[-1].name)
    if status == 0:
        break
"""


def test_killed_between_any_two_calls_of_a_save(tmp_path):
    """A complete checkpoint is there at any time, and it can be read."""
    script = KILLED.format(tests=str(Path(__file__).parent))
    command = [sys.executable, "-W", "ignore", "-c", script, str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=200)
    assert ended.returncode == 0, ended.stderr[-2000:]
    lines = [line.split() for line in ended.stdout.splitlines()]
    assert len(lines) > 10
    assert [status for _, status, _ in lines[:-1]] == ["9"] * (len(lines) - 1)
    assert lines[-1][1] == "0"


def test_a_checkpoint_is_on_the_disk_before_it_counts(tmp_path, monkeypatch):
    """Every file is flushed, then the folder, then it gets its name; only then do older ones go."""
    flushed = []
    events = []

    def fsync(descriptor):
        flushed.append(os.fstat(descriptor).st_ino)

    def replace(source, target):
        source = Path(source)
        if source.is_dir():
            files = [*source.iterdir(), source]
            assert all(file.stat().st_ino in flushed for file in files)
            events.append("named")
            flushed.clear()
        os.rename(source, target)

    def rmtree(path):
        assert tmp_path.stat().st_ino in flushed
        events.append("pruned")

    made = optimizer()
    checkpoints.save(made.world, tmp_path, {"generator": made}, {"step": 1}, keep=1)
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(checkpoints.shutil, "rmtree", rmtree)
    checkpoints.save(made.world, tmp_path, {"generator": made}, {"step": 2}, keep=1)
    assert events == ["named", "pruned"]


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def full(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    made = optimizer()
    checkpoints.save(made.world, tmp_path, {"generator": made}, {"step": 1})
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(OSError, match="step-0000002: .*No space left") as error:
            checkpoints.save(made.world, tmp_path, {"generator": made}, {"step": 2})
    assert "\n" not in str(error.value)
    assert [path.name for path in checkpoints.complete(tmp_path)] == ["step-0000001"]
    checkpoints.save(made.world, tmp_path, {"generator": made}, {"step": 2})
    assert len(list(tmp_path.iterdir())) == 2  # nothing unfinished is left


def test_a_full_disk_leaves_the_old_tensors(tmp_path):
    """As far as a process can tell, a limit on the size of files is a disk that is full."""
    path = tmp_path / "x.safetensors"
    util.write_tensors(path, {"a": torch.zeros(2)})
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OSError, match="cannot write .*x.safetensors"):
            util.write_tensors(path, {"a": torch.ones(10_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


# ------------------------------------------------------------------------------------------- a run


def test_a_folder_is_for_one_process(tmp_path):
    """The second is refused with the first's number and machine; the lock goes with its process."""
    code = "import sys; from pathlib import Path; from wan5b.extras import log\n"
    code += "with log.locked(Path(sys.argv[1])):\n    print('in', flush=True)\n    sys.stdin.read()"
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "run")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert holder.stdout.readline() == "in\n"
    named = f"{holder.pid} on {platform.node()}"
    with pytest.raises(ValueError, match=f"in use by process {named}"):
        log.locked(tmp_path / "run").__enter__()

    # The refused one has left the lock as it was: the next one is refused alike.
    assert (tmp_path / "run/lock").read_text() == f"{named}\n"
    with pytest.raises(ValueError, match=f"in use by process {named}"):
        log.locked(tmp_path / "run").__enter__()
    holder.kill()
    holder.communicate()
    for _ in range(2):
        with log.locked(tmp_path / "run"):
            pass


def test_damaged_lines_of_metrics_are_left_out(tmp_path, capsys):
    rows = [{"step": step, "loss": step / 2} for step in range(4)]
    text = "".join(f"{json.dumps(row)}\n" for row in rows)
    (tmp_path / "metrics.jsonl").write_bytes(
        b'{"step": 9, "lo\n\xff\x00\n[1]\n' + text.encode()[:-9]
    )
    log.begin(tmp_path, {}, 1, 2)
    kept = (tmp_path / "metrics.jsonl").read_text()
    assert [json.loads(line) for line in kept.splitlines()] == rows[:2]
    said = capsys.readouterr().err
    assert said.count("metrics.jsonl, line ") == 4
    log.append(tmp_path, rows[2])
    assert log.read_metrics(tmp_path / "metrics.jsonl") == rows[:3]
    assert not list(tmp_path.glob("*.partial"))


def test_what_is_only_to_look_at_ends_nothing(tmp_path, monkeypatch, capsys):
    log.append(tmp_path, {"step": 0, "loss": 1.0})

    def broken(folders):
        raise ImportError("numpy.core.multiarray failed to import\nof another ABI")

    monkeypatch.setattr(log, "draw", broken)
    assert log.curves([tmp_path]) is None
    assert capsys.readouterr().err == (
        "note: no curves.png: numpy.core.multiarray failed to import\n"
    )


def test_digest_is_of_what_is_held(tmp_path):
    """Not of the place; headers, sizes and contents show."""
    path = tmp_path / "a" / "0.safetensors"
    util.write_tensors(path, {"x": torch.zeros(100000)}, {"prompts": "a b"})
    known = {digest(path.parent), NOTHING}
    (tmp_path / "a").rename(tmp_path / "b")
    path = tmp_path / "b" / "0.safetensors"
    assert digest(path.parent) in known
    for tensors, metadata in (
        ({"x": torch.zeros(100000)}, {"prompts": "b a"}),
        ({"x": torch.ones(100000)}, {"prompts": "a b"}),
        ({"x": torch.zeros(100001)}, {"prompts": "a b"}),
    ):
        util.write_tensors(path, tensors, metadata)
        assert digest(path.parent) not in known
        known.add(digest(path.parent))
    util.write_tensors(tmp_path / "b" / "1.safetensors", {"x": torch.zeros(1)})
    assert digest(path.parent) not in known
    for file in ("pipeline/transformer/x.safetensors", "pickled/x.bin", "loud/X.SAFETENSORS"):
        (tmp_path / file).parent.mkdir(parents=True)
        for content in (b"", b"another"):
            (tmp_path / file).write_bytes(content)
            folder = tmp_path / file.partition("/")[0]
            assert digest(folder) not in known
            known.add(digest(folder))
    (tmp_path / "empty.pt").write_bytes(b"")
    assert digest(tmp_path / "empty.pt")
