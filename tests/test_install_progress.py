"""A long installation says which large packages have arrived; a failure's sentence is not about progress."""

import logging

import pytest

from fastsd_helpers.wheels.progress import Progress

UV = """Using Python 3.11.7 environment at: env
Resolved 3 packages in 528ms
Downloading torch (846.8MiB)
Downloading networkx (1.7MiB)
Downloading nvidia-cublas-cu12 (566.8MiB)
 Downloaded networkx
 Downloaded torch
 Downloaded nvidia-cublas-cu12
Prepared 3 packages in 2.29s
Installed 3 packages in 79ms
 + torch==2.8.0
"""
PIP = """Collecting torch==2.8.0
  Downloading torch-2.8.0-cp311-cp311-manylinux_2_28_x86_64.whl (888.0 MB)
Collecting six==1.17.0
  Downloading six-1.17.0-py2.py3-none-any.whl (11 kB)
Installing collected packages: six, torch
Successfully installed six-1.17.0 torch-2.8.0
"""


@pytest.mark.parametrize(
    ("text", "said", "rest"),
    [
        (
            UV,
            [
                "  downloading torch (847 MB)",
                "  downloading nvidia-cublas-cu12 (567 MB)",
                "  torch is here, 848 MB of the large ones so far; still downloading: nvidia-cublas-cu12",
                "  nvidia-cublas-cu12 is here, 1415 MB of the large ones so far",
                "  everything is downloaded and is being installed",
            ],
            4,
        ),
        (PIP, ["  downloading torch (888 MB)", "  everything is downloaded and is being installed"], 3),
    ],
)
def test_what_has_arrived_is_said(text: str, said: list[str], rest: int, caplog: pytest.LogCaptureFixture) -> None:
    progress = Progress()
    with caplog.at_level(logging.INFO, "fastsd_helpers"):
        other = [line for line in text.splitlines() if not progress.take(line)]
    assert [record.getMessage() for record in caplog.records] == said
    assert len(other) == rest
    assert not [line for line in other if "networkx" in line], "a name that looks like an error's word"
