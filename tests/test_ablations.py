"""Rows of examples/tiny/ablations.py: each is a config that train.py takes; what the table says."""

import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny import ablations, demo, show

import train
from wan5b.dit import PRESETS, WanDiT
from wan5b.extras.checks import check_config
from wan5b.extras.config import types
from wan5b.fsdp import World
from wan5b.util import write_json
from wan5b.weights import save_dit

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
    note = {"origin": ablations.origin(tmp_path, "my-dmd", rows["my-dmd"]).note()}
    result.write_text(json.dumps({"of": asdict(rows["my-dmd"])} | note))
    ablations.run_rows(rows, [tmp_path], 3)
    assert [job.log.stem for job in started[1]] == ["my-two-levels", "my-twice-long"]

    # Figures of a row that was another under this name.
    result.write_text(json.dumps({"of": asdict(rows["my-two-levels"])} | note))
    with pytest.raises(ValueError, match="my-dmd.json is of another version of this row"):
        ablations.run_rows(rows, [tmp_path], 3)


@pytest.fixture
def configs(monkeypatch, tmp_path):
    """A copy of the demo's configs: configs(stage, old, new) edits one."""
    folder = tmp_path / "configs"
    folder.mkdir()
    for file in demo.HERE.glob("*.toml"):
        shutil.copy(file, folder)
    monkeypatch.setattr(demo, "HERE", folder)

    def edit(stage, old, new):
        file = folder / f"{stage}.toml"
        text = file.read_text()
        assert old in text
        file.write_text(text.replace(old, new))

    return edit


def a_demo(folder):
    """What counts as a finished demo, and files for its weights."""
    write_json(folder / "report.json", {})
    for name in demo.SAMPLED:
        save_file({"x": torch.zeros(2)}, write_parent(demo.export(folder, name)))
    return folder


