"""The stages' steps against data, by hand; what an iteration does, and who moves when."""

import pytest
import torch
from training import (
    DIT,
    PROMPTS,
    STAGES,
    apart,
    config,
    finish,
    first_batch,
    furthest,
    make_run,
    read_metrics,
    run_phase,
    same,
    watch,
    without_std,
)

import train
from wan5b import optim, stages
from wan5b.dit import WanDiT
from wan5b.extras.shards import write_shard
from wan5b.flow import ar_loss_weight, few_step_sigmas

pytestmark = pytest.mark.usefixtures("quick_and_clean")


def level_index(run: stages.Run, sigma: float) -> int:
    """The level of the few-step model that this is."""
    return min(range(len(run.sigmas)), key=lambda k: abs(run.sigmas[k] - sigma))


# ------------------------------------------------------------------------------------ against data


@pytest.mark.parametrize(
    ("stage", "changes"), [("teacher", {}), ("ar", {}), ("ar", {"bell": False, "window": 3})]
)
def test_flow_loss_by_hand(data, stage, changes):
    """What the network sees is a clip at a level a chunk (or one for all), and how its answer is
    counted.
    """
    run = make_run(data, stage, dropout=0.5, micro_batch=4, **changes)
    calls = watch(run.generator)
    loss = stages.iteration(run, 0)["loss"].item()
    (x, sigma, context), options, v = calls[0]
    assert options.get("chunks") == ([3, 3] if stage == "ar" else None)
    assert options.get("window") == changes.get("window")

    # Each caption is its clip's, or dropped.
    items = first_batch(run, "flow").items
    dropped = 0
    for row, item in zip(context, items, strict=True):
        found = [i for i in range(8) if torch.allclose(row, run.context([PROMPTS[i]])[0])]
        assert found in ([], [item]), "a caption of another clip"
        dropped += not found
    assert dropped, "no text was dropped"

    # The clean half, and the levels.
    x0 = run.clips(items)
    clean = options.get("clean")
    assert (clean is not None) == (stage == "ar")
    assert clean is None or torch.equal(clean, x0)
    chunks = sigma.split(3, 1)
    assert all((chunk == chunk[:, :1]).all() for chunk in chunks)
    assert torch.equal(*chunks) == (stage == "teacher")

    expected = 0.0
    for i in range(4):
        for frame in range(6):
            level = sigma[i, frame].item()
            target = (x[i, :, frame] - x0[i, :, frame]) / level  # noise - x0
            error = (v[i, :, frame] - target).square().mean().item()
            weight = ar_loss_weight(level).item() if run.cfg.bell else 1.0
            expected += error * weight / 24
    assert loss == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("forcing", ["teacher", "diffusion"])
def test_ode_loss_by_hand(data, tmp_path, forcing, prefix):
    """Chunks at levels of a trajectory, its end the target, counted where the level is not 0, per
    sample.
    """
    frames = 6 + prefix
    x = torch.randn(8, 5, 48, frames, 4, 4, generator=torch.Generator().manual_seed(0))
    write_shard(tmp_path / "0.safetensors", {"x": x}, PROMPTS, sigmas=few_step_sigmas())
    changes = {"frames": frames, "prefix": prefix, "trajectories": str(tmp_path), "latents": ""}
    run = make_run(data, "ode", forcing=forcing, micro_batch=4, window=3, **changes)
    calls = watch(run.generator)
    for step in range(3):
        calls.clear()
        loss = stages.iteration(run, step)["loss"].item()
        (x, sigma, _), options, v = calls[0]
        clean = options.get("clean")
        assert options["chunks"] == [1] * prefix + [3, 3]
        assert options["window"] == 3
        assert (sigma[:, :prefix] == 0).all()
        assert (clean is not None) == (forcing == "teacher")

        expected = 0.0
        for i, item in enumerate(first_batch(run, "ode", step).items):
            path = run.data.store[item]["x"]
            assert clean is None or torch.equal(clean[i], path[-1])
            errors = []
            for frame in range(frames):
                level = sigma[i, frame].item()
                start = prefix + (frame - prefix) // 3 * 3  # of the frame's chunk
                assert frame < prefix or sigma[i, frame] == sigma[i, start]
                assert torch.equal(x[i, :, frame], path[level_index(run, level), :, frame])
                if level > 0:
                    end = x[i, :, frame] - level * v[i, :, frame]
                    errors.append((end - path[-1, :, frame]).square().mean().item())
            expected += sum(errors) / max(len(errors), 1) / 4
        assert loss == pytest.approx(expected, rel=1e-4)


