"""Whole runs with LoRA: what they leave, going on, the chain of stages, what is refused; two
processes.
"""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from common import rel
from safetensors.torch import load_file, save_file
from test_fsdp import job, torchrun
from training import (
    DIT,
    apart,
    checkpoint_state,
    config,
    finish,
    furthest,
    names,
    read_metrics,
    refused,
    same,
    values,
    without_std,
    write_toml,
)

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))
import convert

import sample
import train
from wan5b import fsdp
from wan5b.dit import WanDiT
from wan5b.extras import adapters, plan
from wan5b.extras.formats import load_dit, open_dit, read_metadata
from wan5b.extras.lora import read_lora
from wan5b.weights import save_dit

pytestmark = pytest.mark.usefixtures("quick_and_clean")

LORA = {"lora": 4, "lora_alpha": 6.0, "lr": 1e-3}
Q = "blocks.0.self_attn.q"


def lora_values(data, stage, out, **changes) -> dict:
    return values(data, stage, out, **(LORA | {"teacher": ""} | changes))


def lora_config(data, stage, out, **changes) -> train.Config:
    return train.Config(**lora_values(data, stage, out, **changes))


@pytest.fixture(scope="module")
def chain(data, tmp_path_factory):
    """Folders of ar, and of dmd that goes on from its adapter."""
    out = tmp_path_factory.mktemp("chain")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    finish(lora_config(data, "ar", out / "ar", steps=2))
    start = {"lora_weights": str(out / "ar/ar-lora"), "beta1": 0.5, "steps": 2}
    finish(lora_config(data, "dmd", out / "dmd", **start))
    torch.set_num_threads(threads)
    return out


# -------------------------------------------------------------------------------- what a run leaves


def test_what_a_checkpoint_holds(data, chain):
    """Adapters, what the optimizer keeps of them, the average; not the base, but its digest."""
    state = checkpoint_state(chain / "dmd/step-0000002")
    groups = {name.rpartition(f".{Q}")[0] for name in state if Q in name}
    kept = ("master", "exp_avg", "exp_avg_sq")
    expected = {f"{who}.{group}" for who in ("generator", "critic") for group in kept}
    assert groups == expected | {"generator.ema"}
    assert all(".lora_A." in name or ".lora_B." in name for name in state)
    assert {value.dtype for value in state.values()} == {torch.float32}
    said = read_metadata(chain / "dmd/step-0000002")
    assert said["data"].keys() == {"text", "weights", "lora_weights"}
    assert said["training"]["lora"] == 4


def test_the_chain_goes_on_where_the_stage_before_ended(data, chain):
    """A and B are what ar's average was; the critic starts as the teacher does."""
    start = str(chain / "ar/ar-lora")
    cfg = lora_config(data, "dmd", "unused", lora_weights=start)
    run = train.build(cfg, fsdp.World("cpu"))
    left = load_file(chain / "ar/ar-lora/adapter_model.safetensors")
    state = run.generator.state_dict()
    assert len(left) == 2 * 10 * DIT.num_layers
    for name, value in left.items():
        assert torch.equal(state[name.removeprefix("base_model.model.")], value)
    assert all(not p.any() for n, p in run.critic.named_parameters() if "lora_B" in n)

    # Of another alpha it has the effect that it had there.
    other = train.build(train.Config(**vars(cfg) | {"lora_alpha": 3.0}), fsdp.World("cpu"))
    x = torch.randn(1, 48, 6, 4, 4)
    context = run.context(["prompt 1"])
    assert rel(other.generator(x, 0.5, context), run.generator(x, 0.5, context)) < 1e-5
    assert rel(run.teacher(x, 0.5, context), run.generator(x, 0.5, context)) > 1e-4


@pytest.mark.parametrize("stage", ["ar", "dmd"])
def test_the_export_is_the_base_with_the_adapter(data, chain, stage):
    """As sample.py and tools/convert.py read it; a checkpoint in its place too."""
    merged = load_file(chain / stage / f"{stage}.safetensors")
    base = data / "generator.safetensors"
    for adapter in (chain / stage / f"{stage}-lora", chain / stage / "step-0000002"):
        found = load_dit(base, loras=[(adapter, 1.0)]).state_dict()
        assert furthest(found, merged) < 1e-6
    plain = load_file(base)
    assert rel(merged[f"{Q}.weight"], plain[f"{Q}.weight"]) > 1e-3
    assert torch.equal(merged["head.head.weight"], plain["head.head.weight"])


