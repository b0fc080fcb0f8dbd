"""Data-Forcing: in a share of the generator's steps the teacher scores the real clip."""

import dataclasses
import json

import pytest
import torch
from test_distillation import a_rollout, rollout_with_grad
from training import (
    apart,
    config,
    finish,
    furthest,
    make_run,
    read_metrics,
    refused,
    run_phase,
    same,
    values,
    watch,
    without_std,
    write_toml,
)

from wan5b import stages
from wan5b.extras.data_forcing import is_forced

pytestmark = pytest.mark.usefixtures("quick_and_clean")


class Linear:
    """In a network's place: v = a x + b."""

    def __init__(self, a: float, b: float):
        self.a = a
        self.b = b

    def __call__(self, x, sigma, context):
        return self.a * x + self.b


def test_gradient_on_linear_networks(data, monkeypatch):
    """By the numbers: rollout 2, clip 5, noise 1, level .5."""
    run = make_run(data, "dmd", data_forcing=1.0, guidance=1.0)
    run.critic = Linear(0.5, 0.0)
    run.teacher = Linear(0.25, 1.0)
    like = torch.ones(2, 48, 6, 4, 4)
    monkeypatch.setattr(run, "clips", lambda items: 5 * like)
    rolled = stages.Rolled(2 * like, None, [2 * like], 0, run.sigmas[0])
    noised = stages.Noised(1.5 * like, torch.full((2, 6), 0.5), like)
    monkeypatch.setattr(stages, "roll_out", lambda run, batch: rolled)
    monkeypatch.setattr(stages, "noise_again", lambda run, batch, rolled: noised)
    given = {}
    monkeypatch.setattr(stages, "into_weights", lambda *args: given.update(loss=args[3]))
    figures = run_phase(run, run.phases[0])[0]

    # The critic sees .5 * 2 + .5 * 1 = 1.5 and answers .75: x0 = 1.5 - .5 * .75. The teacher sees
    # .5 * 5 + .5 * 1 = 3 and answers 1.75: x0 = 3 - .5 * 1.75. The gradient is over |2 - 2.125|.
    fake = 1.125
    real = 2.125
    gradient = (fake - real) / abs(2 - real)
    assert figures["gradient"].item() == pytest.approx(abs(gradient))
    assert figures["forced"].item() == 1.0
    assert given["loss"].item() == pytest.approx(0.5 * gradient**2)
    (grad,) = torch.autograd.grad(given["loss"], rolled.x0)
    assert torch.allclose(grad * grad.numel(), torch.full_like(grad, gradient))


@pytest.mark.parametrize("mode", ["self", "data"])
def test_what_the_networks_see(data, mode):
    """The critic the noised rollout; the teacher the clip, with its noise and at its level."""
    changes = {"rollout": mode, "latents": str(data / "latents")}
    run = make_run(data, "dmd", micro_batch=4, data_forcing=1.0, **changes)
    critic = watch(run.critic)
    teacher = watch(run.teacher)
    seen = []
    for step in range(6):
        critic.clear()
        teacher.clear()
        run_phase(run, run.phases[0], step)
        batch, rolled = a_rollout(run, step)
        (xs, sigma, _), _, _ = critic[0]
        clip = run.clips(batch.items)[:, :, : xs.shape[2]]
        whole = rolled.x0
        if rolled.prefix is not None:
            whole = torch.cat([rolled.prefix, rolled.x0], 2)
        level = sigma[:, None, :, None, None]
        noise = (xs - (1 - level) * whole) / level
        assert len(teacher) == 2, "with text and without"
        for (shown, at, _), _, _ in teacher:
            assert torch.equal(at, sigma)
            assert torch.allclose(shown, (1 - level) * clip + level * noise, atol=1e-5)
        seen.append(xs.shape[2])
    assert set(seen) == {6}


