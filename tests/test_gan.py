"""The GAN branch: losses, features, what carries grad; what is trained, saved and counted."""

import math
import shutil

import pytest
import torch
from common import rel
from safetensors.torch import load_file
from test_distillation import a_rollout, rollout_with_grad
from training import (
    DIT,
    apart,
    checkpoint_state,
    config,
    finish,
    first_batch,
    furthest,
    make_run,
    read_metrics,
    refused,
    run_phase,
    same,
    values,
    without_std,
    write_toml,
)

from wan5b import stages
from wan5b.distill import dmd_gradient
from wan5b.dit import Block, WanDiT
from wan5b.extras import gan
from wan5b.extras.checks import note_ignored
from wan5b.flow import add_noise, x0_from_v

pytestmark = pytest.mark.usefixtures("quick_and_clean")

GAN = {"gan_weight": 0.5, "gan_critic_weight": 0.25}
ALL = GAN | {"gan_relativistic": True, "gan_r1": 0.1, "gan_r2": 0.2, "data_forcing": 1.0}

# ------------------------------------------------------------------------------------------- losses


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def test_losses_by_hand():
    fake = torch.tensor([1.0, -2.0])
    real = torch.tensor([0.5, 3.0])
    assert gan.fooling_loss(fake).item() == pytest.approx((softplus(-1) + softplus(2)) / 2)
    relativistic = (softplus(-0.5) + softplus(5)) / 2  # fake is .5 above its clip, and 5 below
    assert gan.fooling_loss(fake, real).item() == pytest.approx(relativistic)

    plain = (softplus(1) + softplus(-2)) / 2 + (softplus(-0.5) + softplus(-3)) / 2
    assert gan.telling_loss(fake, real, relativistic=False).item() == pytest.approx(plain)
    relativistic = (softplus(0.5) + softplus(-5)) / 2
    assert gan.telling_loss(fake, real, relativistic=True).item() == pytest.approx(relativistic)


def test_slope_of_a_linear_classifier():
    """Along a direction it is exact; over many directions its mean is the squared gradient."""
    g = torch.Generator().manual_seed(0)
    gradient = torch.randn(3, 4, generator=g, dtype=torch.float64)

    def logits(x):
        return (x * gradient).sum((1, 2))

    x, noise = torch.randn(2, 4000, 3, 4, generator=g, dtype=torch.float64)
    there = logits(x + 0.01 * noise)
    told = gan.slope(logits(x[:1]), there[:1]).item()
    assert told == pytest.approx((noise[0] * gradient).sum().item() ** 2, rel=1e-6)

    squared = gradient.square().sum().item()
    told = gan.slope(logits(x), there).item()
    assert abs(told - squared) < 4 * squared * (2 / 4000) ** 0.5  # four standard deviations


# ----------------------------------------------------------------------------------------- features


@pytest.mark.parametrize("checkpointing", [False, True])
def test_features_are_what_blocks_return(monkeypatch, checkpointing):
    """Noted by each block's own function; the velocity is the untapped network's."""
    inner = Block.forward
    returned = []
    ran = []

    def forward(self, *args):
        ran.append(self)
        h = inner(self, *args)
        returned.append(h)
        return h

    monkeypatch.setattr(Block, "forward", forward)
    model = WanDiT(DIT).init_weights(torch.Generator().manual_seed(0))
    model.checkpointing = checkpointing
    x, context = torch.randn(2, 48, 6, 4, 4), torch.randn(2, 8, 16)
    plain = model(x, 0.5, context)

    ran.clear()
    returned.clear()
    with gan.tapped(model, (1, 0, 1)):
        v, features = model(x, 0.5, context)
    assert torch.equal(v, plain)
    assert [h.shape for h in features] == [(2, 6, 4, 32)] * 3
    assert all(torch.equal(h, returned[i]) for h, i in zip(features, (1, 0, 1), strict=True))

    # Outside, and in a backward that runs blocks again, nothing is tapped.
    sum(h.square().mean() for h in features).backward()
    assert model.blocks[0].ffn[0].weight.grad.abs().sum() > 0
    assert torch.equal(model(x, 0.5, context), plain)
    assert len(ran) == (6 if checkpointing else 4)
    assert not any(block._forward_hooks for block in model.blocks)
    assert not model._forward_hooks