def test_another_base_is_noted(data, chain, tmp_path, capsys):
    """Over what it is merged into already, as well as over other weights."""
    adapter = str(chain / "dmd/dmd-lora")
    sources = (data / "generator.safetensors", chain / "dmd/dmd.safetensors")
    for i, source in enumerate(sources):
        said = f"note: {adapter} was trained over another base than {source}"
        made = tmp_path / f"{i}.safetensors"
        convert.main([str(source), str(made), "--layout", "comfy", "--lora", adapter])
        assert (said in capsys.readouterr().err) == bool(i)
        args = ["--weights", str(source), "--lora", adapter, "--release", str(data)]
        plan.look_at_weights(sample.parse([*args, "--device", "cpu", "--prompt", "a"]))
        assert (said in capsys.readouterr().err) == bool(i)


def test_convert_keeps_what_an_adapter_says(data, chain, tmp_path):
    base = str(data / "generator.safetensors")
    made = tmp_path / "made.safetensors"
    adapter = str(chain / "dmd/dmd-lora")
    convert.main([base, str(made), "--layout", "comfy", "--lora", adapter])
    assert furthest(load_file(made), load_file(chain / "dmd/dmd.safetensors")) < 1e-6
    said = read_metadata(made)
    assert (said["stage"], said["loras"]) == ("dmd", [["dmd-lora", 1.0]])
    assert said["levels"] == [1000, 750, 500, 250]


def test_an_adapter_for_others(data, chain, tmp_path):
    """In ComfyUI's layout it is the same to us, and says the same of itself."""
    made = tmp_path / "made.safetensors"
    folder = chain / "dmd/dmd-lora"
    convert.main([str(folder), str(made), "--layout", "comfy"])
    assert adapters.said_by(made) == adapters.said_by(folder)
    tensors = load_file(made)
    assert tensors[f"diffusion_model.{Q}.alpha"] == 6.0
    assert tensors.keys() == {name for name in tensors if name.startswith("diffusion_model.blocks")}
    found = load_dit(data / "generator.safetensors", loras=[(made, 1.0)]).state_dict()
    assert furthest(found, load_file(chain / "dmd/dmd.safetensors")) < 1e-6
    for more in (["--layout", "original"], ["--layout", "comfy", "--lora", str(folder)]):
        with pytest.raises(ValueError, match="is an adapter, which stays one"):
            convert.main([str(folder), str(tmp_path / "x.safetensors"), *more])


def test_a_merged_export_in_bfloat16_is_rounded_once(data, chain, tmp_path):
    """Over a base that is bfloat16 itself, as the run has it."""
    base = tmp_path / "base.safetensors"
    save_dit(load_dit(data / "generator.safetensors"), base, {}, dtype=torch.bfloat16)
    cfg = lora_config(data, "ar", tmp_path / "ar", weights=str(base), dtype="bfloat16", steps=1)
    merged = finish(cfg)
    loras = [(tmp_path / "ar/ar-lora", 1.0)]
    found = load_dit(base, "cpu", torch.bfloat16, loras=loras).state_dict()
    assert merged[f"{Q}.weight"].dtype == torch.bfloat16
    assert furthest(found, merged) < 1e-4
    exact = load_dit(base, loras=loras).state_dict()
    assert 1e-4 < rel(merged[f"{Q}.weight"], exact[f"{Q}.weight"]) < 3e-3


def test_a_file_moved_away_from_its_config_keeps_its_alpha(chain, tmp_path):
    shapes = {name: p.shape for name, p in WanDiT(DIT).named_parameters()}
    folder = chain / "ar/ar-lora"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (4, 6.0, "LORA")
    assert config["target_modules"] == list(adapters.TARGETS)
    shutil.copy(folder / "adapter_model.safetensors", tmp_path / "style.safetensors")
    for path in (folder, tmp_path / "style.safetensors", chain / "ar/step-0000002"):
        (delta,) = read_lora(path, shapes)[f"{Q}.weight"]
        assert delta.scale == 1.5


def test_sample_knows_how_an_adapter_is_sampled(data, chain, tmp_path, capsys):
    """As the merged export is."""
    planned = []
    given = ["--device", "cpu", "--prompt", "x", "--size", "64x64", "--out", str(tmp_path / "a")]
    base = str(data / "generator.safetensors")
    for stage in ("ar", "dmd"):
        export = str(chain / stage / f"{stage}.safetensors")
        for weights in (["--weights", export], ["--weights", base, "--lora"]):
            if "--lora" in weights:
                weights.append(str(chain / stage / f"{stage}-lora"))
            job = plan.plan(sample.parse([*given, "--release", base, *weights]))
            planned.append(job.sampler)
            assert f"{stage} (its metadata)" in capsys.readouterr().out
    assert planned[0] == planned[1]
    assert planned[2] == planned[3]
    assert planned[0] != planned[2]


# ---------------------------------------------------------------------------------------- going on


