"""The bars of what a run does between its steps and after the last one."""

from collections.abc import Iterable

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