def test_layers():
    assert gan.layers_read((), 30) == (13, 21, 29)
    assert gan.layers_read((), 3) == (0, 1, 2)
    assert gan.layers_read((), 1) == (0, 0, 0)
    assert gan.layers_read((5, 0, 2), 6) == (5, 0, 2)


def test_classifier_by_hand(data):
    """Reading of one layer, with one head's arithmetic written out."""
    run = make_run(data, "dmd", **GAN)
    reader = run.critic.classifier.blocks[1]
    x = torch.randn(2, 6, 4, 32)
    h = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
    h = h.flatten(1, 2)  # [B, S, D]
    a = reader.attention

    def rms(y):
        return y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    keys = rms(h @ a.k.weight.T).unflatten(-1, (2, 16))
    query = rms(reader.register @ a.q.weight.T).unflatten(-1, (2, 16))[0]  # [N, K]
    weights = (torch.einsum("nk,bsnk->bsn", query, keys) / 4).softmax(1)
    values = (h @ a.v.weight.T).unflatten(-1, (2, 16))
    read = torch.einsum("bsn,bsnk->bnk", weights, values).flatten(1)
    expected = reader.register + read @ a.o.weight.T
    assert rel(reader(x), expected) < 1e-5


# ---------------------------------------------------------------------------------------- gradients


def both(run: stages.Run, xs: torch.Tensor, sigma: torch.Tensor, context: torch.Tensor):
    """v and logits, the features noted by hooks of this test's own."""
    features = {}

    def note(i, block, args, h):
        features[i] = h

    hooks = []
    for i, block in enumerate(run.critic.blocks):
        hooks.append(block.register_forward_hook(lambda *args, i=i: note(i, *args)))
    v = run.critic(xs, sigma, context)
    for hook in hooks:
        hook.remove()
    return v, run.critic.classifier([features[i] for i in run.critic.classifier.layers])


