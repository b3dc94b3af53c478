"""Sessions: the folder and session.json of one subject; create, open, list, delete, and the lock of a run."""

from fastsd_helpers.sessions.deletion import delete_checkpoint, delete_session, room_note
from fastsd_helpers.sessions.importing import ImportResult, import_session, is_old_session, whole_prompt
from fastsd_helpers.sessions.lock import SessionLock, local_holder
from fastsd_helpers.sessions.names import check_name, clean_name
from fastsd_helpers.sessions.session import (
    Session,
    SessionSummary,
    find_session,
    list_sessions,
)

__all__ = [
    "ImportResult",
    "Session",
    "SessionLock",
    "SessionSummary",
    "check_name",
    "clean_name",
    "delete_checkpoint",
    "delete_session",
    "find_session",
    "import_session",
    "is_old_session",
    "list_sessions",
    "local_holder",
    "room_note",
    "whole_prompt",
]
