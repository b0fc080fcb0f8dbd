"""Whether a number that is known of every frame repeats itself with a period.

What is made in chunks may jump a little at each chunk's start: then a number has lines in its
spectrum at the period's harmonics, exactly. Motion has broad hills there. So the lines are compared
with what stands beside them.
"""

from typing import NamedTuple

import numpy as np

from wan5b.extras.measures import GROUP

CYCLES = 6  # of a period that a clip must have, for its lines to have anything beside them
RESOLUTION = 0.01  # changes from frame to frame below are taken for rounding


class Pulse(NamedTuple):
    """A period of a series.

    - strength: by how many standard deviations the lines together surpass their neighbourhood,
      were they noise like it. It is evidence, not size: it grows with the clip's length.
    - cycle: the mean cycle about its mean, [period], in the series' unit; entry i is of the frames
      with index i, i + period, ...
    - amplitude: from its lowest to its highest point. own: the same without what every latent frame
      repeats.
    - energy: of the lines, as far as they surpass their neighbourhood.
    """

    period: int
    strength: float
    amplitude: float
    own: float
    energy: float
    cycle: np.ndarray


def steps(series: np.ndarray, breaks: list[int]) -> np.ndarray:
    """The changes from frame to frame, [T - 1], which have no trend; 0 where there is none.

    breaks: frames where the scene changes, whose changes say nothing of pulses: they are left out,
    and so are those behind, of series that are changes themselves.
    """
    changes = np.diff(series)
    for frame in breaks:
        changes[max(frame - 1, 0) : frame + 1] = np.nan
    changes -= np.nanmean(changes) if np.isfinite(changes).any() else 0
    return np.nan_to_num(changes)


def pulse(changes: np.ndarray, period: int) -> Pulse | None:
    """How strong a period is. None if the clip has fewer than CYCLES of it.

    changes: of `steps`. What repeats with every latent frame already (the harmonics at a quarter
    and half of the frame rate) is not counted for the strength, since the VAE and encoders make it,
    unless this is the period asked for.
    """
    cycles = len(changes) // period
    if cycles < CYCLES or period < 3:
        return None
    whole = changes[: cycles * period]
    power = np.abs(np.fft.rfft(whole)) ** 2
    beside = _beside(power, cycles) + len(whole) * RESOLUTION**2

    counted = []
    for k in range(1, (period + 1) // 2):
        if period == GROUP or GROUP * k % period:
            counted.append(k)
    lines = np.array(counted) * cycles
    ratio = power[lines] / beside[lines]
    strength = float((ratio - 1).sum() / len(counted) ** 0.5)

    # The mean cycle: the mean steps of each phase, summed up. Step i leads to frame i + 1.
    mean = np.roll(whole.reshape(cycles, period).mean(0), 1)
    waves = np.fft.rfft(mean)
    counted_waves = np.zeros_like(waves)
    counted_waves[counted] = waves[counted]
    cycle = np.cumsum(mean - mean.mean())
    own = np.cumsum(np.fft.irfft(counted_waves, period))

    energy = float((power[lines] - beside[lines]).sum()) / len(whole) ** 2
    sizes = (float(np.ptp(cycle)), float(np.ptp(own)), energy)
    return Pulse(period, strength, *sizes, cycle - cycle.mean())


def _beside(power: np.ndarray, cycles: int) -> np.ndarray:
    """What to compare each bin of a spectrum with.

    The mean of those around it, one and a half line distances to both sides, without lines and the
    bins next to them; or the mean of the two next to it, if that is more. Motion that nearly has
    the period shows there; what has it exactly does not.
    """
    bins = np.arange(len(power))
    off = np.abs(bins - np.round(bins / cycles) * cycles) > 1
    sums = np.concatenate([[0.0], np.cumsum(power * off)])
    counts = np.concatenate([[0], np.cumsum(off)])
    reach = 3 * cycles // 2
    low = np.maximum(bins - reach, 0)
    high = np.minimum(bins + reach + 1, len(power))
    around = (sums[high] - sums[low]) / np.maximum(counts[high] - counts[low], 1)

    padded = np.pad(power, 1, mode="edge")
    return np.maximum(around, (padded[:-2] + padded[2:]) / 2)


def strongest(changes: np.ndarray, longest: int, least: float) -> Pulse | None:
    """The period that stands out most among 5 .. longest. None if none has the `least` strength.

    Of a period's multiples all have its energy, and its parts have less.
    """
    found = []
    for period in range(GROUP + 1, longest + 1):
        candidate = pulse(changes, period)
        if candidate and candidate.strength >= least:
            found.append(candidate)
    most = max((candidate.energy for candidate in found), default=0)
    return next((candidate for candidate in found if candidate.energy >= 0.8 * most), None)
