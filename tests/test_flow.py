"""Levels, noising, loss weight and solvers against the reference's vectors and against exact
solutions.
"""

import math

import pytest
import torch
from common import golden, randn, rel

from wan5b.flow import (
    add_noise,
    ar_loss_weight,
    few_step_sigmas,
    sampling_sigmas,
    shift_sigma,
    solve,
    v_from_x0,
    x0_from_v,
)


def test_schedule_vectors():
    g, config = golden("flow_schedule")
    n, shift = config["num_train_timesteps"], config["shift"]
    sigmas = shift_sigma(torch.arange(n, 0, -1, dtype=torch.float64) / n, shift)
    assert rel(sigmas, g["out.sigmas"]) < 1e-6
    assert rel(1000 * sigmas, g["out.timesteps"]) < 1e-6
    assert (
        rel(1000 * torch.tensor(few_step_sigmas()[:-1]), g["out.warped_steps_1000_750_500_250"])
        < 1e-6
    )
    assert rel(add_noise(g["in.x0"], g["in.noise"], g["in.t"] / 1000), g["out.noisy"]) < 1e-6
    assert rel(ar_loss_weight(sigmas, shift), g["out.training_weights"]) < 1e-5
    assert rel(ar_loss_weight(g["in.t"] / 1000, shift), g["out.weight"]) < 1e-5
    assert float(ar_loss_weight(g["in.t"][5].item() / 1000)) == pytest.approx(
        g["out.weight"][5].item(), rel=1e-5
    )


def test_few_step_levels():
    assert few_step_sigmas() == pytest.approx([1, 0.9375, 5 / 6, 0.625, 0], abs=1e-15)
    assert few_step_sigmas((1000, 500), shift=1.0) == [1.0, 0.5, 0.0]


@pytest.mark.parametrize(
    "sigma", [0.3, torch.tensor([0.25, 0.75]), torch.tensor([[0.1, 0.2, 1.0], [0.4, 0.9, 0.6]])]
)
def test_conversions_for_every_shape_of_sigma(sigma):
    x0, noise = randn(2, 4, 3, 2, 2), randn(2, 4, 3, 2, 2, seed=1)
    x = add_noise(x0, noise, sigma)
    table = torch.as_tensor(sigma).reshape(-1, 1) if torch.as_tensor(sigma).ndim < 2 else sigma
    for b in range(2):
        for t in range(3):
            s = float(table.expand(2, 3)[b, t])
            torch.testing.assert_close(x[b, :, t], (1 - s) * x0[b, :, t] + s * noise[b, :, t])
    torch.testing.assert_close(v_from_x0(x, x0, sigma), noise - x0, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(x0_from_v(x, noise - x0, sigma), x0, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "sigma", [0.3, torch.tensor(0.3), torch.tensor([0.3]), torch.full((1, 3), 0.3)]
)
def test_conversions_are_float32_for_bfloat16_latents(sigma):
    x, v = randn(1, 4, 3, 2, 2).bfloat16(), randn(1, 4, 3, 2, 2, seed=1).bfloat16()
    for result, expected in (
        (x0_from_v(x, v, sigma), x.float() - 0.3 * v.float()),
        (add_noise(x, v, sigma), 0.7 * x.float() + 0.3 * v.float()),
    ):
        assert result.dtype == torch.float32
        assert rel(result, expected) < 1e-6
    assert add_noise(x, v, 1).dtype == torch.float32


@pytest.mark.parametrize(("n", "shift"), [(5, 5.0), (12, 3.0), (20, 5.0)])
def test_unipc_vectors(n, shift):
    g, name = golden("unipc")[0], f"{n}_{shift:.0f}"
    points, timesteps = [], []

    def field(x, sigma):
        points.append(x)
        timesteps.append(1000 * sigma)
        return 0.8 * torch.sin(1.7 * x) + 0.3 * x + 0.5 * sigma

    sigmas = sampling_sigmas(n, shift)
    points.append(solve(field, g["in.x"], sigmas))
    assert torch.tensor(sigmas).allclose(g[f"out.sigmas_{name}"], atol=1e-6, rtol=0)
    assert [round(t, 6) for t in timesteps] == g[
        f"out.timesteps_{name}"
    ].tolist()  # whole numbers, one call a step
    trajectory = g[f"out.trajectory_{name}"]
    assert len(points) == len(trajectory) + 1  # the first is in.x
    for ours, reference in zip(points[1:], trajectory, strict=True):
        assert rel(ours, reference) < 1e-5


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("unipc", 2)])
def test_solver_converges_to_the_exact_solution(solver, order):
    """dx/dsigma = a x + c from sigma 1 to 0, whose solution is known; halving the step divides the
    error by 2^order.
    """
    a, c, x = 1.3, 0.4, randn(1, 4, 2, 2, 2).double()
    exact = (x + c / a) * math.exp(-a) - c / a
    errors = [
        rel(
            solve(
                lambda x, _: a * x + c, x, few_step_sigmas(range(1000, 0, -1000 // n), 1.0), solver
            ),
            exact,
        )
        for n in (20, 40)
    ]
    assert errors[0] < 0.1**order
    assert errors[0] / errors[1] > 0.8 * 2**order


def test_euler_is_exact_on_straight_paths():
    x0, noise = randn(1, 4, 2, 2, 2), randn(1, 4, 2, 2, 2, seed=1)
    assert (
        rel(solve(lambda x, sigma: v_from_x0(x, x0, sigma), noise, few_step_sigmas(), "euler"), x0)
        < 1e-6
    )


def test_unipc_from_pure_noise():
    """log-SNR is -inf at sigma 1: the result must be the limit of starting ever closer to it."""
    x, tail = randn(1, 4, 2, 2, 2).double(), few_step_sigmas()[1:]

    def run(start):
        return solve(lambda x, sigma: torch.sin(x), x, [start, *tail])

    assert run(1.0).isfinite().all()
    assert rel(run(1 - 1e-12), run(1.0)) < rel(run(1 - 1e-3), run(1.0)) < 1e-2
    assert torch.equal(solve(lambda x, sigma: 0.5 * x, x, [1.0, 0.0]), 0.5 * x)


@pytest.mark.parametrize("steps", [(), (500, 750), (1001, 500), (750, 750), (500, 0)])
def test_bad_steps_are_named(steps):
    with pytest.raises(ValueError, match="steps must fall within") as error:
        few_step_sigmas(steps)
    assert str(list(steps)) in str(error.value)


def test_bad_solver_and_step_count_are_named():
    with pytest.raises(ValueError, match="heun"):
        solve(torch.sin, torch.zeros(1), [1.0, 0.0], "heun")
    with pytest.raises(ValueError, match="got 0"):
        sampling_sigmas(0)
