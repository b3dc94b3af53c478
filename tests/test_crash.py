"""Why a web UI ended: how its process ended comes first, and no line that every log has explains anything."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fastsd_helpers.device import count_memory_kills, find_memory_left, find_memory_limit
from fastsd_helpers.webui import find_places, find_ui
from fastsd_helpers.webui.running.circumstances import Circumstances, find_store_trouble, look_around
from fastsd_helpers.webui.running.crash import explain_crash, explain_refusal
from fastsd_helpers.webui.running.last_words import is_noise

# What every log of AUTOMATIC1111 on a CPU has, with an extension that could not be loaded and an error that a visitor
# met, all of which it outlives.
HARMLESS = """
fatal: No names found, cannot describe anything.
Python 3.11.7 (main, Dec  4 2023, 18:10:11) [GCC 12.2.0]
Launching Web UI with arguments: --port 7860
Warning: caught exception 'Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU.'
*** Error loading script: swap.py
    Traceback (most recent call last):
      File "/content/fastsd/a1111/code/modules/scripts.py", line 515, in load_scripts
        script_module = script_loading.load_module(scriptfile.path)
      File "/content/fastsd/a1111/data/extensions/sd-face-swap/scripts/swap.py", line 3, in <module>
        import insightface
    ModuleNotFoundError: No module named 'insightface'
---
Startup time: 11.3s (import torch: 6.0s).
Model loaded in 3.1s (load weights from disk: 0.4s).
*** Error completing request
    Traceback (most recent call last):
      File "/content/fastsd/a1111/code/modules/call_queue.py", line 74, in f
    torch.cuda.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB
