"""What scripts share: the devices that they may name, and how they end."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from wan5b.extras import signals

# Where networks may run; the first is the default.
DEVICES = ["cpu"]
if torch.cuda.is_available():
    DEVICES = ["cuda", "cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]


def script(main: Callable[[], Any]) -> None:
    """Run a script: a user's mistake is one line on stderr and exit code 2.

    Ctrl-C is code 130, SIGTERM 143: both end it as errors do, so what is finished is left whole.
    """
    signals.while_running()
    try:
        sys.exit(main())
    except (OSError, ValueError, FloatingPointError) as error:
        # What files and libraries say may hold what terminals take for commands.
        text = "".join(char if char.isprintable() else repr(char)[1:-1] for char in str(error))
        print(f"{Path(sys.argv[0]).name}: error: {text}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
