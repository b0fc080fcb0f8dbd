"""What stages.py trains and samples: each stage as it should be, and with one known fault."""

from dataclasses import dataclass, field

from wan5b.extras.sampling import MODES
from wan5b.flow import few_step_sigmas


@dataclass(frozen=True)
class Case:
    """A run, or a way of sampling, and the healthy one that it is seen beside.

    about: what was done, for a table's cell. beside: the healthy stage. stage: whose run is
    sampled, where nothing is trained. keys: of the stage's toml; with them it is trained again.
    start: the stage whose weights that starts from (empty: as in the demo). still: on clips in
    which nothing moves. how: changed arguments of `generate`; mode: whose they are otherwise.
    """

    about: str
    beside: str = "dmd"
    stage: str = ""
    keys: dict[str, str] = field(default_factory=dict)
    start: str = ""
    still: bool = False
    how: dict = field(default_factory=dict)

    @property
    def source(self) -> str:
        """The demo's run that is sampled if nothing is trained."""
        return self.stage or self.beside


HEALTHY = {
    "teacher": Case("as `make demo` trains it", "teacher"),
    "ar": Case("as `make demo` trains it", "ar"),
    "ode": Case("as `make demo` trains it", "ode"),
    "dmd": Case("as `make demo` trains it", "dmd"),
}
SICK = {
    # The stages before the distillation.
    "teacher-lr-high": Case(
        "learning rate 3e-2 for 2e-3, 800 steps", "teacher", keys={"lr": "3e-2", "steps": "800"}
    ),
    "ar-still": Case(
        "400 steps on clips that repeat their first frame", "ar", keys={"steps": "400"}, still=True
    ),
    "ar-levels-low": Case(
        "shift 0.1 for 5: levels near 0, 400 steps", "ar", keys={"shift": "0.1", "steps": "400"}
    ),
    # The distillation.
    "critic-slow": Case(
        "critic: 1 update for 3, learning rate 1e-5 for 5e-4; 240 steps",
        keys={"ratio": "1", "critic_lr": "1e-5", "steps": "240"},
    ),
    "critic-fast": Case("critic_lr 1e-2 for 5e-4", keys={"critic_lr": "1e-2"}),
    "lr-high": Case("lr 2e-3 for 2e-4", keys={"lr": "2e-3"}),
    "batch-small": Case("batch 1 for 8", keys={"batch": "1", "micro_batch": "1"}),
    "guidance-none": Case("guidance 0 for .25", keys={"guidance": "0.0"}),
    "guidance-high": Case("guidance 4 for .25", keys={"guidance": "4.0"}),
    "too-long": Case("480 more steps behind the demo's, a new critic", start="dmd"),
    "shift-low": Case("trained with shift 1, sampled with 5", keys={"shift": "1.0"}),
    "real-frames": Case('rollout = "data": each chunk behind real frames', stage="dmd-data"),
    # Sampled in another way than trained.
    "levels-other": Case("sampled at levels of shift 1", how={"sigmas": few_step_sigmas(shift=1)}),
    "one-step": Case("sampled in one step for four", how={"sigmas": [1.0, 0.0]}),
    "guided-again": Case("sampled with guidance 3, which it has learned", how={"guidance": 3.0}),
    "window-none": Case("sampled without a window", how={"window": None}),
    "window-narrow": Case("sampled with a window of 2 for 5", how={"window": 2}),
    "clean-pass-none": Case("sampled without the clean pass", how={"clean_pass": False}),
    "teacher-causal": Case("the teacher's weights, sampled chunk by chunk", stage="teacher"),
    "ar-few-steps": Case("ar's weights in 4 steps, without guidance", beside="ode", stage="ar"),
}
CASES = HEALTHY | SICK


def is_trained(case: Case) -> bool:
    """Whether weights are made for it."""
    return bool(case.keys or case.start or case.still)


def has_curves(case: Case) -> bool:
    """Whether a training is its own: the others are only sampled in another way than trained."""
    return is_trained(case) or not case.how and case.source.startswith(case.beside)


def mode_of(case: Case, sampled: dict[str, str]):
    """How its healthy run is sampled. sampled: demo.SAMPLED."""
    return MODES[sampled[case.beside]]
