"""Rows of examples/tiny/ablations.py: each is a config that train.py takes; what the table says."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from tiny import ablations, demo, show

import train
from wan5b.extras.checks import check_config
from wan5b.extras.config import types
from wan5b.fsdp import World
from wan5b.util import write_json

pytestmark = pytest.mark.usefixtures("quick_and_clean")


@pytest.fixture
def told(monkeypatch):
    """A list that takes the overrides of train.py, which leaves an export and its metrics."""
    given = []

    def run_stage(run, stage, *overrides):
        given.extend(overrides)
        out = Path(next(each for each in overrides if each.startswith("out="))[4:])
        out.mkdir(parents=True)
        (out / f"{stage}.safetensors").touch()
        steps = [{"step": i, "seconds": 0.5} for i in range(3)]
        (out / "metrics.jsonl").write_text("".join(f"{json.dumps(step)}\n" for step in steps))

    monkeypatch.setattr(demo, "run_stage", run_stage)
    monkeypatch.setattr(ablations.signals, "while_running", lambda: None)
    monkeypatch.setattr(ablations, "read_metadata", lambda path: {"training": {"seed": 7}})
    return given


@pytest.mark.parametrize("name", ablations.ROWS)
def test_rows_are_configs(name, told, tmp_path):
    """What a row trains differs from the demo's dmd in its own keys alone."""
    row = ablations.ROWS[name]
    weights, seconds = ablations.trained(tmp_path, name, row)
    if not told:
        assert weights == tmp_path / "dmd/dmd.safetensors"
        return
    assert weights == tmp_path / "ablations" / name / "dmd.safetensors"
    assert seconds == 1.5

    usual = train.parse([str(demo.HERE / "dmd.toml")])
    cfg = train.parse([str(demo.HERE / "dmd.toml"), *told])
    changed = {key for key in types(train.Config) if getattr(cfg, key) != getattr(usual, key)}
    read = {"latents"} if row.clips else set()
    # A ratio or guidance that is the usual one would be no row.
    assert changed == {"out", "seed", "weights", "teacher", *row.keys} | read
    assert cfg.seed == 7
    assert cfg.weights == str(tmp_path / row.start / f"{row.start}.safetensors")
    common = ["text=text", "vae=release"]  # demo.run_stage adds them
    check_config(train.parse([str(demo.HERE / "dmd.toml"), *told, *common]), World("cpu"))


def test_a_quick_look_is_kept_apart(told, tmp_path):
    weights, _ = ablations.trained(tmp_path, "twice", ablations.ROWS["twice"], quick=True)
    assert weights == tmp_path / "ablations-quick/twice/dmd.safetensors"
    assert train.parse([str(demo.HERE / "dmd.toml"), *told]).steps == 2


def test_training_that_was_stopped_is_not_judged(told, monkeypatch, tmp_path):
    """It leaves no export; the seconds of all its steps count when it goes on."""
    monkeypatch.setattr(demo, "run_stage", lambda *_: None)
    with pytest.raises(SystemExit, match="143"):
        ablations.measure(tmp_path, "long", ablations.ROWS["long"])
    assert not (tmp_path / "ablations/long.json").exists()


