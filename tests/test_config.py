"""What train.py refuses before it loads anything: configs, command lines, networks and data that do
not fit. Always in one line that names the values.
"""

import pytest
import torch
from training import (
    DIT,
    PROMPTS,
    SIZES,
    config,
    finish,
    make_run,
    refused,
    values,
    write_toml,
)

import train
from wan5b.dit import DiTConfig, WanDiT
from wan5b.extras.checks import note_apart, note_ignored
from wan5b.extras.shards import write_shard
from wan5b.flow import few_step_sigmas
from wan5b.weights import save_dit

pytestmark = pytest.mark.usefixtures("quick_and_clean")

# stage, what is wrong, what the message says
BAD = [
    # Types.
    ("ar", {"speed": 1}, "unknown keys ['speed']"),
    ("ar", {"steps": "4"}, "steps must be int, got '4'"),
    ("ar", {"steps": 4.0}, "steps must be int, got 4.0"),
    ("ar", {"bell": 1}, "bell must be bool"),
    ("ar", {"lr": True}, "lr must be float"),
    ("ar", {"stage": 3}, "stage must be str"),
    ("dmd", {"levels": [1000, "750"]}, "levels must be a list of int"),
    ("dmd", {"levels": 1000}, "levels must be a list of int, got 1000"),
    ("dmd", {"levels": [500, 750]}, "levels: steps must fall"),
    ("dmd", {"sample_prompts": "one"}, "sample_prompts must be a list of str"),
    # Choices and ranges.
    ("magic", {}, "stage must be one of teacher ar ode dmd sid, got 'magic'"),
    ("ar", {"preset": "huge"}, "preset must be one of"),
    ("ar", {"dtype": "float16"}, "dtype must be one of"),
    ("ar", {"device": "tpu"}, "device must be one of"),
    ("ar", {"forcing": "none"}, "forcing must be one of"),
    ("dmd", {"rollout": "other"}, "rollout must be one of"),
    ("ar", {"prefix": 2}, "prefix must be one of"),
    ("ar", {"batch": 0}, "batch must be at least 1 and below inf, got 0"),
    ("ar", {"save_every": 0}, "save_every must be at least 1"),
    ("ar", {"keep": 0}, "keep must be at least 1"),
    ("dmd", {"ratio": 0}, "ratio must be at least 1"),
    ("ar", {"warmup": -1}, "warmup must be at least 0 and below inf, got -1"),
    ("ar", {"lr": -1.0}, "lr must be at least 0 and below inf, got -1.0"),
    ("ar", {"clip": 0.0}, "clip must be at least 1e-06 and below inf, got 0.0"),
    ("ar", {"shift": 0.0}, "shift must be at least 1e-06 and below inf, got 0.0"),
    ("ar", {"beta2": 1.0}, "beta2 must be at least 0 and below 1, got 1.0"),
    ("ar", {"ema": 1.5}, "ema must be at least 0 and below 1, got 1.5"),
    # Values that do not go together.
    ("ar", {"batch": 5}, "batch 5 is 5 a process, not a multiple of micro_batch 2; "),
    ("ar", {"batch": 5}, "; micro_batch=1 would do"),
    ("ar", {"frames": 7}, "nearest valid: 6 or 9"),
    ("ar", {"frames": 6, "prefix": 1}, "nearest valid: 4 or 7"),
    ("ar", {"frames": 1, "prefix": 1}, "frames = 1 is a prefix alone"),
    ("ar", {"height": 3}, "3x4"),
    ("ar", {"window": 2}, "a chunk of 3 frames does not fit in a window of 2"),
    ("ar", {"window": 3, "prefix": 1, "frames": 7}, "give window = 4 or more"),
    # Options of rollouts.
    ("dmd", {"levels_after": [500, 750]}, "levels_after: steps must fall"),
    ("dmd", {"sink": 1}, "window = 0 has no room for sink = 1 and a chunk of 3"),
    ("dmd", {"sink": 4, "window": 6}, "window = 6 has no room for sink = 4 and a chunk of 3"),
    ("dmd", {"sink_rope": "relative"}, "needs a sink"),
    ("dmd", {"sink_rope": "other"}, "sink_rope must be one of absolute relative"),
    ("dmd", {"rollout_frames": 13}, "rollout_frames: 13 latent frames do not divide into chunks"),
    ("dmd", {"rollout_frames": 3}, "rollout_frames = 3 is less than frames = 6"),
    ("sid", {"rollout_frames": 9}, "name vae"),
    ("dmd", {"frames": 3, "rollout_frames": 9, "vae": "x"}, "give frames = 6 or more"),
    ("dmd", {"rollout": "data", "levels_after": [1000, 500]}, "leave levels_after"),
    ("dmd", {"rollout": "data", "clean_pass": False}, "leave levels_after, clean_pass"),
    ("ode", {"levels_after": [1000, 600]}, "levels_after has [600], which trajectories hold only"),
    # What is missing.
    ("ar", {"latents": ""}, "stage ar needs latents"),
    ("ode", {"trajectories": ""}, "stage ode needs trajectories"),
    ("sid", {"teacher": ""}, "stage sid needs teacher"),
    ("dmd", {"rollout": "data", "latents": ""}, "name latents"),
    ("dmd", {"prefix": 1, "frames": 7, "latents": ""}, "name latents"),
    ("ar", {"text": "/no/such"}, "/no/such is no folder"),
    ("ar", {"latents": "/no/such"}, "/no/such is no folder"),
    ("ode", {"trajectories": "/no/such"}, "/no/such is no folder"),
    ("ar", {"weights": "/no/such.safetensors"}, "/no/such.safetensors"),
    ("dmd", {"teacher": "/no/such.safetensors"}, "/no/such.safetensors"),
    ("ar", {"negative": "unheard of"}, "unheard of"),
    ("ar", {"sample_prompts": ["unheard of"]}, "name vae"),
    ("ar", {"vae": "/no/such"}, "/no/such: no such file or folder"),
    # Data of another size.
    ("ar", {"height": 6}, "this run needs latent (48, 6, 6, 4)"),
    ("ar", {"frames": 9}, "this run needs latent (48, 9, 4, 4)"),
    ("ode", {"width": 6}, "this run needs x (5, 48, 6, 4, 6)"),
    ("ode", {"levels": [1000, 500]}, "this run needs x (3, 48, 6, 4, 4)"),
    ("ode", {"shift": 3.0}, "change levels and shift"),
    ("dmd", {"prefix": 1, "frames": 7}, "this run needs latent (48, 7, 4, 4)"),
]


