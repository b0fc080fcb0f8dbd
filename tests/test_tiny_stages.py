"""examples/tiny/stages.py: cases are configs, a tiny demo goes through, what the page says."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny import demo, jobs, sick, stages, stages_show

import train
from wan5b.extras.config import types
from wan5b.extras.log import METRICS

TRAINED = [name for name, case in sick.CASES.items() if sick.is_trained(case)]
PAGE = "\n".join(f"<!-- figures: {n} -->\nold\n<!-- end: {n} -->" for n in ("usual", "sick"))


@pytest.mark.parametrize("name", TRAINED)
def test_cases_are_configs(name, monkeypatch, tmp_path):
    """A case differs from its healthy stage in its own keys alone, and never costs more steps."""
    case = sick.CASES[name]
    told = []

    def run_stage(run: Path, stage: str, *given: str) -> float:
        """What is left of one is there."""
        told.extend(given)
        left = run / "ablations" / name
        left.mkdir(parents=True)
        (left / f"{stage}.safetensors").touch()
        (left / METRICS).write_text('{"step": 1, "seconds": 1.0}\n')
        return 1.0

    monkeypatch.setattr(demo, "run_stage", run_stage)
    monkeypatch.setattr(stages.ablations, "seed_of", lambda run: 7)
    monkeypatch.setattr(stages, "still_clips", lambda run: None)
    weights = stages.weights_of(tmp_path, name)
    assert weights == tmp_path / "ablations" / name / f"{case.beside}.safetensors"

    config = str(demo.HERE / f"{case.beside}.toml")
    usual = train.parse([config])
    cfg = train.parse([config, *told])
    changed = {key for key in types(train.Config) if getattr(cfg, key) != getattr(usual, key)}
    read = {"teacher"} if case.beside == "dmd" else {"latents"}
    assert changed == {"out", "seed", "weights", *case.keys} | read
    assert cfg.steps <= usual.steps
    if case.still:
        assert cfg.latents == str(tmp_path / "ablations/ar-still/latents")


@pytest.fixture(autouse=True)
def few_captions(monkeypatch):
    """Two clips are judged, for speed; runs draw no curves of their own."""
    monkeypatch.setattr(demo, "JUDGED", demo.JUDGED[:2])
    monkeypatch.setattr(stages, "KEPT", (0, 1))
    monkeypatch.setattr(train.log, "curves", lambda folders: None)


@pytest.fixture(scope="module")
def tiny_demo(tmp_path_factory):
    """A demo of two steps a stage; ode is a copy of ar, which dmd starts from as well."""
    run = tmp_path_factory.mktemp("tiny") / "demo"
    patch = pytest.MonkeyPatch()
    patch.setattr(train.log, "curves", lambda folders: None)
    demo.make_release(run / "release", demo.MEAN_SCALE)
    demo.make_data(run, demo.PER_SHARD)
    stages.first_weights(run)
    common = ["steps=2", "batch=2", "micro_batch=2"]
    latents = f"latents={run / 'latents'}"
    demo.run_stage(run, "teacher", f"weights={run / 'init.safetensors'}", latents, *common)
    teacher = demo.export(run, "teacher")
    demo.run_stage(run, "ar", f"weights={teacher}", latents, *common)
    shutil.copytree(run / "ar", run / "ode")
    (run / "ode/ar.safetensors").rename(demo.export(run, "ode"))
    weights = f"weights={demo.export(run, 'ode')}"
    demo.run_stage(run, "dmd", weights, f"teacher={teacher}", *common)
    (run / "report.json").write_text("{}")
    patch.undo()
    return run


def test_from_a_demo_to_the_page(tiny_demo, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "levels", lambda mode: [1.0, 0.0])
    names = [*sick.HEALTHY, "batch-small", "window-narrow"]
    for name in names:
        stages.measure(tiny_demo, name, longest=1, quick=True)
        found = json.loads((tiny_demo / "stages-quick" / f"{name}.json").read_text())
        assert set(stages_show.SCORES) <= set(found["scores"]["1"])
        assert bool(found["curves"]) == (name != "window-narrow")
        with Image.open(tiny_demo / "stages-quick" / f"{name}.png") as picture:
            assert picture.size == (64 * 3, 64 * 2)  # ends 1, 3, 9

    # What is there is not made again, but where it was judged at fewer lengths.
    result = tiny_demo / "stages-quick/dmd.json"
    before = result.stat().st_mtime_ns
    stages.measure(tiny_demo, "dmd", longest=1, quick=True)
    assert result.stat().st_mtime_ns == before
    monkeypatch.setattr(stages, "scored", lambda latents, codec: {"1": score, "3": score})
    monkeypatch.setattr(stages, "keep_frames", lambda *given: None)
    score = json.loads(result.read_text())["scores"]["1"]
    stages.measure(tiny_demo, "dmd", longest=3, quick=True)
    assert list(json.loads(result.read_text())["scores"]) == ["1", "3"]

    # What is quick never stands where the page's figures come from.
    assert not (tiny_demo / "stages").exists()
    assert not (tiny_demo / "ablations").exists()
    shutil.copytree(tiny_demo / "stages-quick", tiny_demo / "stages")

    page = tmp_path / "stages.md"
    page.write_text(PAGE)
    found = stages.results([tiny_demo], quick=True)
    assert list(found) == [name for name in sick.CASES if name in names]
    stages_show.write(tmp_path, [tiny_demo], found)
    text = page.read_text()
    assert "old" not in text
    assert "| dmd | `critic_loss` | " in text
    assert "| batch-small | batch 1 for 8 | " in text
    assert {file.stem for file in (tmp_path / "stages").iterdir()} == set(names)
    assert all(f.stat().st_size <= stages_show.LIMIT for f in (tmp_path / "stages").iterdir())
    assert "Of real clips: `x0_motion` 0.4" in text
    table = stages_show.sick_table(found)
    assert stages_show.filled(text, {"sick": table}) == text

    # Nothing of another config or of other weights gets there.
    with pytest.raises(ValueError, match="batch-small.json was made with another steps .2, now 4"):
        stages.results([tiny_demo])
    monkeypatch.setattr(demo, "export", lambda run, name: run / "ar/ar.safetensors")
    with pytest.raises(ValueError, match="teacher.json was made with other weights than there are"):
        stages.results([tiny_demo], quick=True)


def test_still_clips(tiny_demo):
    """They are the demo's, also where others were before."""
    stages.still_clips(tiny_demo)
    path = tiny_demo / stages.STILL / "00000.safetensors"
    before = path.read_bytes()
    path.write_bytes(b"of other clips")
    stages.still_clips(tiny_demo)
    assert path.read_bytes() == before
    store = stages.Store(tiny_demo / stages.STILL)
    moving = stages.Store(tiny_demo / "latents")
    clip = store[5]["latent"]
    assert torch.equal(clip, moving[5]["latent"][:, :1].expand_as(clip))
    assert store.prompts == moving.prompts