def test_a_run_goes_on_bit_for_bit(data, chain, tmp_path):
    out = tmp_path / "dmd"
    changes = {"lora_weights": str(chain / "ar/ar-lora"), "beta1": 0.5, "steps": 2}
    cfg = lora_config(data, "dmd", out, save_every=1, **changes)
    first = finish(cfg)
    state = checkpoint_state(out / "step-0000002")
    rows = read_metrics(out)
    (out / "dmd.safetensors").unlink()
    shutil.rmtree(out / "dmd-lora")
    shutil.rmtree(out / "step-0000002")
    assert same(finish(cfg), first)
    assert same(checkpoint_state(out / "step-0000002"), state)
    assert read_metrics(out) == rows

    # Killed between its two exports: the rest is made.
    (out / "dmd.safetensors").unlink()
    assert same(finish(cfg), first)
    assert names(out) == ["step-0000001", "step-0000002"]


def test_what_does_not_go_on(data, chain, tmp_path, command, capsys):
    """Another rank, another base, another adapter to start from; an export in the way."""
    out = tmp_path / "ar"
    finish(lora_config(data, "ar", out, steps=2))
    capsys.readouterr()

    def line(out=out, **changes):
        keys = lora_values(data, "ar", out, **({"steps": 2} | changes))
        return refused(command, write_toml(tmp_path / "a.toml", keys))

    assert f"{out}/ar.safetensors is of step 2; move it to go on to steps = 3" in line(steps=3)
    (out / "ar.safetensors").rename(tmp_path / "moved.safetensors")
    alone = tmp_path / "alone"
    shutil.copytree(out / "ar-lora", alone / "ar-lora")
    text = line(alone, lr=2e-3)
    assert f"{alone}/ar-lora/adapter_model.safetensors was made with another lr (0.001, " in text
    assert "is of step 2; move it to go on to steps = 3" in line(alone, steps=3)
    save_file({"x": torch.zeros(1)}, alone / "ar-lora/adapter_model.safetensors")
    assert f"{alone}/ar-lora is another adapter; move it" in line(alone)
    shutil.rmtree(out / "ar-lora")
    assert "was made with another lora (4, now 2)" in line(lora=2)
    assert "was made with another lora_alpha (" in line(lora_alpha=0.0)
    assert "was made with another lora_targets (" in line(lora_targets=["q"])
    teacher = str(data / "teacher.safetensors")
    assert f"was made with other weights than {teacher}" in line(weights=teacher)
    start = str(chain / "ar/ar-lora")
    assert f"was made with other lora_weights than {start} holds" in line(lora_weights=start)


def test_runs_of_earlier_versions_go_on(data, tmp_path):
    """Their record lacks some keys, and has others."""
    out = tmp_path / "out"
    finish(config(data, "ar", out, steps=2))
    facts = json.loads((out / "step-0000002/facts.json").read_text())
    for key in [key for key in facts["training"] if key.startswith("lora")]:
        del facts["training"][key]
    facts["training"] |= {"fp8": False, "kept_blocks": 1}
    (out / "step-0000002/facts.json").write_text(json.dumps(facts))
    (out / "ar.safetensors").unlink()
    finish(config(data, "ar", out, steps=3))
    assert [row["step"] for row in read_metrics(out)] == [0, 1, 2]


# ---------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("stage", "changes", "message"),
    [
        ("ar", {"lora": -1}, "lora must be at least 0"),
        ("ar", {"lora": 0, "lora_weights": "x"}, "lora_weights needs lora: give the rank"),
        ("ar", {"lora_targets": []}, "lora_targets is empty"),
        ("ar", {"lora_targets": ["qq"]}, "'qq' is no linear layer of a block; cross_attn.k, "),
        ("dmd", {"lora_targets": ["0.self_attn.q"]}, "'0.self_attn.q' is no linear layer of a"),
        ("dmd", {"weights": ""}, "stage dmd needs weights"),
        ("ar", {"weights": ""}, "lora needs weights"),
        ("ar", {"lora_weights": "/no/such"}, "/no/such: no such file"),
        ("dmd", {"teacher": "teacher.safetensors"}, "with lora the base is the teacher, but"),
        ("ar", {"lora_weights": "generator.safetensors"}, "give those as weights"),
    ],
)
def test_bad_configs(data, tmp_path, command, stage, changes, message):
    for key, value in changes.items():
        if str(value).endswith(".safetensors"):
            changes = {**changes, key: str(data / value)}
    keys = lora_values(data, stage, tmp_path / "out", **changes)
    assert message in refused(command, write_toml(tmp_path / "a.toml", keys))
    assert not (tmp_path / "out").exists()