@pytest.mark.parametrize(("stage", "changes", "message"), BAD)
def test_bad_configs(data, tmp_path, command, stage, changes, message):
    keys = values(data, stage, tmp_path / "out", **changes)
    assert message in refused(command, write_toml(tmp_path / "a.toml", keys))
    assert not (tmp_path / "out").exists()


def test_help_names_every_key(capsys):
    for option in ("-h", "--help"):
        with pytest.raises(SystemExit) as end:
            train.parse([option])
        assert not end.value.code
        said = capsys.readouterr().out
        assert said.startswith("Train one stage")
        assert "\n    micro_batch = 1\n" in said
        for key in train.Config.__dataclass_fields__:
            assert f"\n    {key} = " in said


def test_bad_command_lines(data, tmp_path, command):
    good = write_toml(tmp_path / "good.toml", values(data, "ar", tmp_path / "out"))
    assert "usage: train.py CONFIG.toml" in refused(command)
    assert "nothing.toml" in refused(command, tmp_path / "nothing.toml")
    assert str(tmp_path) in refused(command, tmp_path)
    assert "key=value, got 'steps'" in refused(command, good, "steps")
    assert "steps must be int" in refused(command, good, "steps=1.5")
    assert "compile=yes is no TOML (" in refused(command, good, "steps=3", "compile=yes")
    assert "unknown keys ['a.b']" in refused(command, good, "a.b=1")
    assert "unknown keys ['latent']" in refused(command, good, "latent=data/latents")
    assert "unknown keys ['kept_blocks']" in refused(command, good, "kept_blocks=0")
    assert "lr must be at least 0 and below inf, got nan" in refused(command, good, "lr=nan")
    for wrong in ("guidance=nan", "alpha=inf", "sample_guidance=-inf"):
        assert f"{wrong.replace('=', ' must be finite, got ')}" in refused(command, good, wrong)
    assert "cannot read" in refused(command, good, "steps=[")

    (tmp_path / "bad.toml").write_text("stage = ar\n")
    assert "line 1" in refused(command, tmp_path / "bad.toml")
    (tmp_path / "latin.toml").write_bytes('stage = "é"\n'.encode("latin-1"))
    assert "utf-8" in refused(command, tmp_path / "latin.toml")
    few = write_toml(tmp_path / "few.toml", {"stage": "ar", "text": "x"})
    assert "stage ar needs out" in refused(command, few)


