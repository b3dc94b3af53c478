"""How many processes share the work of a command: those that are there, as many as are asked for, or one per GPU."""

import importlib.util

from fastsd_helpers.errors import SettingsError
from fastsd_helpers.processes.ranks import world_here

__all__ = ["choose_count", "require_share"]


def choose_count(
    asked: int | None,
    gpus: int,
    *,
    package: str,
    parts: int | None = None,
    before: int | None = None,
    fewer: str = "with fewer processes, --accumulation makes up for them",
) -> tuple[int, str]:
    """Choose the number of processes before anything is loaded.

    Those that were started together (`accelerate launch`) are taken as they are. What is asked for wins; then what was
    asked for when the run began; then one for every GPU, as far as they can share the parts of a step that has begun.

    Args:
        asked: the setting `processes`; None where it was left alone.
        gpus: how many there are.
        package: what `fastsd install` is given for Accelerate.
        parts: of each step of the run that has begun.
        before: the processes that were asked for then.
        fewer: what to do instead where there are too few GPUs.

    Returns:
        The number, and a sentence where GPUs are left idle for want of a package.

    Raises:
        SettingsError: there are fewer GPUs, or they cannot share the steps of the run equally.
    """
    world = world_here()
    if world > 1:
        if asked not in (None, world):
            raise SettingsError(
                f"processes (--processes) is {asked}, but {world} processes were started together.",
                f"Leave it out, or have accelerate launch start {asked}.",
            )
        count = world
    elif asked:
        if gpus and asked > gpus:
            raise SettingsError(
                f"processes (--processes) is {asked}, and this machine has {gpus} GPU{'s' * (gpus > 1)}: each process "
                "needs one of its own.",
                f"Choose {gpus}, or leave it out; {fewer}.",
            )
        count = asked
    elif gpus > 1 and importlib.util.find_spec("accelerate") is None:
        return 1, f"1 of {gpus} GPUs is used: Accelerate is not installed (fastsd install {package})."
    else:
        most = min(before, gpus) if before and gpus else before or max(1, gpus)
        count = max(each for each in range(1, most + 1) if not parts or parts % each == 0)
    if parts:
        require_share(parts, count)
    return count, ""


def require_share(parts: int, processes: int) -> None:
    """Refuse a number of processes that cannot share a step's parts equally.

    Args:
        parts: of each step of the run.
        processes: the number.

    Raises:
        SettingsError: with the numbers that can.
    """
    if parts % processes:
        able = " or ".join(str(count) for count in range(1, parts + 1) if parts % count == 0)
        raise SettingsError(
            f"processes (--processes) is {processes}, and each optimizer step of this run has {parts} forward "
            f"pass{'es' * (parts > 1)}, as it was begun: they cannot be shared equally.",
            f"Choose {able} to resume it, or start again from step 0 with --restart.",
        )