def test_rows_of_another_file(monkeypatch, tmp_path):
    """A process is given its row itself; what is done is not begun again."""
    rows = {f"my-{name}": ablations.ROWS[name] for name in ("dmd", "two-levels", "twice-long")}
    started = []
    monkeypatch.setattr(ablations, "run_jobs", lambda jobs, at_once: started.append(jobs))
    with pytest.raises(ValueError, match="no finished demo"):
        ablations.run_rows(rows, [tmp_path], 3)
    (tmp_path / "report.json").touch()
    ablations.run_rows(rows, [tmp_path], 3)
    (jobs,) = started
    sampled, short, long = (job.cost for job in jobs)
    assert sampled == 0 < 3 * short < long

    measured = []
    monkeypatch.setattr(ablations, "measure", lambda *given: measured.append(given))
    for job in jobs:
        ablations.run_one(json.loads(job.command[-1]))
        assert job.command[-2] == "--one"
    assert measured == [(tmp_path, name, row, False) for name, row in rows.items()]

    (tmp_path / "ablations").mkdir()
    result = tmp_path / "ablations/my-dmd.json"
    result.write_text(json.dumps({"of": asdict(rows["my-dmd"])}))
    ablations.run_rows(rows, [tmp_path], 3)
    assert [job.log.stem for job in started[1]] == ["my-two-levels", "my-twice-long"]

    # Figures of a row that was another under this name.
    result.write_text(json.dumps({"of": asdict(rows["my-two-levels"])}))
    with pytest.raises(ValueError, match="my-dmd.json is of another version of this row"):
        ablations.run_rows(rows, [tmp_path], 3)


def test_rows_are_json():
    for row in ablations.ROWS.values():
        assert ablations.Row(**json.loads(json.dumps(asdict(row)))) == row


def test_forwards():
    told = {name: ablations.forwards(ablations.ROWS[name]) for name in ("dmd", "levels", "gan")}
    assert told == {"dmd": (5, 5), "levels": (5, 3), "gan": (5, 5)}
    assert ablations.forwards(ablations.ROWS["levels-no-clean-pass"]) == (4, 2)


def test_table(tmp_path, capsys):
    """Means and spreads of the seeds that are there; rows that were not run are left out. A folder
    that is no demo is not a seed that is not there.
    """
    for seed, drift in enumerate((0.1, 0.3)):
        scores = {score: 0.5 for score, _ in ablations.COLUMNS} | {"drift": drift}
        rows = {str(length): scores for length in ablations.LENGTHS}
        path = tmp_path / str(seed) / "ablations/gan.json"
        path.parent.mkdir(parents=True)
        found = {"rows": rows, "training": 100 * seed, "of": asdict(ablations.ROWS["gan"])}
        path.write_text(json.dumps(found))
        (tmp_path / str(seed) / "report.json").touch()
    runs = [tmp_path / "0", tmp_path / "1"]
    with pytest.raises(ValueError, match="2 is no finished demo"):
        ablations.table([*runs, tmp_path / "2"])
    with pytest.raises(ValueError, match="a demo counts once, got .*1/ablations/..: name it once"):
        ablations.table([*runs, tmp_path / "1/ablations/.."])
    ablations.table(runs, markdown=True)
    head, rule, row = capsys.readouterr().out.splitlines()
    assert head.startswith("| row | seeds | forwards | colour x10 |")
    assert rule == "|" + " --- |" * 11
    cells = ["GAN branch", "2", "5, 5", *["0.500 +-0.000"] * 4, *["0.200 +-0.141"] * 3, "50"]
    assert row == f"| {' | '.join(cells)} |"

    ablations.table(runs)
    head, row = capsys.readouterr().out.splitlines()
    assert head.split()[:3] == ["row", "seeds", "forwards"]
    assert row.startswith("GAN branch ")
    assert row.count("0.200 +-0.141") == len(ablations.LENGTHS)


def test_a_table_of_demos_that_were_judged_alike(tmp_path):
    """Not of one twice, as of two training seeds; not of lengths that some lack."""
    for name, lengths in (("short", (1, 3)), ("long", (1, 3, 10))):
        rows = {f"dmd x{length}": {} for length in lengths}
        write_json(tmp_path / name / "report.json", {"rows": rows})
    runs = [tmp_path / "short", tmp_path / "long"]
    with pytest.raises(ValueError, match="long was judged at other lengths than .*short"):
        show.table(runs)
    with pytest.raises(ValueError, match="a demo counts once"):
        show.table([runs[0], runs[0]])
    with pytest.raises(ValueError, match=f"{tmp_path} is no finished demo"):
        show.table([tmp_path])
