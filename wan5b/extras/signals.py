"""How Ctrl-C and SIGTERM end a script.

Nothing here loads torch, which takes seconds: a script calls `while_loading` before that.
"""

import signal
import sys


def while_loading() -> None:
    """From a script's first lines on, while modules load: Ctrl-C ends it, without a traceback."""
    _interrupt(signal.SIG_DFL)


def while_running() -> None:
    """Both end a script as errors do, so what is finished is left whole: Ctrl-C is a
    KeyboardInterrupt, SIGTERM exits with 143.
    """
    _interrupt(_stop)
    signal.signal(signal.SIGTERM, _stop)


def _interrupt(handler) -> None:
    """What Ctrl-C does, unless it is to do nothing, as for a job in the background."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, handler)


def _stop(number: int, _) -> None:
    """The handler of both signals."""
    # It may come in the midst of a library's clean-up, of which Python would print a traceback.
    sys.unraisablehook = lambda _: None
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    sys.exit(128 + number)
