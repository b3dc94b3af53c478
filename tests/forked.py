"""Python processes that need not import PyTorch and its kin anew each time: a server that has imported them forks them.

For tests that kill processes or have one go on where another stopped. What a process imports, and what a new
interpreter is like (its order of sets, its random seeds), such a process does not show: at least one run of a test that
compares runs is a new interpreter. The server has one thread and has run none of our code, only imported it.
"""

import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["READING", "START_TOGETHER", "TRAINING", "ForkServer", "ForkedProcess", "free_port"]

# What reading lines and teaching a reader import.
READING = (
    *("torch", "accelerate", "jiwer", "peft", "transformers.models.trocr.modeling_trocr"),
    *(
        "transformers.models.vision_encoder_decoder.modeling_vision_encoder_decoder",
        "fastsd_helpers.trocr.teaching.trainer",
    ),
)

# What a training imports, and what tests of it do.
TRAINING = (
    *("torch", "accelerate", "peft", "diffusers.models.unets.unet_2d_condition", "diffusers.models.autoencoders"),
    *("diffusers.schedulers.scheduling_ddim", "diffusers.schedulers.scheduling_ddpm", "matplotlib.figure"),
    *("transformers.models.clip.modeling_clip", "transformers.models.clip.tokenization_clip"),
    *("fastsd_helpers.cli", "fastsd_helpers.dreambooth", "torch.utils.tensorboard", "dreambooth_runs"),
    "fastsd_helpers.dreambooth.results.learned",  # which imports the rest of ours
)

# What `accelerate launch` gives each process it starts; forked here, because importing takes longer than training.
START_TOGETHER = """
import os, sys
count, port, out, *words = sys.argv[1:]
from fastsd_helpers.cli import main
from fastsd_helpers.processes import take_place
started = []
for rank in range(int(count)):
    pid = os.fork()
    if pid == 0:
        if int(count) > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        if out:
            os.dup2(os.open(f"{out}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), 1)
        take_place()
        code = 1
        try:
            code = main(words)
        except SystemExit as end:
            code = end.code
        finally:
            os._exit(code or 0)
    started.append(pid)
codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in started]
sys.exit(0 if not any(codes) else 9 if -9 in codes else max(codes))
"""

_TESTS = Path(__file__).resolve().parent


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


class ForkedProcess:
    """A process of the server, with what tests use of `subprocess.Popen`."""

    def __init__(self, answers: Any, out: Path, err: Path) -> None:
        self._answers, self._files = answers, (out, err)
        self.pid: int = json.loads(answers.readline())
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit status, below 0 for a signal; None while it runs."""
        if self.returncode is None and select.select([self._answers], [], [], 0)[0]:
            self.wait()
        return self.returncode

    def wait(self) -> int:
        """Wait for its end."""
        if self.returncode is None:
            self.returncode = json.loads(self._answers.readline())
        return self.returncode

    def said(self) -> tuple[str, str]:
        """What it has written so far to standard output and standard error."""
        out, err = (path.read_text(encoding="utf-8") for path in self._files)
        return out, err

    def send_signal(self, number: int) -> None:
        """As `kill` does."""
        if self.poll() is None:
            os.kill(self.pid, number)


class ForkServer:
    """A server that has imported modules; one process at a time.

    Args:
        modules: what it imports of these, where they are installed. A process that needs more imports it itself.
    """

    def __init__(self, modules: Sequence[str]) -> None:
        self._modules = modules

    def __enter__(self) -> "ForkServer":
        environment = {name: value for name, value in os.environ.items() if not name.startswith("FASTSD_FAULT")}
        environment |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        environment |= {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join([str(_TESTS.parent), str(_TESTS)])}
        self._files = tempfile.TemporaryDirectory(prefix="fastsd-forks-")
        self._server = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), *self._modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
            bufsize=1,
        )
        return self

    def __exit__(self, *_error: object) -> None:
        self._server.stdin.close()
        self._server.wait(30)
        self._server.stdout.close()
        self._files.cleanup()

    def start(self, words: Sequence[object], *, env: Mapping[str, str] | None = None) -> ForkedProcess:
        """Begin what `python WORDS` would do (`-c`, `-m` or a file); the next may begin when it has ended."""
        request = {"words": list(map(str, words)), "env": dict(os.environ if env is None else env), "cwd": os.getcwd()}
        out, err = (Path(self._files.name) / name for name in ("out", "err"))
        self._server.stdin.write(json.dumps(request | {"out": str(out), "err": str(err)}) + "\n")
        return ForkedProcess(self._server.stdout, out, err)

    def run(
        self, words: Sequence[object], *, env: Mapping[str, str] | None = None
    ) -> "subprocess.CompletedProcess[str]":
        """Run it to its end, as `subprocess.run(..., capture_output=True, text=True)` does."""
        process = self.start(words, env=env)
        status = process.wait()
        return subprocess.CompletedProcess(list(words), status, *process.said())


def _serve() -> None:
    """Answer each line, a request, with two: the new process's number, and when it has ended its status."""
    answers = os.dup(1)
    os.dup2(2, 1)
    gc.disable()  # which spares a fifth of the time of imports
    for module in sys.argv[1:]:
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    gc.freeze()
    gc.enable()
    for line in iter(sys.stdin.buffer.raw.readline, b""):
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os.close(answers)
            _become(request)
            return
        os.write(answers, b"%d\n" % pid)
        _, status = os.waitpid(pid, 0)
        os.write(answers, b"%d\n" % os.waitstatus_to_exitcode(status))


def _become(request: dict[str, Any]) -> None:
    """Be what a new interpreter with these words, environment and folder is."""
    for name, place in (("out", 1), ("err", 2)):
        handle = os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(handle, place)
        os.close(handle)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    tempfile.tempdir = None
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _seed_anew()
    option, *rest = request["words"]
    main = type(sys)("__main__")
    sys.modules["__main__"] = main
    sys.orig_argv = [sys.executable, *request["words"]]
    if option == "-m":
        sys.argv, sys.path[0] = rest, request["cwd"]
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif option == "-c":
        sys.argv, sys.path[0] = ["-c", *rest[1:]], ""
        exec(compile(rest[0], "<string>", "exec"), main.__dict__)
    else:
        sys.argv, sys.path[0] = request["words"], str(Path(option).parent)
        runpy.run_path(option, run_name="__main__")


def _seed_anew() -> None:
    """Random numbers differ from process to process, as those of new interpreters do."""
    import random

    random.seed()
    with contextlib.suppress(ImportError):
        import numpy

        numpy.random.seed()


if __name__ == "__main__":
    _serve()
