"""A store or a model that is gone while ComfyUI runs: one sentence and the next step, where it would tell an errno.

It runs on by itself: what is asked for again is looked for again.
"""

import functools
import os
import sys
from typing import Any

from frame import setting, when_loaded

__all__ = ["STORE", "Lost", "gone", "require_there", "with_advice"]

STORE = (
    "The folder of the models and images does not answer, as when the connection to Drive is lost. Bring it back (in "
    "the notebook: the cell that connects Drive), then try again; ComfyUI runs on."
)
_MODEL = (
    "{} is not where it was when it was placed. Put it back there, or place it again (fastsd webui place), then try "
    "again; ComfyUI runs on."
)


class Lost(FileNotFoundError):
    """What was there at the start is gone; told in words."""


def gone() -> bool:
    """Whether the store does not answer, or is not there any more."""
    store = setting("store")
    try:
        os.stat(store or os.curdir)
    except OSError:
        return True
    return False


def require_there(folder_name: str, filename: str) -> None:
    """Raise Lost for a model that was not found because its place, or its owner's file behind a link, is gone."""
    if gone():
        raise Lost(STORE)
    for folder in sys.modules["folder_paths"].get_folder_paths(folder_name):
        path = os.path.join(folder, filename)
        if os.path.islink(path) and not os.path.exists(path):
            raise Lost(_MODEL.format(filename))


def with_advice(node_errors: Any, endings: set[str]) -> None:
    """Add the next step to "value not in list" where the value is a file of a model."""
    for node in node_errors.values() if isinstance(node_errors, dict) else ():
        for error in node.get("errors", ()):
            value = error.get("extra_info", {}).get("received_value")
            if error.get("type") == "value_not_in_list" and os.path.splitext(str(value))[1].lower() in endings:
                error["details"] = (
                    f"{value} is not there: removed, renamed or never placed. Place it (fastsd webui place), or press "
                    f"R on the page and choose another. ({error.get('details', '')})"
                )


# No patches: a version of ComfyUI that lacks these functions starts all the same, and tells errors in its own words.


@when_loaded("folder_paths")
def _(module: Any) -> None:
    original = getattr(module, "get_filename_list", None)
    if original is None:
        return

    @functools.wraps(original)
    def get_filename_list(*words: Any, **named: Any) -> Any:
        try:
            return original(*words, **named)
        except OSError as err:
            if gone():
                raise Lost(STORE) from err
            raise

    module.get_filename_list = get_filename_list


@when_loaded("execution")
def _(module: Any) -> None:
    executor = getattr(module, "PromptExecutor", None)
    original = getattr(executor, "handle_execution_error", None)
    if executor is None or original is None:
        return

    @functools.wraps(original)
    def handle_execution_error(
        self: Any, prompt_id: Any, prompt: Any, current_outputs: Any, executed: Any, error: Any, ex: Any
    ) -> Any:
        if not isinstance(ex, Lost) and gone():
            error = {**error, "exception_message": f"{STORE}\n{error.get('exception_message', '')}"}
        return original(self, prompt_id, prompt, current_outputs, executed, error, ex)

    executor.handle_execution_error = handle_execution_error
