"""Free space: every session and checkpoint with its size, and a button that deletes after a second question."""

import html

from fastsd_helpers.files import bytes_in, free_bytes
from fastsd_helpers.forms.widgets.delete_view import DeleteView
from fastsd_helpers.sessions import Session, delete_checkpoint, delete_session, list_sessions, room_note
from fastsd_helpers.sessions.folders import children
from fastsd_helpers.wording import size_in_words

__all__ = ["show_space"]


def show_space(session: Session) -> DeleteView[tuple[str, str | None]]:
    """Show what the sessions beside this one take, and let them be deleted; a cell's last line displays it.

    Args:
        session: the session, as `open_session` gives it.

    Returns:
        The view; as a cell's last line it is displayed.
    """
    root = session.folder.parent

    def listed() -> tuple[str, list[tuple[str, tuple[str, str | None]]]]:
        entries: list[tuple[str, tuple[str, str | None]]] = []
        for item in list_sessions(root):
            own = "  (this one)" if item.folder == session.folder else ""
            entries.append((f"session {item.name}{own}  ·  {size_in_words(item.bytes)}", (item.name, None)))
            for folder in children(item.folder / "checkpoints"):
                label = f"      checkpoint {folder.name}  ·  {size_in_words(bytes_in(folder))}"
                entries.append((label, (item.name, folder.name)))
        return f"<b>{html.escape(str(root))}</b>: {size_in_words(free_bytes(root))} free.", entries

    def named(thing: tuple[str, str | None]) -> str:
        name, checkpoint = thing
        return f"the checkpoint {checkpoint} of {name}" if checkpoint else f"the session {name} with all its images"

    def remove(thing: tuple[str, str | None]) -> int:
        name, checkpoint = thing
        if checkpoint:
            return delete_checkpoint(Session.open(name, root=root), checkpoint)
        return delete_session(name, root=root)

    return DeleteView(listed, named, remove, lambda thing: room_note(root, checkpoint=thing[1] if thing else None))