---
Total progress: 20it
Applying attention optimization: sdp... done.
""".strip().splitlines()


def uncaught(error: str, *files: str) -> list[str]:
    frames = [line for file in files for line in (f'  File "{file}", line 3, in work', "    work()")]
    return ["Traceback (most recent call last):", '  File "/code/launch.py", line 48, in <module>', *frames, error]


CODE = "/content/fastsd/a1111/code/modules/x.py"
EXTENSION = "/content/fastsd/a1111/data/extensions/sd-face-swap/scripts/swap.py"
NODES = "/content/fastsd/comfyui/data/custom_nodes/comfyui-depth/nodes.py"


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (-15, "was stopped from outside (exit -15)"),
        (143, "was stopped from outside (exit 143)"),
        (-2, "was stopped from outside"),
        (-1, "was stopped from outside"),
        (-11, "crashed in compiled code (segmentation fault, exit -11)"),
        (139, "crashed in compiled code (segmentation fault, exit 139)"),
        (-4, "illegal CPU instruction"),
        (-9, "RAM was not enough"),
        (-12, "was ended by the signal SIGUSR2"),
        (0, "ended without an error (exit 0)"),
        (7, "ended by itself (exit 7). Its last line: Applying attention"),
        (1, "ended by itself (exit 1). Its last line: Applying attention"),
        (None, "ended by itself. Its last line: Applying attention"),
        (300, "ended by itself (exit 300)"),
    ],
)
def test_lines_that_every_log_has_explain_no_end(code: int | None, said: str) -> None:
    problem = explain_crash("AUTOMATIC1111", code, HARMLESS).problem
    assert said in problem
    for wrong in ("GPU", "insightface", "sd-face-swap", "module"):
        assert wrong not in problem


@pytest.mark.parametrize(
    ("error", "files", "said", "hint"),
    [
        ("ModuleNotFoundError: No module named 'gradio'", [CODE], "lacks the module gradio", "fastsd webui install"),
        (
            "ModuleNotFoundError: No module named 'insightface'",
            [CODE, EXTENSION],
            "ended by an error in the extension sd-face-swap: its environment lacks the module insightface",
            "--remove-extensions sd-face-swap",
        ),
        (
            "KeyError: 'depth'",
            [CODE, NODES, CODE],
            "in the extension comfyui-depth (exit 1): KeyError",
            "comfyui-depth",
        ),
        (
            "OSError: [Errno 28] No space left on device: '/content/x'",
            [CODE, EXTENSION],
            "in the extension sd-face-swap: the disk is full",
            "Free some space",
        ),
        ("sqlite3.OperationalError: database or disk is full", [CODE], "the disk is full", "Free some space"),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried", [CODE], "the GPU's memory", "vram"),
        ("RuntimeError: Found no NVIDIA driver on your system.", [CODE], "found no usable GPU", "Select a GPU runtime"),
        (
            "RuntimeError: [enforce fail] DefaultCPUAllocator: can't allocate memory",
            [CODE],
            "the machine's RAM was not enough",
            "smaller model",
        ),
        (
            "OSError: [Errno 107] Transport endpoint is not connected",
            [CODE],
            "Drive was lost",
            "Drive",
        ),
        ("json.decoder.JSONDecodeError: Expecting value: line 1", [CODE], "settings is damaged", "config.json"),
        ("ZeroDivisionError: division by zero", [CODE], "ended by an error (exit 1): ZeroDivisionError", "webui log"),
    ],
)
def test_the_error_it_ended_with_is_the_cause(error: str, files: list[str], said: str, hint: str) -> None:
    caught = explain_crash("AUTOMATIC1111", 1, [*HARMLESS, *uncaught(error, *files)])
    assert said in caught.problem
    assert hint in caught.hint


def test_of_an_error_that_follows_from_another_the_last_one_counts() -> None:
    lines = [
        *uncaught("FileNotFoundError: [Errno 2] No such file or directory: 'x.json'", CODE),
        "During handling of the above exception, another exception occurred:",
        *uncaught("ValueError: no settings", EXTENSION),
    ]
    assert "sd-face-swap (exit 1): ValueError: no settings" in explain_crash("A", 1, lines).problem


def test_a_web_ui_without_a_model_is_told_where_to_put_one() -> None:
    # As AUTOMATIC1111 v1.10.1 says it, in a thread that it outlives.
    error = "FileNotFoundError: No checkpoints found. When searching for checkpoints, looked at:"
    lines = ["loading stable diffusion model: FileNotFoundError", *uncaught(error, CODE)]
    lines = [*lines, " - file /code/model.ckpt", "Stable diffusion model failed to load"]
    caught = explain_refusal("A", lines, find_ui("a1111").refused)
    assert caught.problem == "A is running, but has no model yet."
    assert "fastsd webui place sd15" in caught.hint
    assert "Its last line" in explain_crash("A", 1, lines).problem, "and that is not what ended it"


def test_an_error_in_a_thread_and_one_long_before_the_end_are_no_cause() -> None:
    thread = ["Exception in thread Thread-5 (watch):", *uncaught("KeyError: 'x'", EXTENSION)]
    assert "Its last line" in explain_crash("A", 1, [*thread, "Saving settings"]).problem
    early = [*uncaught("KeyError: 'x'", EXTENSION), *(f"{n}it [00:01]" for n in range(20))]
    assert "Its last line: 19it" in explain_crash("A", 1, early).problem
    assert "Its last line" in explain_crash("A", 5, uncaught("KeyError: 'x'")).problem, "Python ends with 1 for errors"


def test_what_is_said_last_without_a_traceback_counts_too() -> None:
    lines = [*HARMLESS, "usage: launch.py [-h]", "launch.py: error: unrecognized arguments: --xx"]
    assert "does not know the argument --xx" in explain_crash("A", 2, lines).problem
    lines = [*HARMLESS, "launch.py: error: argument --port: invalid int value: 'x'"]
    assert "rejects the argument --port" in explain_crash("A", 2, lines).problem
    lines = [*HARMLESS, "ERROR:    [Errno 98] error while attempting to bind on address ('127.0.0.1', 7861)"]
    assert "its port is in use" in explain_crash("A", 3, lines).problem
    lines = [*HARMLESS, "Interrupted with signal 2 in <frame at 0x7f>"]
    assert "was stopped from outside" in explain_crash("A", 0, lines).problem


def test_memory_and_disk_at_the_end_decide_where_the_log_is_silent() -> None:
    full = Circumstances(disk_left=10**6, memory_left=3 * 10**9, memory_bytes=12 * 10**9)
    for code in (1, None, -7, -6):
        assert "the disk is full" in explain_crash("A", code, HARMLESS, around=full).problem
    lost = Circumstances(store_lost=True)
    for code in (1, None, -7):
        assert "connection to Drive was lost" in explain_crash("A", code, HARMLESS, around=lost).problem
    killed = Circumstances(killed_for_memory=True)
    assert "(exit -9): the machine's RAM was not enough" in explain_crash("A", -9, HARMLESS, around=killed).problem
    assert "RAM was not enough" in explain_crash("A", None, HARMLESS, around=killed).problem
    other = Circumstances(killed_for_memory=False, memory_left=5 * 10**9, memory_bytes=12 * 10**9, disk_left=10**10)
    caught = explain_crash("A", -9, HARMLESS, around=other)
    assert "was killed (exit -9)" in caught.problem
    assert "RAM 5.0 of 12.0 GB, disk 10.0 GB" in caught.problem
    assert "Free when it ended" in explain_crash("A", 7, HARMLESS, around=other).problem


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGABRT", "SIGFPE", "SIGILL"])
def test_a_real_crash_of_compiled_code_names_the_extension_that_called_it(tmp_path: Path, name: str) -> None:
    file = tmp_path / "extensions" / "sd-fast-math" / "scripts" / "fast.py"
    file.parent.mkdir(parents=True)
    file.write_text(f"import os, signal\ndef work():\n    os.kill(os.getpid(), signal.{name})\n")
    code = f"import sys; sys.path.insert(0, {str(file.parent)!r})\nimport fast\nfast.work()\n"
    (tmp_path / "launch.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "launch.py"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == -getattr(signal, name)
    lines = [*HARMLESS, *(done.stdout + done.stderr).splitlines()]
    said = explain_crash("A", done.returncode, lines).problem
    assert "crashed in the extension sd-fast-math" in said
    assert explain_crash("A", None, lines).problem == said, "its log tells the signal to whom the exit is not known"
    gone_on = explain_crash("A", None, [*lines, "Total progress: 20it"]).problem
    assert "crashed" not in gone_on, "a program that it had started, and outlived"


def test_a_model_that_is_overwritten_in_use_is_told_and_no_extension_is_blamed(tmp_path: Path) -> None:
    file = tmp_path / "custom_nodes" / "comfyui-reads" / "read.py"
    file.parent.mkdir(parents=True)
    file.write_text(
        "import mmap, os, sys\n"
        "def work(path):\n"
        "    with open(path, 'r+b') as model:\n"
        "        held = mmap.mmap(model.fileno(), 0)\n"
        "        os.truncate(path, 0)\n"
        "        sys.stderr.write('  0%|     | 0/1 [00:00<?, ?it/s]')\n"
        "        return held[5000]\n"
    )
    model = tmp_path / "model.safetensors"
    model.write_bytes(b"w" * 10_000)
    code = f"import sys; sys.path.insert(0, {str(file.parent)!r})\nimport read\nread.work({str(model)!r})\n"
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == -signal.SIGBUS
    for number in (done.returncode, 135, None):
        said = explain_crash("A", number, [*HARMLESS, *done.stderr.splitlines()])
        assert "a model was overwritten while it was in use" in said.problem
        assert "comfyui-reads" not in f"{said.problem} {said.hint}"
        assert "under another name" in said.hint
    lost = explain_crash("A", None, done.stderr.splitlines(), around=Circumstances(store_lost=True))
    assert "connection to Drive was lost" in lost.problem


def test_an_abort_says_what_was_thrown() -> None:
    lines = [*HARMLESS, "terminate called after throwing an instance of 'c10::Error'", "  what():  CUDA error"]
    assert "the GPU or its driver failed" in explain_crash("A", -6, lines).problem
    lines = [
        *HARMLESS,
        "terminate called after throwing an instance of 'std::x'",
        "  what():  vector::reserve",
    ]
    assert "It said: vector::reserve." in explain_crash("A", -6, lines).problem


def test_a_refused_model_is_explained_by_the_error_before_it() -> None:
    refused = find_ui("a1111").refused
    lines = [*HARMLESS, *uncaught("safetensors_rust.SafetensorError: HeaderTooLarge", CODE)]
    lines = [*lines, "Stable diffusion model failed to load", "Applying attention optimization: sdp... done."]
    assert "damaged" in explain_refusal("A", lines, refused).problem
    other = [*HARMLESS, *uncaught("RuntimeError: shapes do not fit", CODE), "Stable diffusion model failed to load"]
    assert "RuntimeError: shapes do not fit" in explain_refusal("A", other, refused).problem


# ------------------------------------------------------------------------------------------------ the container

GIB = 2**30


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": f"{12 * GIB}\n"}, 12 * GIB),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "max\n"}, None),
        (
            {
                "proc/self/cgroup": "0::/user.slice/job.scope\n",
                "sys/fs/cgroup/user.slice/memory.max": f"{8 * GIB}",
                "sys/fs/cgroup/user.slice/job.scope/memory.max": "max",
            },
            8 * GIB,
        ),
        # The path is that of the host, and the container sees its own group as the root.
        (
            {"proc/self/cgroup": "4:memory:/docker/abc\n", "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{4 * GIB}"},
            4 * GIB,
        ),
        (
            {
                "proc/self/cgroup": "5:cpu,memory:/job\n0::/\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
                "sys/fs/cgroup/memory/job/memory.limit_in_bytes": f"{6 * GIB}",
            },
            6 * GIB,
        ),
        ({"sys/fs/cgroup/memory.max": f"{2 * GIB}"}, 2 * GIB),
        ({}, None),
    ],
)
def test_the_memory_limit_is_that_of_the_container(tmp_path: Path, files: dict[str, str], limit: int | None) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert find_memory_limit(tmp_path) == limit
    assert count_memory_kills(tmp_path) is None


def test_programs_ended_for_lack_of_memory_are_counted_and_what_is_left(tmp_path: Path) -> None:
    group = tmp_path / "sys" / "fs" / "cgroup"
    group.mkdir(parents=True)
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "vmstat").write_text("nr_free_pages 5\noom_kill 2\n")
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 99 kB\nMemAvailable:   20000000 kB\n")
    (group / "memory.events").write_text("low 0\noom 3\noom_kill 1\n")
    (group / "memory.max").write_text(str(4 * GIB))
    (group / "memory.current").write_text(str(3 * GIB))
    (group / "memory.stat").write_text(f"anon 1\ninactive_file {GIB // 2}\n")
    assert count_memory_kills(tmp_path) == 3
    assert find_memory_left(tmp_path) == GIB + GIB // 2


def test_the_flags_follow_the_limit_of_the_container(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastsd_helpers import device
    from fastsd_helpers.webui.flags import describe_machine

    monkeypatch.setattr(device, "find_memory_limit", lambda: 3 * GIB)
    assert describe_machine(device.Device("cuda", "T4", 15 * GIB, False, (7, 5))).host_gib == pytest.approx(3)


def test_the_machine_is_looked_at_when_it_has_ended(tmp_path: Path) -> None:
    places = find_places(find_ui("a1111"), folder=tmp_path / "programs", store=tmp_path / "store")
    places.store.mkdir()  # as a start does
    around = look_around(places, count_memory_kills())
    assert around.memory_left > 0
    assert around.disk_left > 0
    assert not around.killed_for_memory
    assert not around.store_lost
    assert look_around(places, None).killed_for_memory is None


def test_advice_that_would_break_the_environment_is_kept_from_the_start() -> None:
    for line in (
        "[WARNING] WARNING: You need pytorch with cu130 or higher to use optimized CUDA operations.",
        "WARNING WARNING WARNING",
        "If you are on nvidia 20 series and above it is required that you update your pytorch to cu130 or higher.",
        "To create a public link, set `share=True` in `launch()`.",  # it would have no login of ours
        "fatal: No names found, cannot describe anything.",
        "fatal: No tags can describe '82a973c04367123ae98bd9abdf80d9eda9b910e2'.",
    ):
        assert is_noise(line, on_cpu=False), line
    for line in ("[WARNING] clip missing: ['text_projection.weight']", "[INFO] pytorch version: 2.10.0+cu128"):
        assert not is_noise(line, on_cpu=True), line


def test_a_web_ui_that_outlives_its_store_says_so_until_it_is_back(tmp_path: Path) -> None:
    places = find_places(find_ui("comfyui"), folder=tmp_path / "programs", store=tmp_path / "drive" / "store")
    places.store.mkdir(parents=True)
    assert find_store_trouble("ComfyUI", places) is None
    (tmp_path / "drive").rename(tmp_path / "away")
    trouble = find_store_trouble("ComfyUI", places)
    assert str(places.store) in trouble.problem
    assert "need not be started again" in trouble.hint
    assert look_around(places, None).store_lost
    (tmp_path / "away").rename(tmp_path / "drive")
    assert find_store_trouble("ComfyUI", places) is None
