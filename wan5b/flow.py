"""Rectified-flow maths on sigma in [0, 1]: levels, noising, conversions, solvers. Plain functions,
no state.

Convention: x_sigma = (1 - sigma) * x0 + sigma * noise; the network predicts v = noise - x0.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

# The un-shifted levels of the distilled generator, in thousandths.
FEW_STEPS = (1000, 750, 500, 250)
SOLVERS = ("unipc", "euler", "renoise")

# ------------------------------------------------------------------------------------------- levels


def shift_sigma(u, shift: float = 5.0):
    """Timestep shift s*u / (1 + (s-1)*u) towards noise, of a float or a tensor (SD3, arXiv
    2403.03206, eq. 23).
    """
    return shift * u / (1 + (shift - 1) * u)


def few_step_sigmas(steps=FEW_STEPS, shift: float = 5.0) -> list[float]:
    """Levels of few-step sampling: each step in thousandths, shifted, then 0. Default 1, .9375,
    .8333, .625, 0.

    Raises ValueError unless the steps fall within 1000 >= step > 0.
    """
    falling = all(a > b for a, b in pairwise([*steps, 0]))
    if not steps or not falling or steps[0] > 1000:
        raise ValueError(
            f"steps must fall within 1000 >= step > 0, as {list(FEW_STEPS)} do; got {list(steps)}"
        )
    return [shift_sigma(step / 1000, shift) for step in steps] + [0.0]


def sampling_sigmas(n: int, shift: float = 5.0) -> list[float]:
    """Levels of n-step ODE sampling: n + 1 values from about 1 down to 0."""
    if n < 1:
        raise ValueError(f"sampling needs at least one step, got {n}")
    return [shift_sigma(0.999 * (1 - i / n), shift) for i in range(n)] + [0.0]


def ar_loss_weight(sigma, shift: float = 5.0) -> Tensor:
    """Bell-shaped weight of the flow loss at any sigma (float or tensor), mean 1 over the 1000
    training levels.

    exp(-2 ((1000 sigma - 500) / 1000)^2) minus its minimum over the shifted table, scaled: 0 at
    sigma = 1.
    """

    def bell(s):
        return torch.exp(-2 * (s.double() - 0.5) ** 2)

    levels = torch.arange(1000, 0, -1, dtype=torch.float64) / 1000
    table = bell(shift_sigma(levels, shift))
    weight = bell(torch.as_tensor(sigma)) - table.min()
    return (weight / (table - table.min()).mean()).float()


# -------------------------------------------------------------------------- noising and conversions


def _like(sigma: float | Tensor, x: Tensor) -> Tensor:
    """sigma (float, [B] or [B, T]) as float32, of as many axes as x [B, C, T, H, W].

    A bfloat16 x promotes to float32 with it.
    """
    if not isinstance(sigma, Tensor):
        # Filled on the device: a copy would wait for the GPU.
        return torch.full((1,) * x.ndim, sigma, dtype=torch.float32, device=x.device)
    sigma = sigma.to(x.device, torch.float32)
    if sigma.ndim == 2:
        return sigma[:, None, :, None, None]
    return sigma.reshape(-1, *[1] * (x.ndim - 1))


def add_noise(x0: Tensor, noise: Tensor, sigma: float | Tensor) -> Tensor:
    """x_sigma = (1 - sigma) x0 + sigma noise, float32. x0, noise [B, C, T, H, W]; sigma float, [B]
    or [B, T].
    """
    sigma = _like(sigma, x0)
    return (1 - sigma) * x0 + sigma * noise


def x0_from_v(x: Tensor, v: Tensor, sigma: float | Tensor) -> Tensor:
    """The clean estimate x - sigma v, in float32."""
    return x - _like(sigma, x) * v


def v_from_x0(x: Tensor, x0: Tensor, sigma: float | Tensor) -> Tensor:
    """The velocity (x - x0) / sigma that leads from x to x0; sigma must not be 0."""
    return (x - x0) / _like(sigma, x)


# ------------------------------------------------------------------------------------------ solvers


def solve(
    field: Callable,
    x: Tensor,
    sigmas: list[float],
    solver: str = "unipc",
    fresh: Callable | None = None,
) -> Tensor:
    """Lead x [B, C, T, H, W] from sigmas[0] to sigmas[-1] by field(x, sigma: float) -> v like x.

    "euler" and "unipc" integrate dx/dsigma = v. "renoise" predicts x0 at every level and adds fresh
    noise up to the next one, as few-step models are trained (DMD2, arXiv 2405.14867):
    fresh(step, like) -> noise; default: the global generator's. ValueError for another solver.
    """
    if solver == "euler":
        for sigma, following in pairwise(sigmas):
            x = x + (following - sigma) * field(x, sigma)
        return x
    if solver == "unipc":
        return _unipc(field, x, sigmas)
    if solver == "renoise":
        return _renoise(field, x, sigmas, fresh)
    raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, got {solver!r}")


def _renoise(field: Callable, x: Tensor, sigmas: list[float], fresh: Callable | None) -> Tensor:
    for step, (sigma, following) in enumerate(pairwise(sigmas)):
        x = x0_from_v(x, field(x, sigma), sigma)
        if following > 0:
            noise = fresh(step, x) if fresh else torch.randn_like(x)
            x = add_noise(x, noise, following)
    return x


def _unipc(field: Callable, x: Tensor, sigmas: list[float]) -> Tensor:
    """UniPC-2 with B(h) = e^h - 1, data prediction (arXiv 2302.04867, algorithms 5 to 8).

    With lambda = log(alpha / sigma), alpha = 1 - sigma, and h = lambda_next - lambda, each step
    first corrects the point that the last step predicted, using the network's output there, then
    predicts the next. The first and the last prediction are of order 1. The network is shown
    floor(1000 sigma) / 1000, as the released sampler does.
    """
    # Infinite at sigma 0 and 1.
    log_snr = (-torch.logit(torch.tensor(sigmas, dtype=torch.float64))).tolist()

    def propagate(x, x0, i, correction):
        """The exact linear part of the step from level i around x0, plus B(h) * correction."""
        bh = math.expm1(log_snr[i] - log_snr[i + 1])  # e^-h - 1, -1 for the step to sigma 0
        linear = sigmas[i + 1] / sigmas[i] * x
        return linear - (1 - sigmas[i + 1]) * bh * (x0 + correction)

    corrected = None  # the point at the last level
    previous = None  # x0 predicted at the last level
    older = None  # x0 predicted at the level before it
    for i, sigma in enumerate(sigmas[:-1]):
        x0 = x - sigma * field(x, math.floor(1000 * sigma) / 1000)

        # Corrector, of the order of the prediction that led here.
        if i == 1:
            x = propagate(corrected, previous, i - 1, 0.5 * (x0 - previous))
        if i > 1:
            # Order 2: the weights solve c1 + c2 = b1 and c1 r + c2 = b2 (eq. 5).
            h = log_snr[i] - log_snr[i - 1]
            r = (log_snr[i - 2] - log_snr[i - 1]) / h
            bh = math.expm1(-h)
            phi1 = bh / -h - 1
            b1 = phi1 / bh
            b2 = 2 * (phi1 / -h - 0.5) / bh
            c1 = (b2 - b1) / (r - 1)
            correction = c1 * (older - previous) / r + (b1 - c1) * (x0 - previous)
            x = propagate(corrected, previous, i - 1, correction)

        # Predictor, of order 2 but for the first and the last step.
        correction = 0.0
        if 0 < i < len(sigmas) - 2:
            r = (log_snr[i - 1] - log_snr[i]) / (log_snr[i + 1] - log_snr[i])
            correction = 0.5 * (previous - x0) / r
        corrected = x
        x = propagate(x, x0, i, correction)
        older = previous
        previous = x0
    return x