def test_overrides(data, tmp_path):
    path = write_toml(tmp_path / "a.toml", values(data, "ar"))
    overrides = ["lr=1", "stage=dmd", "levels=[1000, 500]", "negative=a = b", "bell=false"]
    cfg = train.parse([str(path), *overrides])
    assert cfg.lr == 1.0
    assert type(cfg.lr) is float
    assert cfg.stage == "dmd"
    assert cfg.levels == (1000, 500)
    assert cfg.negative == "a = b"
    assert cfg.bell is False


def test_keys_without_effect_are_named(data, capsys):
    def said(stage, **changes):
        note_ignored(config(data, stage, **changes), 0)
        return capsys.readouterr().err

    for stage in ("ar", "ode", "dmd"):
        assert said(stage) == ""
    assert said("ar", teacher="t", alpha=2.0) == "note: teacher, alpha has no effect in stage ar\n"
    assert said("ode", latents="x") == "note: latents has no effect in stage ode\n"
    assert said("dmd", trajectories="x", bell=False).startswith("note: trajectories, bell has no")
    assert said("dmd", latents="x", rollout="data", guidance=1.0) == ""
    assert said("ar", weights="") == "note: no weights: ar starts from random ones\n"
    assert said("teacher", weights="") == ""
    said_without = "note: lora_alpha, lora_targets has no effect without lora\n"
    assert said("ar", lora_alpha=2.0, lora_targets=("q",)) == said_without
    assert said("ar", lora=4, lora_alpha=2.0) == ""
    assert said("dmd", lora=4) == "note: no lora_weights: dmd starts from its teacher\n"


def test_what_networks_were_trained_with_is_noted(data, trained, tmp_path, capsys):
    """Where the run that starts from them has something else."""

    def said(stage, **changes):
        note_apart(config(data, stage, **changes), 0)
        return capsys.readouterr().err

    teacher = str(trained / "teacher/teacher.safetensors")
    causal = str(trained / "dmd/dmd.safetensors")
    assert said("dmd", teacher=teacher, weights=causal) == ""
    assert said("ar", weights=teacher, chunk=2, window=4) == ""  # a teacher has no chunks
    another = f"note: {teacher} was trained with another"
    for stage, changes in (("ar", {"weights": teacher}), ("dmd", {"teacher": teacher})):
        line = said(stage, shift=3.0, negative="", **changes)
        assert line == f"{another} shift (5.0, here 3.0), negative ('neg', here '')\n"
    assert said("ar", teacher=teacher, negative="") == ""  # which is not read
    line = said("sid", weights=causal, window=4, chunk=2, negative="")
    wrong = "was trained with another chunk (3, here 2), window (0, here 4)"
    assert line == f"note: {causal} {wrong}\n"

    # Of an adapter too; a release says nothing.
    finish(config(data, "ar", tmp_path / "lora", lora=4, steps=1))
    adapter = str(tmp_path / "lora/ar-lora")
    capsys.readouterr()
    line = said("ode", lora=4, lora_weights=adapter, window=6)
    assert line == f"note: {adapter} was trained with another window (0, here 6)\n"