@pytest.mark.parametrize("changes", [GAN, ALL])
def test_gradient_of_the_generator_by_hand(data, changes):
    """d loss / d x0, of DMD and through the features, chained through one rollout with grad."""
    run = make_run(data, "dmd", micro_batch=4, guidance=2.0, checkpointing=False, **changes)
    optimizer = run.optimizers["generator"]
    (figures,) = run_phase(run, run.phases[0], step=1)
    caught = dict(optimizer.grads)
    optimizer.grads.clear()
    assert not run.optimizers["critic"].grads
    assert all(p.grad is None for p in run.critic.parameters())

    batch, rolled = a_rollout(run, 1)
    x0 = rolled.x0.requires_grad_()
    noise = batch.draws(torch.randn, *x0.shape[1:])
    u = batch.draws(torch.rand, 1)
    sigma = (5 * u / (1 + 4 * u)).clamp(0.02, 0.98).expand(-1, 6)
    xs = add_noise(x0, noise, sigma)
    clip = add_noise(run.clips(batch.items), noise, sigma)

    v, fake_logit = both(run, xs, sigma, batch.context)
    _, real_logit = both(run, clip, sigma, batch.context)
    margin = fake_logit - real_logit if run.cfg.gan_relativistic else fake_logit
    fooling = torch.nn.functional.softplus(-margin).mean()
    assert figures["gan_loss"].item() == pytest.approx(fooling.item(), rel=1e-4)

    shown = clip if run.cfg.data_forcing else xs.detach()
    real = [
        x0_from_v(shown, run.teacher(shown, sigma, context), sigma)
        for context in (batch.context, run.context(["neg"] * 4))
    ]
    dmd = dmd_gradient(x0, x0_from_v(xs, v, sigma), *real, 2.0) / x0.numel()
    (adversarial,) = torch.autograd.grad(0.5 * fooling, x0)
    assert adversarial.norm() > 1e-3 * dmd.norm(), "nothing comes through the features"
    share = adversarial.abs().mean() / dmd.abs().mean()
    told = figures["gan_gradient"] / figures["gradient"]
    assert told.item() == pytest.approx(share.item(), rel=1e-3)
    torch.cat(rollout_with_grad(run, 1), 2).backward(dmd + adversarial)
    assert furthest(caught, optimizer.grads) < 1e-4


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("changes", [GAN, ALL])
def test_gradient_of_the_critic_by_hand(data, changes, checkpointing):
    """In one graph, rollouts and clips as one batch."""
    run = make_run(data, "dmd", micro_batch=4, checkpointing=checkpointing, **changes)
    optimizer = run.optimizers["critic"]
    (figures,) = run_phase(run, run.phases[1])
    caught = dict(optimizer.grads)
    optimizer.grads.clear()

    batch = first_batch(run, "critic")
    x0 = stages.roll_out(run, batch).x0
    noise = batch.draws(torch.randn, *x0.shape[1:])
    u = batch.draws(torch.rand, 1)
    sigma = (5 * u / (1 + 4 * u)).clamp(0.02, 0.98).expand(-1, 6)
    clip = run.clips(batch.items)
    twice = torch.cat([x0, clip]), torch.cat([noise, noise]), torch.cat([sigma, sigma])
    xs = add_noise(*twice)
    v, logits = both(run, xs, twice[2], torch.cat([batch.context, batch.context]))
    fake, real = logits.chunk(2)

    softplus = torch.nn.functional.softplus
    telling = softplus(fake).mean() + softplus(-real).mean()
    loss = (v[:4] - (noise - x0)).square().mean()
    if run.cfg.gan_relativistic:
        telling = softplus(fake - real).mean()
        for name, logit, x in (("gan_r1", real, xs[4:]), ("gan_r2", fake, xs[:4])):
            moved = x + 0.01 * batch.draws(torch.randn, *x.shape[1:])
            slope = ((both(run, moved, sigma, batch.context)[1] - logit) / 0.01).square().mean()
            assert figures[name].item() == pytest.approx(slope.item(), rel=1e-2)
            loss = loss + getattr(run.cfg, name) * slope
    assert figures["gan_critic_loss"].item() == pytest.approx(telling.item(), rel=1e-4)
    right = (fake <= 0).sum() + (real > 0).sum()
    assert figures["gan_right"].item() == right.item() / 8
    (loss + 0.25 * telling).backward()
    assert caught.keys() == optimizer.parameters.keys()

    # Differences of logits do not know their common bias; over .01 they lose two digits.
    bar = 1e-4
    if run.cfg.gan_relativistic:
        bar = 1e-2
        bias = "classifier.logit.bias"
        assert max(caught.pop(bias).abs(), optimizer.grads.pop(bias).abs()) < 1e-4
    assert furthest(caught, optimizer.grads) < bar


def test_it_learns_to_tell(data, monkeypatch):
    """Clips against fakes that stay the same, at all levels."""
    changes = {"gan_weight": 1.0, "gan_critic_weight": 1.0, "shift": 1.0, "micro_batch": 4}
    run = make_run(data, "dmd", critic_lr=1e-3, **changes)

    def fakes(run, batch):
        return stages.Rolled(run.clips(batch.items) + 1, None, [], 0, 1.0)

    monkeypatch.setattr(stages, "roll_out", fakes)
    right = []
    for step in range(1, 41, 2):  # the generator's turn is every second step
        right.append(stages.iteration(run, step)["gan_right"].item())
    assert right[0] < 0.8
    assert sum(right[-10:]) / 10 > 0.9


