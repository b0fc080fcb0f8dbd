"""examples/tiny/jobs.py: processes side by side, one that fails, SIGTERM. And the chain by LoRA."""

import json
import shutil
import signal
import subprocess
import sys
import time

import pytest
from tiny import ablations, demo, jobs, lora, stages

import train
from wan5b.extras.checks import check_config
from wan5b.fsdp import World

# A child that, as training does, notes SIGTERM, saves, and ends with 143; the second of two ends
# before it.
PARENT = """
import signal, sys
from pathlib import Path
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whatever these tests are run by: nohup ignores it
sys.path.insert(0, {tiny!r})
from jobs import Job, run_jobs
code = (
    "import signal, sys, time\\n"
    "def stop(*_):\\n"
    "    print('saved', flush=True)\\n"
    "    sys.exit(143)\\n"
    "signal.signal(signal.SIGTERM, stop)\\n"
    "print('at work', flush=True)\\n"
    "time.sleep(60)\\n"
)
names = ("a", "b", "c")
run_jobs([Job(name, ["-c", code], Path({out!r}, name + ".log"), 1.0) for name in names], 2)
"""


def a_job(folder, name: str, code: str, cost: float) -> jobs.Job:
    return jobs.Job(name, ["-c", code], folder / f"logs/{name}.log", cost)


