"""Data-Forcing Distillation (DFD, arXiv 2606.18478): the teacher scores real clips, now and then.

DMD asks the critic and the teacher about the same noised rollout. With DFD, in a share
`data_forcing` of the generator's steps, the teacher is asked about a real clip of the same caption
in its place, at the same level and with the same noise (eq. 8). The paper's cure for what reverse
KL does: too much contrast, too little variety. It is for the last 100 to 300 steps of a student
that DMD has trained already; from further away the authors saw it fail (sections 4.3 and 5.2).

From the paper: the rule, the share of 1/2 (eq. 10, drawn anew every step; 1 did about as well), no
GAN beside it, the critic's step as in DMD. From the authors' code on top of Self Forcing: guidance
and critic as in DMD; the gradient is divided by the mean of |x0 - real| with the rollout's x0,
although `real` is the clip's; one draw for all samples of a step. Ours: a first frame that is given
stays clean in both. Whether the critic should go on from the DMD stage's, the paper does not say; a
run of train.py starts it from the teacher.
"""

import torch
from torch import Tensor

from wan5b import stages
from wan5b.flow import add_noise
from wan5b.runs import Batch, Run
from wan5b.stages import Noised


def noised_clip(run: Run, batch: Batch, noised: Noised) -> Noised:
    """The real clips of a batch as its rollouts are noised: the same level, the same noise."""
    clips = run.clips(batch.items)
    return noised._replace(xs=add_noise(clips, noised.noise, noised.sigma))


def is_forced(run: Run, batch: Batch) -> bool:
    """Whether this step's teacher scores real clips: one draw for all samples of a step.

    To be asked once a micro-batch, behind its rollout, so that exit levels are those of plain DMD.
    """
    return bool(torch.rand((), generator=batch.chance) < run.cfg.data_forcing)


def data_forcing_step(run: Run, batch: Batch) -> dict[str, Tensor]:
    """`dmd_step` whose teacher scores the real clips of the batch in a share of all steps."""
    figures = {}

    def show_teacher(noised: Noised) -> Noised:
        # Drawn only here: the rollout draws its exit level from the same numbers before.
        forced = is_forced(run, batch)
        figures["forced"] = noised.xs.new_tensor(float(forced))
        return noised_clip(run, batch, noised) if forced else noised

    return stages.dmd_step(run, batch, show_teacher) | figures
