"""Distillation losses: the reference's vectors, and where gradients run."""

import pytest
import torch
from common import frames_first, golden, rel

from wan5b.distill import critic_loss, dmd_gradient, dmd_loss, sid_loss
from wan5b.flow import add_noise, v_from_x0


@pytest.fixture
def g():
    tensors, config = golden("losses")
    tensors = {
        key: frames_first(value) if value.ndim == 5 else value for key, value in tensors.items()
    }
    return {**{key.split(".")[1]: value for key, value in tensors.items()}, **config}


def estimates(g, *names):
    """x0, fake, real_cond, real_uncond; those named require grad, in float64."""
    wanted = ("x0", "x0_fake", "x0_real_cond", "x0_real_uncond")
    return [g[name].double().requires_grad_() if name in names else g[name] for name in wanted]


def test_vectors(g):
    grad = dmd_gradient(*estimates(g), g["guidance"])
    assert rel(grad, g["dmd_grad"]) < 1e-5
    assert rel(dmd_loss(g["x0"], grad), g["dmd_loss"]) < 1e-5
    assert rel(sid_loss(*estimates(g), g["guidance"], g["sid_alpha"]), g["sid_loss"]) < 1e-5
    noisy = add_noise(g["x0"], g["noise"], g["sigma"])
    assert rel(noisy, g["noisy"]) < 1e-5
    v_fake = v_from_x0(noisy, g["x0_fake"], g["sigma"])
    assert rel(critic_loss(v_fake, g["x0"], g["noise"]), g["critic_flow_loss"]) < 1e-5


def test_dmd_loss_hands_its_gradient_to_x0_alone(g):
    x0, fake, *real = estimates(g, "x0", "x0_fake")
    grad = dmd_gradient(x0, fake, *real, g["guidance"])
    assert not grad.requires_grad
    dmd_loss(x0, grad).backward()
    assert rel(x0.grad, grad / x0.numel()) < 1e-6
    assert fake.grad is None


def test_dmd_gradient_is_normalised_per_sample_and_free_of_nan(g):
    x0, fake, cond, uncond = estimates(g)
    grad = dmd_gradient(x0, fake, cond, uncond, 3.0)
    for b in range(2):
        assert (
            rel(
                dmd_gradient(*(x[b : b + 1] for x in (x0, fake, cond, uncond)), 3.0),
                grad[b : b + 1],
            )
            < 1e-6
        )
    same = [
        torch.cat([x0[:1], x[1:]]) for x in (fake, cond, uncond)
    ]  # sample 0: everybody agrees, 0 / 0
    grad = dmd_gradient(x0, *same, 3.0)
    assert torch.equal(grad[0], torch.zeros_like(grad[0]))
    assert grad[1].count_nonzero() > 0


@pytest.mark.parametrize("place", [1, 2, 3], ids=["fake", "real_cond", "real_uncond"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_a_network_that_is_not_finite_shows_in_the_gradient(g, place, value):
    """So the run ends: a gradient of zeros in its place would train on without a word."""
    inputs = estimates(g)
    inputs[place] = inputs[place].clone()
    inputs[place][0, 0, 0, 0, 0] = value
    grad = dmd_gradient(*inputs, 3.0)
    assert not grad[0].isfinite().all()
    assert grad[1].isfinite().all()


@pytest.mark.parametrize("alpha", [1.0, 1.2])
def test_sid_gradient_runs_through_both_networks(g, alpha):
    """The derivative by hand in x0, fake and real, with the normaliser as a constant."""
    inputs = x0, fake, cond, uncond = estimates(
        g, "x0", "x0_fake", "x0_real_cond", "x0_real_uncond"
    )
    sid_loss(*inputs, 3.0, alpha).backward()
    with torch.no_grad():
        real = cond + 3.0 * (cond - uncond)
        scale = x0.numel() * (x0 - real).abs().flatten(1).mean(1).view(-1, 1, 1, 1, 1)
        d_real = ((real - x0) - alpha * (real - fake) + (1 - alpha) * (real - fake)) / scale
        d_fake = (-((real - x0) - alpha * (real - fake)) + alpha * (real - fake)) / scale
        expected = [-(real - fake) / scale, d_fake, 4.0 * d_real, -3.0 * d_real]
    for x, derivative in zip(inputs, expected, strict=True):
        assert rel(x.grad, derivative) < 1e-6


def test_critic_loss_is_float32_and_differentiable(g):
    v = v_from_x0(g["noisy"], g["x0_fake"], g["sigma"]).bfloat16().requires_grad_()
    loss = critic_loss(v, g["x0"].bfloat16(), g["noise"].bfloat16())
    assert loss.dtype == torch.float32
    loss.backward()
    target = g["noise"].bfloat16().float() - g["x0"].bfloat16().float()
    assert rel(v.grad.float(), 2 * (v.float() - target) / v.numel()) < 1e-2
