"""What the devstack tells the person who waits for it: steps with a heartbeat, and errors of one sentence.

Everything goes to standard error, so that `python -m devstack env` can be read by a shell.
"""

import contextlib
import sys
import threading
import time
from collections.abc import Iterator

FIRST_HEARTBEAT = 2.0  # seconds
HEARTBEAT = 5.0  # seconds


class DevstackError(Exception):
    """What could not be done, and the remedy, as one sentence for a person; the command line prints it alone."""


def say(line: str) -> None:
    """Print one line of progress at once; whole lines only, so that parallel steps do not mix within a line."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


@contextlib.contextmanager
def step(message: str) -> Iterator[None]:
    """Announce MESSAGE, tell the elapsed time every few seconds while the block runs, and how it ended.

    The heartbeat is a daemon thread: a block that is interrupted never waits for it. Lines repeat the message because
    steps run in parallel.
    """
    began = time.monotonic()
    ended = threading.Event()

    def beat() -> None:
        wait = FIRST_HEARTBEAT
        while not ended.wait(wait):
            say(f"    {message}: {time.monotonic() - began:.0f} s so far")
            wait = HEARTBEAT

    say(f"  > {message}")
    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    except BaseException:
        ended.set()
        thread.join()
        say(f"  x {message}: not done, after {time.monotonic() - began:.1f} s")
        raise
    ended.set()
    thread.join()
    say(f"    {message}: done in {time.monotonic() - began:.1f} s")