def test_sampling_changes_what_the_case_says(tiny_demo):
    """The healthy case is the demo's own sampling; each sick one is another."""
    frames = 6  # more than a window
    text = stages.TextStore(tiny_demo / "text")
    model = stages.load_dit(demo.export(tiny_demo, "dmd"))
    few = stages.mode_of(sick.CASES["dmd"], demo.SAMPLED)
    usual = demo.sample_clips(model, text, few, frames, demo.SAMPLING_SEED)
    assert torch.equal(stages.sampled(sick.CASES["dmd"], model, text, frames), usual)
    for name, case in sick.SICK.items():
        if case.how:
            other = stages.sampled(case, model, text, frames)
            assert not torch.equal(other, usual), name


def test_bins():
    rows = [{"step": step, "critic_loss": float(step)} for step in range(48)]
    rows[0]["gradient"] = 3.0
    found = stages_show.binned(rows, "dmd")
    assert found == {"critic_loss": [11.5, 35.5], "gradient": [3.0, None]}
    assert stages_show.binned([], "dmd") == {}


def report(**curves):
    return {"curves": curves, "scores": {}, "ended": ""}


def test_first_sign():
    """What stays outside of the seeds' range counts, by its own width; the earliest is named."""
    healthy = [report(loss=[1.0] * 4, norm=[1.0] * 4), report(loss=[2.0] * 4, norm=[2.0] * 4)]
    sick_run = [report(loss=[9.0, 1.5, 3.5, 3.5], norm=[1.0, 2.9, 2.9, 2.9])]
    assert stages_show.first_sign(healthy, sick_run, "ode") == "`loss` by step 45"
    assert stages_show.first_sign(healthy, healthy[:1], "ode") == "none"


def test_a_diverged_run_is_told():
    curves = {"loss": [1.0], "norm": [1.0]}
    score = dict.fromkeys(stages_show.SCORES, 0.5)
    healthy = {"curves": curves, "scores": {"1": score}, "ended": ""}
    gone = {"curves": {}, "scores": {}, "ended": "step 7, rank 0"}
    table = stages_show.sick_table({"teacher": [healthy], "teacher-lr-high": [gone]})
    assert "not finite in step 7, rank 0" in table


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="lacks the marks"):
        stages_show.filled("no marks", {"usual": ""})
    (tmp_path / "stages.md").write_text(PAGE)
    with pytest.raises(ValueError, match="--only teacher"):
        stages_show.write(tmp_path, [tmp_path], {})


def test_processes(monkeypatch, tmp_path):
    """One a case that is not done, or judged at fewer lengths; trained ones cost more."""
    started = []
    monkeypatch.setattr(stages, "run_jobs", lambda todo, at_once: started.extend(todo))
    with pytest.raises(ValueError, match="no finished demo"):
        stages.measure_all([tmp_path], ["dmd"], 2, 10)
    (tmp_path / "report.json").touch()
    (tmp_path / "stages").mkdir()
    for name in ("teacher", "dmd"):  # the first is judged at one length anyway
        found = {"ended": "", "scores": {"1": {}}, "of": jobs.said(sick.CASES[name])}
        found["origin"] = stages.origin(tmp_path, name).note()
        (tmp_path / f"stages/{name}.json").write_text(json.dumps(found))
    stages.measure_all([tmp_path], ["teacher", "dmd", "lr-high"], 2, 10)
    assert [(job.log.stem, job.cost) for job in started] == [("dmd", 0), ("lr-high", 1)]

    measured = []
    monkeypatch.setattr(stages, "measure", lambda *given: measured.append(given))
    for job in started:
        stages.run_one(json.loads(job.command[-1]))
    assert measured == [(tmp_path, name, 10, False) for name in ("dmd", "lr-high")]