def test_longest_first_and_one_that_fails(tmp_path, capsys):
    """The others go on; every line that a process prints is in its log, behind what was there."""
    todo = [
        a_job(tmp_path, "short", "print('hello')", 1),
        a_job(tmp_path, "long", "import os; print(os.environ['OMP_NUM_THREADS'])", 3),
        a_job(tmp_path, "wrong", "raise SystemExit('no such key')", 2),
    ]
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/short.log").write_text("before\n")
    with pytest.raises(ValueError, match="1 of 3 failed; what they said: .*wrong.log"):
        jobs.run_jobs(todo, 1)
    lines = [line.split(",")[0].split() for line in capsys.readouterr().out.splitlines()]
    told = [("begins", "long"), ("done", "long"), ("begins", "wrong"), ("FAILED", "wrong")]
    assert [tuple(line) for line in lines] == [*told, ("begins", "short"), ("done", "short")]
    logs = {path.stem: path.read_text() for path in (tmp_path / "logs").iterdir()}
    assert logs == {"short": "before\nhello\n", "long": "1\n", "wrong": "no such key\n"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_are_passed_on(tmp_path, number):
    """As SIGTERM; all are waited for, none is begun any more."""
    code = PARENT.format(tiny=str(demo.HERE), out=str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    logs = [tmp_path / "c.log", tmp_path / "b.log"]
    end = time.monotonic() + 30
    while not all(log.exists() and "at work" in log.read_text() for log in logs):
        assert time.monotonic() < end
        time.sleep(0.05)
    process.send_signal(number)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 143
    assert [log.read_text() for log in logs] == ["at work\nsaved\n"] * 2
    assert not (tmp_path / "a.log").exists()
    assert out.splitlines()[-1] == "stopped; the same command goes on"
    assert out.count("stopped ") == 2


def test_none_is_left_behind(tmp_path, monkeypatch):
    """Where one can't begin (here its log is a folder) those at work end too."""
    begun = []
    begin = jobs.begin
    monkeypatch.setattr(jobs, "begin", lambda job: begun.append(begin(job)) or begun[-1])
    (tmp_path / "logs/wrong.log").mkdir(parents=True)
    todo = [a_job(tmp_path, "long", "import time; time.sleep(60)", 2)]
    with pytest.raises(IsADirectoryError):
        jobs.run_jobs([*todo, a_job(tmp_path, "wrong", "", 1)], 2)
    assert [each.process.poll() for each in begun] == [-signal.SIGTERM]


def test_no_jobs_at_a_time(tmp_path):
    with pytest.raises(ValueError, match="--jobs 0: must be at least 1"):
        jobs.run_jobs([], 0)


# -------------------------------------------------------------------------------------------- LoRA


@pytest.mark.usefixtures("quick_and_clean")
def test_chain_by_lora(monkeypatch, tmp_path):
    """One base for all stages, each from the adapter of the one before, rates times the factor."""
    configs = []
    made = []

    def train_stage(run, stage, out, keys, quick):
        keys = {"out": out, "text": run / "text", **keys}
        given = [f"{key}={value}" for key, value in keys.items()]
        configs.append(train.parse([str(demo.HERE / f"{stage}.toml"), *given, "vae=release"]))
        return out / f"{stage}.safetensors", 2.0

    def judged_as(run, weights, mode, quick):
        return {"3": {"drift": len(mode), "of": str(weights)}}

    monkeypatch.setattr(lora, "train_stage", train_stage)
    monkeypatch.setattr(lora, "judged_as", judged_as)
    monkeypatch.setattr(lora, "seed_of", lambda run: 7)
    monkeypatch.setattr(demo, "make_trajectories", lambda *given: made.append(given))
    lora.chain(tmp_path, 16, 3.0)

    out = tmp_path / "ablations/lora-16-x3"
    ar, ode, dmd = configs
    assert {cfg.weights for cfg in configs} == {str(tmp_path / "teacher/teacher.safetensors")}
    adapters = ["", str(out / "ar/ar-lora"), str(out / "ode/ode-lora")]
    assert [cfg.lora_weights for cfg in configs] == adapters
    rates = [ar.lr, ode.lr, dmd.lr, dmd.critic_lr]
    assert rates == pytest.approx([4.5e-3, 3e-3, 6e-4, 1.5e-3])
    assert made == [(tmp_path, 7, out / "ar/ar.safetensors", out / "trajectories", 6)]
    assert ode.trajectories == str(out / "trajectories")
    for cfg in configs:
        assert cfg.lora == 16
        check_config(cfg, World("cpu"))

    found = json.loads((tmp_path / "ablations/lora-16-x3.json").read_text())
    assert list(found) == ["ar", "ode", "dmd"]
    assert [found[stage]["rows"]["3"]["drift"] for stage in found] == [4, 3, 3]  # many, few, few
    assert found["dmd"]["rows"]["3"]["of"] == str(out / "dmd/dmd.safetensors")

    # Done is done, but not when a config has been edited; neither to be run nor in the table.
    lora.chain(tmp_path, 16, 3.0)
    assert len(configs) == 3
    folder = tmp_path / "configs"
    folder.mkdir()
    for stage in lora.STAGES:
        shutil.copy(demo.HERE / f"{stage}.toml", folder)
    ode = folder / "ode.toml"
    ode.write_text(ode.read_text().replace("warmup = 100", "warmup = 99"))
    monkeypatch.setattr(demo, "HERE", folder)
    (tmp_path / "report.json").touch()
    again = [
        lambda: lora.chain(tmp_path, 16, 3.0),
        lambda: lora.run_chains([tmp_path], [16], [3.0], 1),
        lambda: lora.table([tmp_path]),
    ]
    monkeypatch.setattr(lora, "full_parameters", lambda run, stage: {"rows": {}, "training": 0})
    for act in again:
        with pytest.raises(ValueError, match="lora-16-x3.json was made with another warmup .100, "):
            act()

    # Nor is a stage whose scores are left of a chain that was stopped.
    (tmp_path / "ablations/lora-16-x3.json").unlink()
    with pytest.raises(ValueError, match="lora-16-x3/ode.json was made with another warmup .100, "):
        lora.chain(tmp_path, 16, 3.0)


def test_what_is_named_twice_is_done_once(monkeypatch, tmp_path):
    """Two processes would be in each other's way. Rank 0 would train all parameters."""
    begun = []
    for module in (lora, stages):
        monkeypatch.setattr(module, "run_jobs", lambda jobs, at_once: begun.append(len(jobs)))
    (tmp_path / "report.json").touch()
    lora.run_chains([tmp_path], [4, 4, 8], [1.0, 3.0, 3.0], 2)
    stages.measure_all([tmp_path], ["critic-slow", "lr-high", "critic-slow"], 2, 10)
    assert begun == [4, 2]
    with pytest.raises(ValueError, match="--ranks 0: must be at least 1"):
        lora.run_chains([tmp_path], [4, 0], [1.0], 2)


def test_table_of_lora(tmp_path, capsys):
    """All parameters out of the demo's report, then ranks and factors, in the order of numbers."""
    scores = {score: 0.25 for score, _ in lora.COLUMNS}
    lengths = (1, 3, 10, 30)
    rows = {f"{stage} x{length}": scores for stage in lora.STAGES for length in lengths}
    report = {"rows": rows, "seconds": dict.fromkeys(lora.STAGES, 10.0)}
    (tmp_path / "report.json").write_text(json.dumps(report))
    one = {"rows": {"10": {score: 0.5 for score, _ in lora.COLUMNS}}, "training": 20.0}
    (tmp_path / "ablations").mkdir()
    for rank, factor in ((16, 1.0), (4, 3.0), (4, 0.5)):
        out = tmp_path / "ablations" / lora.name_of(rank, factor)
        found = {}
        for stage in lora.STAGES:
            keys = lora.keys_of(tmp_path, out, stage, rank, factor)
            note = ablations.origin_of(tmp_path, stage, out / stage, keys).note()
            found[stage] = one | {"origin": note}
        out.with_name(f"{out.name}.json").write_text(json.dumps(found))
    lora.table([tmp_path], markdown=True)
    head, _, *lines = capsys.readouterr().out.splitlines()
    assert head.startswith("| stage | seeds | colour x10 |")
    names = ["4, learning rate x 0.5", "4, learning rate x 3", "16, learning rate x 1"]
    first, *others = lines[:4]
    assert first == "| ar, all parameters | 1 | " + "0.250 | " * 6 + "10 |"
    assert others[2] == f"| ar, rank {names[2]} | 1 | 0.500 | 0.500 | 0.500 | - | 0.500 | - | 20 |"
    assert [line.split("rank ")[1].split(" |")[0] for line in others] == names
    assert len(lines) == 12
    assert ablations.mean_and_spread([]) == "-"
