"""Let buttons work while a cell runs: answer the widgets' messages that wait behind the running cell.

A kernel handles one message after the other, so a click waits until the cell is over. Colab's kernel (ipykernel 6) and
newer ones (7) keep what waits in different places; in each of them only widget messages are answered here, and every
other message goes back into its place. JupyterLab sends clicks past a running cell by itself when the kernel is 7.
"""

import inspect
from collections.abc import Callable
from typing import Any

from fastsd_helpers.runtime import logger

__all__ = ["answer_widgets"]

_WIDGET_MESSAGES = ("comm_open", "comm_msg", "comm_close")
# What a page asks when it was loaded anew, before it can show a widget again; they change nothing.
_QUESTIONS = ("kernel_info_request", "comm_info_request")


def answer_widgets() -> None:
    """Handle the widget messages that have arrived; called again and again by a cell that waits.

    What a page that was loaded anew asks first is answered too, so that it shows the cell's widgets again.

    Does nothing outside a notebook, and in kernels that keep their messages elsewhere: then the notebook's own
    interrupt button is what stops a cell.
    """
    kernel = _kernel()
    if kernel is None:
        return
    try:
        if getattr(kernel, "shell_channel_thread", None) is not None:
            _drain_thread(kernel)
        elif hasattr(kernel, "msg_queue"):
            _drain_queue(kernel)
    except (AttributeError, TypeError) as err:  # a kernel whose insides have moved
        logger.debug("Widget messages could not be answered while the cell runs: %s.", err)


def _kernel() -> Any:
    try:
        from IPython import get_ipython
    except ImportError:
        return None
    return getattr(get_ipython(), "kernel", None)


def _drain_queue(kernel: Any) -> None:
    """ipykernel 6: the stream puts (number, function, (frames,)) into a queue, which the loop empties between cells."""
    kernel.shell_stream.flush()
    waiting = []
    while not kernel.msg_queue.empty():
        item = kernel.msg_queue.get_nowait()
        frames = item[2][0] if item[1] == kernel.dispatch_shell and item[2] else None
        if frames is None or not _answer(kernel, frames, kernel.shell_stream):
            waiting.append(item)
    for item in waiting:
        kernel.msg_queue.put_nowait(item)


def _drain_thread(kernel: Any) -> None:
    """ipykernel 7: a thread reads the stream and hands the frames to this one through a pair of sockets."""
    import zmq

    manager = kernel.shell_channel_thread.manager
    pair = manager._shell_channel_to_main
    while pair.to_socket.poll(0, zmq.POLLIN):
        frames = pair.to_socket.recv_multipart(zmq.NOBLOCK, copy=False)
        stream = manager.get_subshell_to_shell_channel_socket(None)
        if not _answer(kernel, frames, stream):
            # In the order in which they came, after this cell: shell_main waits for the cell's lock.
            kernel.io_loop.add_callback(kernel.shell_main, None, frames)


def _answer(kernel: Any, frames: list[Any], stream: Any) -> bool:
    """Handle one message if it is a widget's; False leaves it to the kernel."""
    try:
        idents, rest = kernel.session.feed_identities(frames, copy=False)
        if kernel.session.deserialize(rest, content=False, copy=False)["header"]["msg_type"] not in (
            *_WIDGET_MESSAGES,
            *_QUESTIONS,
        ):
            return False
        message = kernel.session.deserialize(rest, content=True, copy=False)
    except (ValueError, KeyError, IndexError):  # not a message, or the kernel's own "stop aborting"
        return False
    # The handler itself, not the kernel's dispatch: that would give this cell's later output another parent. But the
    # page waits for "idle" before it sends a widget's next change.
    kernel._publish_status("busy", "shell", parent=message)
    _call(kernel.shell_handlers[message["header"]["msg_type"]], stream, idents, message)
    kernel._publish_status("idle", "shell", parent=message)
    return True


def _call(handler: Callable[..., Any], stream: Any, idents: Any, message: Any) -> None:
    try:
        waited = handler(stream, idents, message)
        if inspect.iscoroutine(waited):  # these wait for nothing: one push brings them to their end
            try:
                waited.send(None)
            except StopIteration:
                pass
            finally:
                waited.close()
    except Exception:  # as the kernel does: a callback that fails must not end the cell that waits
        logger.exception("A button of the notebook failed.")
