"""Rectified-flow maths on sigma in [0, 1]: levels, noising, conversions, ODE solvers. Plain functions, no state.

Convention: x_sigma = (1 - sigma) * x0 + sigma * noise; the network predicts v = noise - x0.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

FEW_STEPS = (
    1000,
    750,
    500,
    250,
)  # the un-shifted levels of the distilled generator, in thousandths


def shift_sigma(u, shift: float = 5.0):
    """Timestep shift s*u / (1 + (s-1)*u) towards noise, of a float or a tensor (SD3, arXiv 2403.03206, eq. 23)."""
    return shift * u / (1 + (shift - 1) * u)


def few_step_sigmas(steps=FEW_STEPS, shift: float = 5.0) -> list[float]:
    """Levels of few-step sampling: each step in thousandths, shifted, then 0. Default 1, .9375, .8333, .625, 0."""
    if (
        not steps
        or any(a <= b for a, b in zip(steps, [*steps[1:], 0], strict=True))
        or steps[0] > 1000
    ):
        raise ValueError(
            f"steps must fall within 1000 >= step > 0, as {list(FEW_STEPS)} do; got {list(steps)}"
        )
    return [shift_sigma(step / 1000, shift) for step in steps] + [0.0]


def sampling_sigmas(n: int, shift: float = 5.0) -> list[float]:
    """Levels of n-step ODE sampling: n + 1 values from about 1 down to 0."""
    if n < 1:
        raise ValueError(f"sampling needs at least one step, got {n}")
    return [shift_sigma(0.999 * (1 - i / n), shift) for i in range(n)] + [0.0]


def _like(sigma, x: Tensor) -> Tensor:
    """sigma (float, [B] or [B, T]) as float32, of as many axes as x [B, C, T, H, W]: bfloat16 x promotes to float32."""
    if not isinstance(sigma, Tensor):
        # filled there: a copy would wait for the GPU
        return torch.full((1,) * x.ndim, sigma, dtype=torch.float32, device=x.device)
    sigma = sigma.to(x.device, torch.float32)
    return (
        sigma[:, None, :, None, None] if sigma.ndim == 2 else sigma.reshape(-1, *[1] * (x.ndim - 1))
    )


def add_noise(x0: Tensor, noise: Tensor, sigma) -> Tensor:
    """x_sigma = (1 - sigma) x0 + sigma noise, in float32. x0, noise [B, C, T, H, W]; sigma float, [B] or [B, T]."""
    sigma = _like(sigma, x0)
    return (1 - sigma) * x0 + sigma * noise


def x0_from_v(x: Tensor, v: Tensor, sigma) -> Tensor:
    """The clean estimate x - sigma v, in float32."""
    return x - _like(sigma, x) * v


def v_from_x0(x: Tensor, x0: Tensor, sigma) -> Tensor:
    """The velocity (x - x0) / sigma that leads from x to x0; sigma must not be 0."""
    return (x - x0) / _like(sigma, x)


def ar_loss_weight(sigma, shift: float = 5.0) -> Tensor:
    """Bell-shaped weight of the flow loss at any sigma (float or tensor), mean 1 over the 1000 training levels.

    exp(-2 ((1000 sigma - 500) / 1000)^2) minus its minimum over the shifted table, scaled: 0 at sigma = 1.
    """

    def bell(s):
        return torch.exp(-2 * (s.double() - 0.5) ** 2)

    table = bell(shift_sigma(torch.arange(1000, 0, -1, dtype=torch.float64) / 1000, shift))
    weight = (bell(torch.as_tensor(sigma)) - table.min()) / (table - table.min()).mean()
    return weight.float()


def solve(field: Callable, x: Tensor, sigmas: list[float], solver: str = "unipc") -> Tensor:
    """Integrate dx/dsigma = field(x, sigma) from sigmas[0] to sigmas[-1].

    x [B, C, T, H, W] at sigmas[0]; field(x, sigma: float) -> v like x; solver "unipc" or "euler".
    """
    if solver == "euler":
        for sigma, following in zip(sigmas, sigmas[1:], strict=False):
            x = x + (following - sigma) * field(x, sigma)
        return x
    if solver != "unipc":
        raise ValueError(f'solver must be "unipc" or "euler", got {solver!r}')
    return _unipc(field, x, sigmas)


def _unipc(field: Callable, x: Tensor, sigmas: list[float]) -> Tensor:
    """UniPC-2 with B(h) = e^h - 1, data prediction (arXiv 2302.04867, algorithms 5 to 8).

    With lambda = log(alpha / sigma), alpha = 1 - sigma, and h = lambda_next - lambda, each step first corrects the
    point that the last step predicted, using the network's output there, then predicts the next. The first and the
    last prediction are of order 1. The network is shown floor(1000 sigma) / 1000, as the released sampler does.
    """

    log_snr = (
        -torch.logit(torch.tensor(sigmas, dtype=torch.float64))
    ).tolist()  # infinite at sigma 0 and 1

    def propagate(x, m, i, correction):
        """The exact linear part of the step from level i around x0-prediction m, plus B(h) * correction."""
        bh = math.expm1(log_snr[i] - log_snr[i + 1])  # e^-h - 1, -1 for the step to sigma 0
        return sigmas[i + 1] / sigmas[i] * x - (1 - sigmas[i + 1]) * bh * (m + correction)

    before = m1 = m2 = (
        None  # the corrected point of the last level; x0 predictions of the last level, the one before
    )
    for i, sigma in enumerate(sigmas[:-1]):
        m = x - sigma * field(x, math.floor(1000 * sigma) / 1000)
        if i:  # corrector: order = that of the prediction that led here
            correction = 0.5 * (m - m1)
            if i > 1:  # order 2: weights c1 + c2 = b1, c1 r + c2 = b2 (eq. 5)
                h = log_snr[i] - log_snr[i - 1]
                r = (log_snr[i - 2] - log_snr[i - 1]) / h
                bh = math.expm1(-h)
                phi1 = bh / -h - 1
                b1 = phi1 / bh
                c1 = (2 * (phi1 / -h - 0.5) / bh - b1) / (r - 1)
                correction = c1 * (m2 - m1) / r + (b1 - c1) * (m - m1)
            x = propagate(before, m1, i - 1, correction)
        before, correction = x, 0.0
        if 0 < i < len(sigmas) - 2:  # predictor of order 2
            r = (log_snr[i - 1] - log_snr[i]) / (log_snr[i + 1] - log_snr[i])
            correction = 0.5 * (m1 - m) / r
        x, m1, m2 = propagate(x, m, i, correction), m, m1
    return x
