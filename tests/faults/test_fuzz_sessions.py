"""Sessions live through random steps and kills, and lose nothing; scripts/fuzz_sessions.py does it 200 times."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from forked import TRAINING

pytest.importorskip("torch")

REPOSITORY = Path(__file__).resolve().parents[2]


def fuzz(forks: Any, tmp_path: Path, *words: str, prepend: str = "") -> "subprocess.CompletedProcess[str]":
    """Run the script; with `prepend`, after some lines that put a fault in."""
    script = REPOSITORY / "scripts" / "fuzz_sessions.py"
    path = [str(REPOSITORY), str(REPOSITORY / "tests")]
    start = f"import sys, runpy\nsys.argv = {[str(script), *words]!r}\nsys.path[:0] = {path!r}\n"
    code = f"{start}{prepend}\nrunpy.run_path({str(script)!r}, run_name='__main__')"
    return forks(*TRAINING).run(["-c", code], env={**os.environ, "TMPDIR": str(tmp_path)})


def test_five_random_lives_of_sessions_lose_nothing(forks: Any, tmp_path: Path) -> None:
    done = fuzz(forks, tmp_path, "--sequences", "5", "--seed", "7", "--steps", "10")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Nothing lost in 5 sequences" in done.stdout


def test_a_caption_written_after_a_prepare_that_was_killed_stays(tmp_path: Path) -> None:
    from fastsd_helpers.demo import SUBJECTS_FOLDER
    from fastsd_helpers.dreambooth import PrepareConfig, prepare
    from fastsd_helpers.dreambooth.dataset.captioning import prompt_rows, set_caption
    from fastsd_helpers.sessions import Session

    images = str(SUBJECTS_FOLDER / "robot")
    session = Session.create("rex", root=tmp_path)
    prepare(PrepareConfig(images=images, size=64), session)
    words = ["dreambooth", "prepare", "rex", "--root", str(tmp_path), "--images", images, "--size", "96"]
    environment = {**os.environ, "FASTSD_FAULT": "prepare.before_record:1"}
    killed = subprocess.run([sys.executable, "-m", "fastsd_helpers", *words], env=environment, capture_output=True)
    assert killed.returncode == -9
    session = Session.open("rex", root=tmp_path)
    set_caption(session, prompt_rows(session)[0].image, "zib robot at the sea")
    prepare(PrepareConfig(images=images, size=64), session)  # which brings the exchange that was cut to its end
    assert "zib robot at the sea" in [row.prompt for row in prompt_rows(session)]


ONE_IDENTITY = """
from fastsd_helpers.sessions import session
session.needs_settling = lambda *_: False
"""
ONE_KEY = """
from faults import stand_in
begin = stand_in.StandInJob.__init__
stand_in.StandInJob.__init__ = lambda self, *rest, key="", **more: begin(self, *rest, **more)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "words"),
    [(ONE_IDENTITY, "have one identity"), (ONE_KEY, "is not what a run without a kill has learned")],
    ids=["a copy keeps the id", "segments share their randomness"],
)
def test_faults_that_are_put_in_are_found(forks: Any, tmp_path: Path, fault: str, words: str) -> None:
    done = fuzz(forks, tmp_path, "--sequences", "12", "--seed", "1", prepend=fault)
    assert done.returncode == 1, done.stdout + done.stderr
    assert words in done.stdout
