"""A click arrives while a cell waits, in the kernel of today and in Colab's; other messages keep their turn."""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastsd_helpers.forms.widgets import polling

pytest.importorskip("ipykernel")
jupyter_client = pytest.importorskip("jupyter_client")

ROOT = Path(__file__).resolve().parents[1]
OVERLAY = ROOT / ".venv-ipywidgets7"


class Kernel:
    """A real kernel, and what its client hears."""

    def __init__(self, client: Any) -> None:
        self.client = client

    def run(self, code: str) -> str:
        """Run a cell and return what it printed, or its traceback."""
        wanted = self.client.execute(code)
        return self.hear({wanted: "cell"}, "cell")[1]

    def hear(self, names: dict[str, str], last: str, timeout_s: float = 120) -> tuple[list[str], str]:
        """Listen until the message named `last` is done: (states in order, everything printed)."""
        states, said = [], []
        while True:
            message = self.client.get_iopub_msg(timeout=timeout_s)
            name = names.get(message["parent_header"].get("msg_id", ""))
            content = message["content"]
            if name is None:
                continue
            if message["msg_type"] == "stream":
                said.append(content["text"])
            elif message["msg_type"] == "error":
                said += content["traceback"]
            elif message["msg_type"] == "status":
                states.append(f"{name} {content['execution_state']}")
                if states[-1] == f"{last} idle":
                    return states, "".join(said)


@contextlib.contextmanager
def start_kernel(paths: list[Path]) -> Iterator[Kernel]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, [*paths, ROOT]))}
    manager = jupyter_client.KernelManager(kernel_name="python3")
    manager.start_kernel(env=environment)
    client = manager.blocking_client()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=120)
        yield Kernel(client)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


@pytest.mark.slow
@pytest.mark.notebook
@pytest.mark.parametrize("which", ["installed", "colab"])
def test_a_click_is_answered_while_a_cell_waits_and_cells_keep_their_turn(which: str) -> None:
    if which == "colab" and not (OVERLAY / "ipykernel").is_dir():
        pytest.skip(f"{OVERLAY.name} has no ipykernel; `make setup` makes it")
    with start_kernel([OVERLAY] if which == "colab" else []) as kernel:
        version = kernel.run("import ipykernel; print(ipykernel.__version__)")
        assert version.startswith("6.17.") == (which == "colab"), version
        made = kernel.run(
            "import time, ipywidgets\n"
            "from fastsd_helpers.forms.widgets.polling import answer_widgets\n"
            "button, hits = ipywidgets.Button(), []\n"
            "button.on_click(lambda _: (hits.append(1), print('clicked')))\n"
            "print(button.comm.comm_id)"
        )
        waiting = kernel.client.execute(
            "end = time.time() + 60\n"
            "while time.time() < end and not hits:\n    answer_widgets(); time.sleep(0.05)\n"
            "print('waited', len(hits))"
        )
        following = kernel.client.execute("print('next cell', len(hits))")
        data = {"comm_id": made.strip(), "data": {"method": "custom", "content": {"event": "click"}}}
        click = kernel.client.session.msg("comm_msg", data)
        time.sleep(1)
        kernel.client.shell_channel.send(click)
        names = {waiting: "waiting", following: "following", click["header"]["msg_id"]: "click"}
        states, said = kernel.hear(names, "following")
        assert said.split("\n") == ["clicked", "waited 1", "next cell 1", ""]
        # The page sends a widget's next change only after "idle".
        order = ["waiting busy", "click busy", "click idle", "waiting idle", "following busy", "following idle"]
        assert states == order
        assert kernel.run("print('alive')") == "alive\n"


@pytest.mark.slow
@pytest.mark.notebook
@pytest.mark.parametrize("which", ["installed", "colab"])
def test_a_page_that_is_loaded_anew_gets_its_answers_while_a_cell_waits(which: str) -> None:
    if which == "colab" and not (OVERLAY / "ipykernel").is_dir():
        pytest.skip(f"{OVERLAY.name} has no ipykernel; `make setup` makes it")
    with start_kernel([OVERLAY] if which == "colab" else []) as kernel:
        made = kernel.run(
            "import time, ipywidgets\n"
            "from fastsd_helpers.forms.widgets.polling import answer_widgets\n"
            "button, hits = ipywidgets.Button(), []\n"
            "button.on_click(lambda _: hits.append(1))\n"
            "print(button.comm.comm_id)"
        ).strip()
        waiting = kernel.client.execute(
            "end = time.time() + 60\n"
            "while time.time() < end and not hits:\n    answer_widgets(); time.sleep(0.05)\n"
            "print('waited', len(hits))"
        )
        time.sleep(1)
        asked = [kernel.client.kernel_info(), kernel.client.comm_info(target_name="jupyter.widget")]
        answers = {}
        while not set(asked) <= set(answers):
            answer = kernel.client.get_shell_msg(timeout=60)
            answers[answer["parent_header"]["msg_id"]] = answer["content"]
        assert answers[asked[0]]["status"] == "ok"
        assert made in answers[asked[1]]["comms"], "the page finds the button that the cell shows"
        data = {"comm_id": made, "data": {"method": "custom", "content": {"event": "click"}}}
        kernel.client.shell_channel.send(kernel.client.session.msg("comm_msg", data))
        _states, said = kernel.hear({waiting: "waiting"}, "waiting")
        assert said == "waited 1\n"
        assert kernel.run("print('alive')") == "alive\n"


def test_outside_a_kernel_there_is_nothing_to_answer(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("DEBUG"):
        polling.answer_widgets()
    assert caplog.text == ""


def test_a_kernel_whose_insides_have_moved_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Moved:
        msg_queue = None

    monkeypatch.setattr(polling, "_kernel", lambda: Moved())
    with caplog.at_level("DEBUG"):
        polling.answer_widgets()
    assert "could not be answered" in caplog.text
