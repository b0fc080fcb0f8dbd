"""When the frames of a live video are shown, and when its next chunk is begun.

Frames come in chunks and are shown evenly, at the video's rate or, where the model is slower, at
the rate that it makes. What is made ahead of the display delays a changed prompt, so it is as
little as the next chunk needs. All times are seconds by one clock; nothing here looks at one.
"""

from collections import deque

LEAD = 0.08  # from a chunk's being made to its first frame's display: for encoding and the network
SLACK = 0.05  # by which a chunk may be later than the ones before it
RECENT = 8  # chunks, of which the slowest is reckoned with
COUNTED = 4096  # chunks, of which `figures` tells


class Pace:
    """The schedule of one studio: it knows from each video how long the next one's chunks take."""

    def __init__(self, fps: float, seconds: float | None = None, is_ahead: bool = False):
        """seconds: what a chunk takes to be made, if that is known already. is_ahead: one is made
        before it is asked for, so that what the asking takes may be next to nothing.
        """
        self.fps = fps
        self.seconds = seconds  # smoothed
        self.least = seconds if is_ahead and seconds else 0.0
        self.recent = deque(maxlen=RECENT)
        self.took = deque(maxlen=COUNTED)
        self.largest = 0  # frames of a chunk
        self.start()

    def start(self) -> None:
        """A new video: nothing of it is there yet."""
        self.end = None  # until when there are frames to show
        self.step = 1 / self.fps  # between two frames
        self.stalls = 0
        self.stalled = 0.0  # seconds, of all of them

    def place(self, count: int, took: float, now: float) -> list[float]:
        """When each of `count` frames is due, which took so many seconds and are there now."""
        self._learn(count, took)
        begin = now + LEAD
        if self.end is None:
            self.end = begin
        elif self.end < begin:
            # The frames before are over. Their last one stays until these can be there.
            if begin - self.end > self.step:
                self.stalls += 1
                self.stalled += begin - self.end
            self.end = begin

        # They last until the next ones can be expected.
        until = begin + 1.05 * self.seconds + SLACK
        self.step = max(1 / self.fps, (until - self.end) / count)
        dues = [self.end + i * self.step for i in range(count)]
        self.end += count * self.step
        return dues

    def _learn(self, count: int, took: float) -> None:
        """What a chunk takes. Shorter ones, at a video's start, are no measure if others are."""
        if count < self.largest or (self.largest == 0 and self.seconds is not None):
            self.largest = max(self.largest, count)
            return
        if count > self.largest:
            self.seconds = took
        self.largest = count
        self.recent.append(took)
        self.took.append(took)
        self.seconds = 0.7 * self.seconds + 0.3 * took

    def made(self) -> float | None:
        """Frames a second that the model makes when nothing holds it up."""
        if not (self.seconds and self.largest):
            return None
        return self.largest / max(self.seconds, self.least)

    def figures(self) -> dict:
        """made and rate: frames a second that the model makes and that are shown. chunks: seconds
        that they took, the median and what one in a hundred surpasses. stalls, and their seconds.
        """
        made = self.made()
        took = sorted(self.took)
        chunks = [round(took[len(took) * share // 100], 4) for share in (50, 99)] if took else []
        figures = {"made": made and round(made, 2), "rate": round(1 / self.step, 2)}
        return figures | {
            "chunks": chunks,
            "stalls": self.stalls,
            "stalled": round(self.stalled, 2),
        }

    def ahead(self, now: float) -> float:
        """Seconds of video that are made and not shown yet."""
        return max((self.end or now) - now, 0.0)

    def wait(self, now: float) -> float:
        """Seconds until the next chunk is to be begun, 0 for at once."""
        slowest = max([self.seconds or 0.0, *self.recent])
        return max(self.ahead(now) - 1.1 * slowest - LEAD - SLACK, 0.0)