def write_parent(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


@pytest.fixture
def judged(monkeypatch):
    """Training and judging take no time; the list says what was judged."""
    measured = []

    def train_stage(run, stage, out, keys, quick=False):
        measured.append(out.name)
        return out / f"{stage}.safetensors", 1.0

    scores = {score: 0.5 for score, _ in ablations.COLUMNS}
    rows = {str(length): scores for length in ablations.LENGTHS}
    monkeypatch.setattr(ablations, "train_stage", train_stage)
    monkeypatch.setattr(ablations, "judged", lambda *given: rows)
    return measured


def test_results_of_another_config_are_refused(configs, judged, tmp_path):
    """What says where training lies, and what does not change it, may be another."""
    run = a_demo(tmp_path / "demo")
    row = ablations.ROWS["gan"]
    ablations.measure(run, "gan", row)
    ablations.measure(run, "gan", row)
    configs("dmd", "save_every = 2000", "save_every = 100")
    run = run.rename(tmp_path / "moved")
    ablations.measure(run, "gan", row)
    assert judged == ["gan"]

    configs("dmd", "lr = 2e-4", "lr = 3e-4")
    result = run / "ablations/gan.json"
    way_out = f"remove or rename {result}, or name another demo"
    wrong = f"{result} was made with another lr (0.0002, now 0.0003); {way_out}"
    with pytest.raises(ValueError, match=re.escape(wrong)):
        ablations.measure(run, "gan", row)
    with pytest.raises(ValueError, match=re.escape(wrong)):
        ablations.run_rows({"gan": row}, [run], 1)
    with pytest.raises(ValueError, match=re.escape(wrong)):
        ablations.table([run], {"gan": row})
    configs("dmd", "steps = 480", "steps = 481")
    with pytest.raises(ValueError, match="another steps .480, now 481., lr "):
        ablations.measure(run, "gan", row)
    # A key that the row gives is not the config's.
    ablations.measure(run, "twice", ablations.ROWS["twice"])
    configs("dmd", "steps = 481", "steps = 482")
    ablations.measure(run, "twice", ablations.ROWS["twice"])
    assert judged == ["gan", "twice"]

    result.rename(tmp_path / "gan.json")
    ablations.measure(run, "gan", row)
    assert judged == ["gan", "twice", "gan"]


def test_results_of_other_weights_are_refused(configs, judged, tmp_path):
    """Of a demo that was made again in its place. What is gone can't be compared."""
    run = a_demo(tmp_path / "demo")
    rows = {name: ablations.ROWS[name] for name in ("dmd", "gan")}
    for name, row in rows.items():
        ablations.measure(run, name, row)
    save_file({"x": torch.ones(2)}, demo.export(run, "dmd"))
    ablations.measure(run, "gan", rows["gan"])
    with pytest.raises(ValueError, match="dmd.json was made with other weights than there are now"):
        ablations.measure(run, "dmd", rows["dmd"])
    save_file({"x": torch.ones(2)}, demo.export(run, "teacher"))
    with pytest.raises(ValueError, match="gan.json was made with other teacher than there are now"):
        ablations.measure(run, "gan", rows["gan"])
    for name in ("dmd", "teacher"):
        demo.export(run, name).unlink()
    ablations.table([run], rows)


def test_results_that_note_no_config(configs, judged, tmp_path):
    """Earlier versions' count where the weights beside them say how they were trained."""
    run = a_demo(tmp_path / "demo")
    for name in ("dmd", "gan", "data"):
        row = ablations.ROWS[name]
        ablations.measure(run, name, row)
        result = run / f"ablations/{name}.json"
        found = json.loads(result.read_text())
        training = found.pop("origin").get("training")
        result.write_text(json.dumps(found))
        wrong = f"{result} does not say with which config and data it was made; remove or rename"
        with pytest.raises(ValueError, match=re.escape(wrong)):
            ablations.measure(run, name, row)
        if training:
            weights = run / f"ablations/{name}/dmd.safetensors"
            save_dit(WanDiT(PRESETS["tiny"]), write_parent(weights), {"training": training})
            ablations.measure(run, name, row)
            # So far as they were this version's: rollout = "data" was another once.
            del training["lora_merge"]
            save_dit(WanDiT(PRESETS["tiny"]), weights, {"training": training}, overwrite=True)
            if name == "data":
                with pytest.raises(ValueError, match="another rollout .an earlier version's data"):
                    ablations.measure(run, name, row)
            else:
                ablations.measure(run, name, row)
    configs("dmd", "lr = 2e-4", "lr = 3e-4")
    # The weights beside it have to go, too: train.py would not replace them.
    way_out = re.escape(f"rename {run}/ablations/gan.json and {run}/ablations/gan, or name another")
    with pytest.raises(ValueError, match=f"another lr .0.0002, now 0.0003.; remove or {way_out}"):
        ablations.measure(run, "gan", ablations.ROWS["gan"])
    assert judged == ["gan", "data"]


def test_a_demo_of_another_config_is_noted(configs, tmp_path, capsys):
    """Rows that sample it, or start from it, are as it was trained."""
    run = tmp_path / "demo"
    for name in demo.SAMPLED:
        given = ["rollout=data"] if name == "dmd-data" else []
        training = asdict(demo.config(run, name, "seed=3", *given))
        weights = write_parent(demo.export(run, name))
        save_dit(WanDiT(PRESETS["tiny"]), weights, {"training": training})
    ablations.note_demos([run])
    assert capsys.readouterr().err == ""
    configs("ode", "lr = 1e-3", "lr = 2e-3")
    ablations.note_demos([run, tmp_path / "none"])
    said = f"note: {demo.export(run, 'ode')} was made with another lr (0.001, now 0.002)"
    way_out = "so is what starts from it, until there is a new demo"
    assert capsys.readouterr().err == f"{said}; {way_out}\n"


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
        row = ablations.ROWS["gan"]
        found = {"rows": rows, "training": 100 * seed, "of": asdict(row)}
        found["origin"] = ablations.origin(tmp_path / str(seed), "gan", row).note()
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
