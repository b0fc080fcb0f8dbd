"""How Ctrl-C and SIGTERM end a script.

Nothing here loads torch, which takes seconds: a script calls `while_loading` before that.
"""

import signal
import sys
from functools import partial
from threading import Condition
from types import FrameType


def while_loading() -> None:
    """From a script's first lines on, while modules load: Ctrl-C ends it, without a traceback."""
    _interrupt(signal.SIG_DFL)


def while_running() -> None:
    """Both end a script as errors do, so what is finished is left whole: Ctrl-C is a
    KeyboardInterrupt, SIGTERM exits with 143.
    """
    from wan5b.util import INTERRUPTED  # with torch, which is there by now

    stop = partial(_stop, INTERRUPTED)
    _interrupt(stop)
    signal.signal(signal.SIGTERM, stop)


def _interrupt(handler) -> None:
    """What Ctrl-C does, unless it is to do nothing, as for a job in the background."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, handler)


# Who is interrupted where Python's own locks are taken or given back leaves them locked for good:
# threads that load a file, say, would wait for each other without an end.
LOCKS = {
    Condition.__enter__.__code__,
    Condition.__exit__.__code__,
    Condition._acquire_restore.__code__,
    Condition._release_save.__code__,
}


def _stop(raised: list[BaseException], number: int, frame: FrameType) -> None:
    """The handler of both signals. raised: what they have raised so far; this comes to it."""
    if frame.f_code in LOCKS:
        _soon(raised, number)
        return
    sys.unraisablehook = partial(_forgotten, raised, number)
    raised.append(KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number))
    raise raised[-1]


def _forgotten(raised: list[BaseException], number: int, unraisable) -> None:
    """It came in the midst of a library's clean-up: Python would print a traceback, and go on."""
    if isinstance(unraisable.exc_value, KeyboardInterrupt | SystemExit):
        _soon(raised, number)


def _soon(raised: list[BaseException], number: int) -> None:
    """The signal once more, in 10 ms."""
    signal.signal(signal.SIGALRM, lambda _, frame: _stop(raised, number, frame))
    signal.setitimer(signal.ITIMER_REAL, 0.01)
