"""Time spent on training itself."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch:
    """
    Seconds of training since `start`, without those of evaluation, pictures and saving. Goes into checkpoints, so that a
    run that is gone on with counts on.
    """

    def __init__(self):
        self.before, self.since = 0.0, None

    def start(self) -> None:
        """Count from now on, beside what was counted before."""
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
