"""A time limit that is shared among the parts of a measurement, so that no part delays the end."""

import sys
import time
from collections.abc import Callable


class TooSlow(Exception):
    """A part would exceed its share of the time; the message says what was measured."""


class Budget:
    """Seconds for a number of parts. Each part may use an equal share of the remaining time.

    Draws a progress bar on stderr if that is a terminal.
    """

    def __init__(self, seconds: float, parts: int) -> None:
        self.seconds, self.parts, self.begun = seconds, parts, 0
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        return max(0.0, self.end - time.monotonic())

    def begin(self, name: str) -> float:
        """Begin the next part. Returns its share in seconds."""
        share = self.left() / max(1, self.parts - self.begun)
        self.draw(name)
        self.begun += 1
        return share

    def draw(self, name: str) -> None:
        if sys.stderr.isatty():
            bar = ("#" * round(20 * self.begun / self.parts)).ljust(20, ".")
            text = f"[{bar}] {self.begun}/{self.parts}, at most {self.left():.0f} s left: {name}"
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Erase the bar before something else is printed."""
        if sys.stderr.isatty():
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def measure(
    call: Callable[[int], object],
    size: int,
    share: float,
    repeats: int,
    wait: Callable[[], object] = lambda: None,
) -> float:
    """Seconds of the fastest of `repeats` runs of call(size), after a warm-up run, if all of them fit into the share.

    The call is first tried with smaller sizes. Its time grows at most in proportion to the size, so a size that cannot
    fit is not tried: the share is exceeded by at most two runs of a 64th of the size.

    Raises:
        TooSlow: if they do not fit.
    """
    end, part = time.monotonic() + share, max(1, size // 64)

    def seconds(part: int) -> float:
        wait()
        start = time.perf_counter()
        call(part)
        wait()
        return time.perf_counter() - start

    seconds(part)  # compilation and cold caches are not timed
    taken = seconds(part)
    while part < size:
        more = min(4 * part, size)
        if time.monotonic() + taken * more / part > end:
            raise TooSlow(f"{part} of {size} rows took {taken:.1f} s, the limit for all is {share:.1f} s")
        part, taken = more, seconds(more)
    if time.monotonic() + (repeats + 1) * taken > end:
        raise TooSlow(f"one run took {taken:.1f} s, the limit for {repeats + 2} runs is {share:.1f} s")
    return min((seconds(size) for _ in range(repeats)), default=taken)
