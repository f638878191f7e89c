"""Bars of the work between a run's steps and after the last one, and the time spent on training itself."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from tqdm import tqdm


def progress(
    name: str, iterable: Iterable | None = None, total: int | None = None, shown: bool = True, delay: float = 1.0
) -> tqdm:
    """
    Return a bar below that of the steps, which vanishes when its work is done.

    Args:
        name (`str`): What is done.
        iterable (`Iterable`, *optional*): The work. Without it the caller updates the bar, up to `total`.
        shown (`bool`, *optional*, defaults to `True`): Whether this process shows it.
        delay (`float`, *optional*, defaults to 1.0): Seconds before it appears, so that short work leaves no trace in a log.
    """
    return tqdm(iterable, name, total, leave=False, disable=not shown, delay=delay, mininterval=1.0)


class Stopwatch:
    """
    Seconds of training since `start`, without those of evaluation, pictures and saving. Checkpoints hold them, so that a resumed
    run continues to count.
    """

    def __init__(self):
        self.before, self.since = 0.0, None

    def start(self) -> None:
        """Count from now on, in addition to what was counted before."""
        self.since = time.perf_counter()

    @property
    def seconds(self) -> float:
        return self.before + (time.perf_counter() - self.since if self.since is not None else 0.0)

    @contextmanager
    def paused(self) -> Iterator[None]:
        self.before, self.since = self.seconds, None
        try:
            yield
        finally:
            self.start()

    def state_dict(self) -> dict:
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict) -> None:
        self.before, self.since = state_dict["seconds"], None