def test_a_share_of_the_steps(data):
    """One draw for all samples of a step; the others are dmd's, exit levels and all."""
    run = make_run(data, "dmd", micro_batch=2, data_forcing=0.25)
    forced = 0
    for step in range(400):
        drawn = set()
        for batch in stages.micro_batches(run, "generator", step, moved=False):
            int(torch.randint(len(run.sigmas) - 1, (), generator=batch.chance))  # as roll_out does
            drawn.add(is_forced(run, batch))
        assert len(drawn) == 1
        forced += drawn.pop()
    assert abs(forced - 100) < 4 * (400 * 0.25 * 0.75) ** 0.5

    plain = make_run(data, "dmd", ratio=1)
    some = make_run(data, "dmd", ratio=1, data_forcing=0.5)
    kinds = set()
    for step in range(8):
        (ours, *_) = run_phase(some, some.phases[0], step)
        (theirs, *_) = run_phase(plain, stages.PHASES["dmd"][0], step)
        grads = [dict(each.optimizers["generator"].grads) for each in (some, plain)]
        for each in (some, plain):
            each.optimizers["generator"].grads.clear()
        assert ours["x0_std_0"] == theirs["x0_std_0"]
        forced = bool(ours["forced"])
        assert (furthest(*grads) == 0) == (not forced)
        kinds.add(forced)
    assert kinds == {True, False}


def test_gradient_of_the_generator_by_hand(data):
    """Chained through one rollout with grad."""
    run = make_run(data, "dmd", micro_batch=4, data_forcing=1.0, guidance=2.0, checkpointing=False)
    optimizer = run.optimizers["generator"]
    run_phase(run, run.phases[0], step=1)
    caught = dict(optimizer.grads)
    optimizer.grads.clear()

    batch, rolled = a_rollout(run, 1)
    x0 = rolled.x0
    noise = batch.draws(torch.randn, *x0.shape[1:])
    u = batch.draws(torch.rand, 1)
    sigma = (5 * u / (1 + 4 * u)).clamp(0.02, 0.98)[:, :, None, None, None]

    def clean(model, x, text):
        xs = (1 - sigma) * x + sigma * noise
        return (xs - sigma * model(xs, sigma[:, 0, 0, 0, 0], text)).detach()

    fake = clean(run.critic, x0, batch.context)
    clip = run.clips(batch.items)
    real = clean(run.teacher, clip, batch.context)
    unconditional = clean(run.teacher, clip, run.context(["neg"] * 4))
    real = real + 2 * (real - unconditional)
    scale = (x0 - real).abs().mean((1, 2, 3, 4), keepdim=True)
    torch.cat(rollout_with_grad(run, 1), 2).backward((fake - real) / scale / x0.numel())
    assert furthest(caught, optimizer.grads) < 1e-4


def test_a_run(data, tmp_path):
    """Micro-batches do not matter."""
    changes = {"steps": 2, "ratio": 1}
    two = finish(config(data, "dmd", tmp_path / "two", data_forcing=0.5, **changes))
    one = finish(config(data, "dmd", tmp_path / "one", data_forcing=0.5, micro_batch=1, **changes))
    assert apart(one, two) < 1e-2
    for a, b in zip(read_metrics(tmp_path / "one"), read_metrics(tmp_path / "two"), strict=True):
        assert without_std(a) == pytest.approx(without_std(b), rel=1e-4, abs=1e-5)
    plain = finish(config(data, "dmd", tmp_path / "plain", **changes))
    assert not same(two, plain)


def test_a_checkpoint_that_does_not_know_the_key(data, tmp_path):
    """It is of an earlier version: a run goes on from it without Data-Forcing, not with it."""
    plain = config(data, "dmd", tmp_path, steps=2, latents=str(data / "latents"))
    finish(plain)
    (tmp_path / "dmd.safetensors").unlink()
    facts = tmp_path / "step-0000002/facts.json"
    known = json.loads(facts.read_text())
    del known["training"]["data_forcing"]
    facts.write_text(json.dumps(known))

    forced = dataclasses.replace(plain, data_forcing=0.5)
    with pytest.raises(ValueError, match="another data_forcing .0.0, now 0.5.; choose another out"):
        finish(forced)
    finish(dataclasses.replace(plain, steps=3))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latents": ""}, "gan_weight and data_forcing take real clips: name latents"),
        ({"data_forcing": 1.5}, "a share of the generator's steps, 0 to 1, got 1.5"),
        ({"data_forcing": -0.5}, "data_forcing must be at least 0"),
        ({"latents": "/no/such"}, "/no/such is no folder"),
    ],
)
def test_refusals(data, tmp_path, command, changes, message):
    keys = values(data, "dmd", tmp_path / "out", **{"data_forcing": 0.5, **changes})
    assert message in refused(command, write_toml(tmp_path / "a.toml", keys))
    assert not (tmp_path / "out").exists()
