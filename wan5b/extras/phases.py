"""What a run may ask of its stage beyond the core: the keys of its config, the steps they choose.

dmd: gan_weight > 0 adds the GAN branch (extras/gan.py), data_forcing > 0 shows the teacher real
clips (extras/data_forcing.py). Without them a stage has the steps of stages.PHASES.
"""

from dataclasses import dataclass

from wan5b.extras.config import Options, at_least
from wan5b.extras.data_forcing import data_forcing_step
from wan5b.extras.gan import gan_critic_step, gan_generator_step
from wan5b.stages import CRITIC, PHASES, Phase


@dataclass(frozen=True, kw_only=True)
class MethodOptions(Options):
    """Keys of train.py's Config. Both need latents: real clips."""

    # dmd: in this share of the generator's steps the teacher scores real clips; its paper has .5
    data_forcing: float = at_least(0, 0.0)
    gan_weight: float = at_least(0, 0.0)  # dmd: of the GAN's loss in the generator's; 0: no GAN
    # The others with gan_weight alone; .01 for both weights is what Self Forcing's code has.
    gan_critic_weight: float = at_least(1e-6, 0.01)  # of the classifier's loss in the critic's
    gan_relativistic: bool = False  # a rollout's logit is compared with its clip's
    gan_r1: float = at_least(0, 0.0)  # weight of the classifier's squared slope at real clips
    gan_r2: float = at_least(0, 0.0)  # and at rollouts
    gan_layers: tuple[int, ...] = ()  # the three that it reads, from 0; (): 13, 21, 29 of 30

    @property
    def with_gan(self) -> bool:
        return self.stage == "dmd" and self.gan_weight > 0

    @property
    def with_real_clips(self) -> bool:
        return self.stage == "dmd" and (self.gan_weight > 0 or self.data_forcing > 0)


def of(cfg: MethodOptions) -> list[Phase]:
    """The phases of an iteration that this config asks for."""
    if cfg.with_gan:
        critic = Phase("critic", "critic", gan_critic_step)
        return [Phase("generator", "generator", gan_generator_step), critic]
    if cfg.stage == "dmd" and cfg.data_forcing > 0:
        return [Phase("generator", "generator", data_forcing_step), CRITIC]
    return PHASES[cfg.stage]