class NoNetwork:
    """In the generator's place: it notes the levels and answers 0."""

    cfg = DIT

    def __init__(self):
        self.sigmas = []

    def __call__(self, x, sigma, context, **options):
        self.sigmas.append(sigma)
        return torch.zeros_like(x, requires_grad=True)


@pytest.mark.parametrize(("forcing", "lowest"), [("teacher", 3), ("diffusion", 4)])
def test_ode_draws_levels_that_teach(data, forcing, lowest):
    """All alike often; level 0 only where it plays the clean context, for beside a clean half it
    has no loss.
    """
    run = make_run(data, "ode", forcing=forcing, micro_batch=4)
    run.generator = NoNetwork()
    for step in range(200):
        run_phase(run, stages.PHASES["ode"][0], step)
    levels = torch.cat(run.generator.sigmas)[:, ::3].flatten().tolist()  # of each chunk
    drawn = [level_index(run, level) for level in levels]
    counts = [drawn.count(level) for level in range(lowest + 1)]
    assert sum(counts) == len(drawn) == 200 * 4 * 2
    mean = len(drawn) / (lowest + 1)
    assert all(abs(count - mean) < 4 * mean**0.5 for count in counts), counts


class Items(list):
    """In a store's place, for clips of another size."""


FIRST = [(stage, {}) for stage in STAGES]
FIRST += [("ar", {"forcing": "diffusion"}), ("ode", {"forcing": "diffusion"})]
FIRST += [("dmd", {"rollout": "data"})]


@pytest.mark.parametrize(("stage", "changes"), FIRST)
def test_a_first_frame_is_clean_and_outside_the_loss(data, monkeypatch, stage, changes):
    """Whatever the networks say of it: no metric changes."""
    g = torch.Generator().manual_seed(0)
    clips = torch.randn(8, 48, 7, 4, 4, generator=g)
    paths = torch.randn(8, 5, 48, 7, 4, 4, generator=g)
    paths[:, -1] = clips
    items = Items({"latent": clip} for clip in clips)
    if stage == "ode":
        items = Items({"x": path} for path in paths)
        items.facts = {"sigmas": few_step_sigmas()}

    inner = WanDiT.forward
    disturbance = 0.0

    def forward(self, x, sigma, context, **options):
        v = inner(self, x, sigma, context, **options)
        cache = options.get("cache")
        if cache is not None and cache.frames > 0:
            return v  # it goes on behind a first frame

        for row in x[:, :, 0]:
            assert any(torch.equal(row, clip[:, 0]) for clip in clips), "not a clip's frame"
        level = sigma if isinstance(sigma, torch.Tensor) else torch.tensor([[sigma]])
        assert (level[:, 0] == 0).all()
        clean_level = options.get("clean_sigma")
        if isinstance(clean_level, torch.Tensor):
            assert (clean_level[:, 0] == 0).all()
        return torch.cat([v[:, :, :1] + disturbance, v[:, :, 1:]], 2)

    def metrics():
        run = make_run(data, stage, prefix=1, frames=7, **changes)
        run.data.store = items
        return {key: value.item() for key, value in stages.iteration(run, 0).items()}

    monkeypatch.setattr(train, "check_fit", lambda *_: None)  # the stores are for 6 frames
    monkeypatch.setattr(WanDiT, "forward", forward)
    plain = metrics()
    disturbance = 1000.0
    assert metrics() == plain


