"""What scripts share: the devices that they may name, and how they end."""

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from wan5b.extras import signals
from wan5b.util import FULL, first_line, not_written, raise_interrupted

# Where networks may run; the first is the default.
DEVICES = ["cpu"]
if torch.cuda.is_available():
    DEVICES = ["cuda", "cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]


class Gathered(argparse.Action):
    """For lists: of an option that is given several times, all values count. What stood there
    before, a default or a recorded list, is replaced.
    """

    gathered = None  # the list of this command line so far

    def __call__(self, parser, namespace, values, option_string=None):
        held = getattr(namespace, self.dest)
        self.gathered = held + values if held is self.gathered else values
        setattr(namespace, self.dest, self.gathered)


def script(main: Callable[[], Any]) -> None:
    """Run a script: a user's mistake is one line on stderr and exit code 2. Of a run's processes
    the others, which it leaves without an answer, say in a line that this is why they end.

    Ctrl-C is code 130, SIGTERM 143: both end it as errors do, so what is finished is left whole.
    """
    signals.while_running()
    try:
        sys.exit(_interruptible(main))
    except InterruptedError:  # of training that SIGTERM stops, where no checkpoint is to be saved
        sys.exit(143)
    except (OSError, ValueError, FloatingPointError) as error:
        text = str(error)
        if isinstance(error, OSError) and error.errno in FULL and error.filename:
            text = not_written(error.filename, error)
        # What files and libraries say may hold what terminals take for commands.
        text = "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
        print(f"{Path(sys.argv[0]).name}: error: {text}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        cause = first_line(error) or type(error).__name__
        if is_out_of_memory(error):
            wrong = f"out of memory; take a smaller size, fewer frames or a smaller batch ({cause})"
        elif is_of_lost_process(error):
            cause = cause.partition(". ")[0]  # advice follows
            wrong = f"another process of this run has ended, its own lines say why ({cause})"
        else:
            raise
        print(f"{Path(sys.argv[0]).name}: error: {wrong}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _interruptible(main: Callable[[], Any]) -> Any:
    """What main returns. Errors that Ctrl-C or SIGTERM has led to are theirs, but for those of
    files, which a script on its way out cannot write.
    """
    try:
        return main()
    except Exception as error:
        if not isinstance(error, OSError):
            raise_interrupted(error)
        raise


# What gloo says of a process that has ended, and of one that was killed with something unread.
LOST = r"Connection closed by peer|.*: (Connection reset by peer|Broken pipe)"


def is_of_lost_process(error: Exception) -> bool:
    """Whether gloo has lost the connection to another process: it has no type of error for that."""
    return re.match(rf"\[\S*/gloo/transport/\S*\] ({LOST})", str(error)) is not None


def is_out_of_memory(error: Exception) -> bool:
    """Of a GPU, or of the host, for which torch has no type of error."""
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return known or "DefaultCPUAllocator: can't allocate" in str(error)
