"""Rows of examples/tiny/ablations.py: each is a config that train.py takes; what the table says."""

import json

import pytest
from tiny import ablations, demo

import train
from wan5b.extras.config import types


@pytest.mark.parametrize("name", ablations.ROWS)
def test_rows_are_configs(name, monkeypatch, tmp_path):
    """What a row trains differs from the demo's dmd in its own keys alone."""
    row = ablations.ROWS[name]
    told = []
    monkeypatch.setattr(demo, "run_stage", lambda run, stage, *given: told.extend(given) or 1.0)
    monkeypatch.setattr(ablations, "read_metadata", lambda path: {"training": {"seed": 7}})
    weights, seconds = ablations.trained(tmp_path, name, row)
    if not told:
        assert weights == tmp_path / "dmd/dmd.safetensors"
        return
    assert weights == tmp_path / "ablations" / name / "dmd.safetensors"
    assert seconds == 1.0

    usual = train.parse([str(demo.HERE / "dmd.toml")])
    cfg = train.parse([str(demo.HERE / "dmd.toml"), *told])
    changed = {key for key in types(train.Config) if getattr(cfg, key) != getattr(usual, key)}
    read = {"latents"} if row.clips else set()
    # A ratio or guidance that is the usual one would be no row.
    assert changed == {"out", "seed", "weights", "teacher", *row.keys} | read
    assert cfg.seed == 7
    assert cfg.weights == str(tmp_path / row.start / f"{row.start}.safetensors")


def test_forwards():
    told = {name: ablations.forwards(ablations.ROWS[name]) for name in ("dmd", "levels", "gan")}
    assert told == {"dmd": (5, 5), "levels": (5, 3), "gan": (5, 5)}
    assert ablations.forwards(ablations.ROWS["levels-no-clean-pass"]) == (4, 2)


def test_table(tmp_path, capsys):
    """Means and spreads of the seeds that are there; rows that were not run are left out."""
    for seed, drift in enumerate((0.1, 0.3)):
        scores = {score: 0.5 for score, _ in ablations.COLUMNS} | {"drift": drift}
        rows = {str(length): scores for length in ablations.LENGTHS}
        path = tmp_path / str(seed) / "ablations/gan.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"rows": rows}))
    ablations.table([tmp_path / "0", tmp_path / "1"])
    head, row = capsys.readouterr().out.splitlines()
    assert head.split()[:3] == ["row", "seeds", "forwards"]
    assert row.startswith("GAN branch ")
    assert row.count("0.200 +-0.141") == len(ablations.LENGTHS)
