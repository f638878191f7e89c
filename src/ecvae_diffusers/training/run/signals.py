"""SIGTERM and SIGINT end a run after its current step, with a checkpoint: a cluster's time limit, or Ctrl-C."""

import signal

import torch
from accelerate import Accelerator


# Steps between questions to several processes: each waits for the device.
ASKED_EVERY = 5


class StopSignal:
    """
    A context in which the first SIGTERM or SIGINT is remembered, and a second SIGINT interrupts at once.
    """

    def __init__(self):
        self.received: signal.Signals | None = None

    def __enter__(self) -> "StopSignal":
        self.previous = {s: signal.signal(s, self.receive) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def receive(self, number: int, frame) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)

    def agreed(self, accelerator: Accelerator, step: int) -> bool:
        """Return whether any process received one. All ask at the same step: they save the checkpoint together."""
        if accelerator.num_processes == 1:
            return self.received is not None
        if step % ASKED_EVERY:
            return False
        flag = torch.tensor(float(self.received is not None), device=accelerator.device)
        return bool(accelerator.reduce(flag, reduction="sum") > 0)
