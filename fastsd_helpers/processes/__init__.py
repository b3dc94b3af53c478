"""Processes of this machine: who one is and whether it lives, one lock between them, children watched and ended."""

from fastsd_helpers.processes.child import Child, ChildEnded, ChildMute, LogTail, end_group
from fastsd_helpers.processes.count import choose_count, require_share
from fastsd_helpers.processes.environment import (
    environment_for,
    is_found_anyway,
    looks_secret,
    names_set,
    with_this_package,
)
from fastsd_helpers.processes.identity import LocalProcess, boot_id, machine_id
from fastsd_helpers.processes.journal import JournalTail, JournalWriter
from fastsd_helpers.processes.lock import LockHeld, file_lock
from fastsd_helpers.processes.ranks import (
    LOST,
    OWN_THREADS,
    PLACE,
    Ranks,
    count_gpus,
    rank_here,
    take_own_gpu,
    take_place,
    watched_over,
    world_here,
)
from fastsd_helpers.processes.stopping import stop_signals

__all__ = [
    "LOST",
    "OWN_THREADS",
    "PLACE",
    "Child",
    "ChildEnded",
    "ChildMute",
    "JournalTail",
    "JournalWriter",
    "LocalProcess",
    "LockHeld",
    "LogTail",
    "Ranks",
    "boot_id",
    "choose_count",
    "count_gpus",
    "end_group",
    "environment_for",
    "file_lock",
    "is_found_anyway",
    "looks_secret",
    "machine_id",
    "names_set",
    "rank_here",
    "require_share",
    "stop_signals",
    "take_own_gpu",
    "take_place",
    "watched_over",
    "with_this_package",
    "world_here",
]