def test_adapters_that_do_not_fit(data, chain, tmp_path, command):
    def line(stage="dmd", **changes):
        keys = lora_values(data, stage, tmp_path / "out", **changes)
        return refused(command, write_toml(tmp_path / "a.toml", keys))

    ar = str(chain / "ar/ar-lora")
    dmd = str(chain / "dmd/dmd-lora")
    merged = str(chain / "ar/ar.safetensors")
    assert f"{ar}/adapter_model.safetensors is of rank 4" not in line(lora=2, lora_weights=merged)
    assert "is of rank 4, lora = 2: give lora = 4" in line(lora=2, lora_weights=ar)
    text = line(lora_targets=["q"], lora_weights=ar)
    assert f"{ar} changes blocks.0." in text
    assert ", which has no adapter here: add it to lora_targets" in text
    assert f"{dmd} is of stage dmd; ar takes a release there" in line("ar", lora_weights=dmd)

    # Of the base: a causal one is no teacher; another than it was trained over is none for it.
    assert "(with lora it is the teacher too; the stage before is lora_weights)" in line(
        weights=merged
    )
    other = str(data / "teacher.safetensors")
    text = line(weights=other, lora_weights=ar)
    assert f"{ar} was trained over another base than {other}" in text

    # As weights, where it would have to be given as a LoRA.
    for path in (ar, chain / "ar/step-0000002"):
        with pytest.raises(ValueError, match="a LoRA, no model|holds no weights"):
            open_dit(path)


def test_an_adapter_of_another_trainer(data, tmp_path):
    """LongLive's .pt, without a record or an alpha: as it is, if rank and layers fit."""
    draws = torch.Generator().manual_seed(0)
    tensors = {
        f"base_model.model.{Q}.lora_A.weight": torch.randn(4, DIT.dim, generator=draws),
        f"base_model.model.{Q}.lora_B.weight": torch.randn(DIT.dim, 4, generator=draws),
    }
    torch.save({"generator_lora": tensors, "step": 3}, tmp_path / "lora.pt")
    cfg = lora_config(data, "ar", "unused", lora_weights=str(tmp_path / "lora.pt"))
    run = train.build(cfg, fsdp.World("cpu"))
    layer = run.generator.get_submodule(Q)
    assert torch.equal(layer.lora_A.weight, tensors[f"base_model.model.{Q}.lora_A.weight"])
    up = tensors[f"base_model.model.{Q}.lora_B.weight"]
    assert rel(layer.scale * layer.lora_B.weight, up) < 1e-6

    save_file(tensors | {f"{Q}.diff": torch.randn(DIT.dim, DIT.dim)}, tmp_path / "x.safetensors")
    cfg = lora_config(data, "ar", "unused", lora_weights=str(tmp_path / "x.safetensors"))
    with pytest.raises(ValueError, match="which has no adapter here"):
        train.build(cfg, fsdp.World("cpu"))


# ----------------------------------------------------------------------------------- two processes


@pytest.mark.slow
@pytest.mark.parametrize("given", ["dmd", "sid ar"])
def test_two_processes_are_one(data, chain, tmp_path, given):
    """Sharded base and adapters, which one process goes on with; through critic and teacher; in
    bfloat16.
    """
    start = {"lora_weights": str(chain / "ar/ar-lora"), "beta1": 0.5}
    stages = {"dmd": {**start, "steps": 2, "save_every": 1}, "sid": {**start, "steps": 1}}
    stages["ar"] = {"dtype": "bfloat16", "steps": 2, "beta1": 0.5}
    stages = {stage: stages[stage] for stage in given.split()}
    jobs = []
    for stage, changes in stages.items():
        keys = lora_values(data, stage, tmp_path / stage, micro_batch=1, **changes)
        jobs.append(job("train", keys))
    torchrun(2, tmp_path, jobs)

    one = tmp_path / "one"
    for stage, changes in stages.items():
        finish(lora_config(data, stage, one / stage, **changes))
        file = f"{stage}/{stage}-lora/adapter_model.safetensors"
        rounded = 0.5 if stage == "ar" else 1e-2
        assert apart(load_file(tmp_path / file), load_file(one / file), lr=1e-3) < rounded
        merged = load_file(tmp_path / stage / f"{stage}.safetensors")
        expected = load_file(one / stage / f"{stage}.safetensors")
        assert furthest(merged, expected) < 1e-2
        if stage == "ar":
            continue
        rows = zip(read_metrics(tmp_path / stage), read_metrics(one / stage), strict=True)
        for a, b in rows:
            assert without_std(a) == pytest.approx(without_std(b), rel=1e-4, abs=1e-5)

    if "dmd" not in stages:
        return
    again = tmp_path / "again"
    ignored = shutil.ignore_patterns("step-0000002", "*.safetensors")
    shutil.copytree(tmp_path / "dmd", again, ignore=ignored)
    finish(lora_config(data, "dmd", again, **stages["dmd"]))
    file = "dmd-lora/adapter_model.safetensors"
    assert apart(load_file(again / file), load_file(one / "dmd" / file), lr=1e-3) < 1e-2