# --------------------------------------------------------------------------------- a run, and after


def test_every_parameter_learns(data):
    run = make_run(data, "dmd", **ALL)
    before = {name: p.detach().clone() for name, p in run.critic.named_parameters()}
    assert sum(name.startswith("classifier.") for name in before) > 20
    for step in range(3):
        stages.iteration(run, step)
    after = dict(run.critic.named_parameters())
    assert all(not torch.equal(before[name], after[name]) for name in before)


def test_accumulation_equals_a_larger_micro_batch(data, tmp_path):
    two = finish(config(data, "dmd", tmp_path / "two", steps=2, **GAN))
    one = finish(config(data, "dmd", tmp_path / "one", steps=2, micro_batch=1, **GAN))
    assert apart(one, two) < 1e-2
    states = [checkpoint_state(tmp_path / name / "step-0000002") for name in ("one", "two")]
    assert apart(*states) < 1e-2
    for a, b in zip(read_metrics(tmp_path / "one"), read_metrics(tmp_path / "two"), strict=True):
        assert without_std(a) == pytest.approx(without_std(b), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_it_goes_on_as_if_not_stopped(data, tmp_path, dtype):
    """Bit for bit, the classifier and its optimizer's state too; the export holds nothing of it."""
    cfg = config(data, "dmd", tmp_path / "straight", dtype=dtype, **ALL)
    straight = finish(cfg)
    plain = finish(config(data, "dmd", tmp_path / "plain", steps=1))
    assert straight.keys() == plain.keys()

    ignored = shutil.ignore_patterns("step-0000004", "*.safetensors")
    shutil.copytree(tmp_path / "straight", tmp_path / "again", ignore=ignored)
    assert same(finish(config(data, "dmd", tmp_path / "again", dtype=dtype, **ALL)), straight)
    state = checkpoint_state(tmp_path / "straight/step-0000004")
    assert same(checkpoint_state(tmp_path / "again/step-0000004"), state)
    assert {name.split(".")[1] for name in state if ".classifier." in name} == {
        "master",
        "exp_avg_sq",
    }
    assert all(name.startswith("critic.") for name in state if "classifier" in name)
    assert read_metrics(tmp_path / "again") == read_metrics(tmp_path / "straight")
    assert load_file(tmp_path / "again/dmd.safetensors").keys() == plain.keys()


# ----------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latents": ""}, "gan_weight and data_forcing take real clips: name latents"),
        ({"gan_layers": [0, 1]}, "gan_layers must name 3 layers of the critic, 0 to 1, got [0, 1]"),
        ({"gan_layers": [0, 1, 2]}, "layers of the critic, 0 to 1, got [0, 1, 2]"),
        ({"gan_weight": -1.0}, "gan_weight must be at least 0"),
        ({"gan_critic_weight": 0.0}, "gan_critic_weight must be at least 1e-06"),
        ({"frames": 9}, "this run needs latent (48, 9, 4, 4)"),
        (
            {"lora": 4, "teacher": ""},
            "gan_weight trains all of its classifier, lora adapters alone",
        ),
    ],
)
def test_refusals(data, tmp_path, command, changes, message):
    keys = values(data, "dmd", tmp_path / "out", **{"gan_weight": 0.01, **changes})
    assert message in refused(command, write_toml(tmp_path / "a.toml", keys))
    assert not (tmp_path / "out").exists()


def test_keys_without_effect_are_named(data, capsys):
    def said(stage, **changes):
        note_ignored(config(data, stage, **changes), 0)
        return capsys.readouterr().err

    assert said("dmd", **ALL) == ""
    assert said("dmd", gan_r1=1.0) == "note: gan_r1 has no effect without gan_weight\n"
    assert said("sid", gan_weight=1.0) == "note: gan_weight has no effect in stage sid\n"
    run = make_run(data, "sid", gan_weight=1.0)
    assert run.critic.state_dict().keys() == WanDiT(DIT).state_dict().keys()