# -------------------------------------------------------------------------- what does not fit


@pytest.fixture
def line(data, tmp_path, command):
    """The line that refuses a run of this stage with these changes."""

    def line(stage, **changes):
        keys = values(data, stage, tmp_path / "out", **changes)
        return refused(command, write_toml(tmp_path / "a.toml", keys))

    return line


def save_network(path, **changes) -> str:
    save_dit(WanDiT(DiTConfig(**vars(DIT) | changes)), path, {})
    return str(path)


def test_networks_that_do_not_fit(tmp_path, line):
    sixteen = save_network(tmp_path / "sixteen.safetensors", in_dim=16, out_dim=16)
    for stage in ("dmd", "sid"):
        text = line(stage, teacher=sixteen)
        assert "16 latent channels where 48 are needed" in text
        assert "mix" in text
    assert "this run needs latent (16, 6, 4, 4)" in line("ar", weights=sixteen)

    wide = save_network(tmp_path / "wide.safetensors", text_dim=24)
    text = line("ar", weights=wide)
    assert "embeddings of width 16 and up to 5 tokens, the network takes (24, 8)" in text
    assert "different texts" in line("dmd", teacher=wide)
    short = save_network(tmp_path / "short.safetensors", text_len=4)
    text = line("ode", weights=short)
    assert "up to 5 tokens, the network takes (16, 4): shorten 'prompt 1' and the like" in text


def test_data_that_do_not_fit(data, tmp_path, line):
    empty = tmp_path / "empty"
    write_shard(empty / "0.safetensors", {"latent": torch.zeros(0, *SIZES)}, [])
    text = line("ar", latents=str(empty))
    assert "nothing to train on" in text
    assert str(empty) in text
    assert "this run needs x" in line("ode", trajectories=str(data / "latents"))
    assert "no text embeddings" in line("ar", text=str(data / "latents"))
    behind = tmp_path / "behind"
    facts = {"sigmas": few_step_sigmas(), "prefix": 1}
    write_shard(behind / "0.safetensors", {"x": torch.zeros(1, 5, *SIZES)}, PROMPTS[:1], **facts)
    text = line("ode", trajectories=str(behind), chunk=1)
    assert f"{behind} goes on from clean first frames" in text
    assert "give prefix = 1" in text
    make_run(data, "ode", trajectories=str(behind), chunk=1, prefix=1, latents="")
    other = tmp_path / "other"
    write_shard(other / "0.safetensors", {"latent": torch.zeros(1, *SIZES)}, ["unheard of"])
    assert "prepare.py text" in line("ar", latents=str(other))
    with pytest.raises(ValueError, match="unheard of"):
        make_run(data, "ar", sample_prompts=("unheard of",))


def test_networks_of_another_stage(data, trained, line):
    """Of a checkpoint or of an export; a release, or a file without a record, may start any
    stage.
    """
    teacher = str(trained / "teacher/step-0000002")
    causal = str(trained / "dmd/dmd.safetensors")
    for stage in ("dmd", "sid"):
        assert f"{teacher} is of stage teacher; {stage} takes" in line(stage, weights=teacher)
        wanted = f"{stage} takes a release there, or one of ('teacher',)"
        assert f"{causal} is of stage dmd; {wanted}" in line(stage, teacher=causal)
        # In both places at once, where each is looked at by itself.
        assert f"{teacher} is of stage teacher" in line(stage, weights=teacher, teacher=teacher)
    for stage in ("teacher", "ar", "ode"):
        assert f"{causal} is of stage dmd; {stage} takes" in line(stage, weights=causal)
    for stage in ("teacher", "ar", "ode"):
        make_run(data, stage, weights=teacher)
