"""What the tests of the tiny world share: its modules, some captions, the demo's codec."""

import sys
from pathlib import Path

from wan5b.extras.codec import LinearCodec
from wan5b.vae22 import VAEConfig

sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "tiny"))
import ablations  # noqa: E402
import demo  # noqa: E402
import jobs  # noqa: E402
import lora  # noqa: E402
import scorer  # noqa: E402
import show  # noqa: E402
import sick  # noqa: E402
import small  # noqa: E402
import stages  # noqa: E402
import stages_show  # noqa: E402
import world  # noqa: E402

__all__ = ["LABELS", "ablations", "demo", "jobs", "lora", "make_codec", "scorer"]
__all__ += ["show", "sick", "small", "stages", "stages_show", "world"]

LABELS = world.LABELS[::3]


def make_codec(mean_scale: float = demo.MEAN_SCALE) -> LinearCodec:
    basis, dual = world.codec_basis(mean_scale=mean_scale)
    codec = LinearCodec(VAEConfig())
    codec.load_state_dict({"basis": basis, "dual": dual})
    return codec