# --------------------------------------------------------------------------------------- iterations


@pytest.mark.parametrize("stage", STAGES)
def test_accumulation_equals_a_larger_micro_batch(data, tmp_path, stage):
    two = finish(config(data, stage, tmp_path / "two", steps=2))
    one = finish(config(data, stage, tmp_path / "one", steps=2, micro_batch=1))
    assert apart(one, two) < 1e-2
    for a, b in zip(read_metrics(tmp_path / "one"), read_metrics(tmp_path / "two"), strict=True):
        assert without_std(a) == pytest.approx(without_std(b), rel=1e-4, abs=1e-5)


def test_counts_and_order(data, monkeypatch):
    """The generator moves once in `ratio` steps, before the critic; the average from ema_start."""
    run = make_run(data, "dmd", ratio=5, steps=12, ema_start=5, ema=0.5)
    generator = run.optimizers["generator"]
    critic = run.optimizers["critic"]
    ema = {name: state["ema"] for name, state in generator.state_of.items()}
    average = {name: value.clone() for name, value in ema.items()}
    inner = optim.AdamW.step
    calls = []

    def step(self, scale, clip, ema_decay=0.0):
        norm = inner(self, scale, clip, ema_decay)
        calls.append("generator" if self is generator else "critic")
        if self is generator:
            decay = 0.5 if calls.count("critic") >= 5 else 0.0
            for name, value in average.items():
                average[name] = decay * value + (1 - decay) * self.master(name)
        return norm

    monkeypatch.setattr(optim.AdamW, "step", step)
    for i in range(12):
        stages.iteration(run, i)
    five = ["critic"] * 5
    assert calls == ["generator", *five, "generator", *five, "generator", "critic", "critic"]
    assert (generator.steps, critic.steps) == (3, 12)
    assert all("ema" not in state for state in critic.state_of.values())
    masters = {name: generator.master(name) for name in ema}
    assert furthest(ema, average) < 1e-6 < furthest(ema, masters)


@pytest.mark.parametrize("stage", STAGES)
def test_every_parameter_learns_and_the_teacher_does_not(data, stage):
    run = make_run(data, stage)

    def weights(model):
        return {name: value.clone() for name, value in model.state_dict().items()}

    def all_differ(a, b):
        return all(not torch.equal(a[name], b[name]) for name in b)

    before = weights(run.generator)
    if stage in stages.DISTILLATIONS:
        teacher = weights(run.teacher)
        critic = weights(run.critic)
        assert same(teacher, critic), "the critic starts as the teacher"
    for step in range(3):
        stages.iteration(run, step)
    assert all_differ(before, run.generator.state_dict())
    if stage in stages.DISTILLATIONS:
        assert same(teacher, run.teacher.state_dict())
        assert all(p.grad is None and not p.requires_grad for p in run.teacher.parameters())
        assert all_differ(critic, run.critic.state_dict())


def test_a_parameter_without_gradient_is_found(data):
    run = make_run(data, "ar")
    run.optimizers["generator"].parameters["forgotten"] = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(AssertionError, match="forgotten"):
        stages.iteration(run, 0)


# --------------------------------------------------------------------------------------------- data


def test_no_negative_prompt_is_trained_on(data, tmp_path):
    """Neither the config's nor the one that the embeddings were made with."""
    texts = {
        "rows": torch.randn(6, 16, dtype=torch.bfloat16),
        "lengths": torch.tensor([2, 1, 1, 2]),
    }
    prompts = ["old", "", "a", "neg"]
    write_shard(tmp_path / "0.safetensors", texts, prompts, negative="old")
    run = make_run(data, "dmd", text=str(tmp_path), negative="neg")
    assert run.data.prompts == ["a"]


def test_only_the_stage_s_own_data_counts(data):
    """Captions come with the clips that are trained on, whatever else the config names."""
    run = make_run(data, "ar", trajectories="/no/such")
    assert run.data.prompts == PROMPTS
    assert torch.equal(run.clips([3])[0], run.data.store[3]["latent"])
