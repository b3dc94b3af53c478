"""Train and read on several processes of this machine's CPU, as on several GPUs, and compare with one, bit for bit.

    python scripts/several_processes.py [--only NAME ...] [--write]

Every run is the command `fastsd dreambooth train`, which starts its processes with `accelerate launch`; two machines
are two launches on this one that meet at a port. `--write` records the table in
benchmarks/results/several_processes.md; with `--only`, the other rows stay. It takes about 20 minutes on two cores.
"""

import argparse
import datetime
import functools
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests"), str(REPOSITORY / "scripts")]
RESULTS = REPOSITORY / "benchmarks" / "results" / "several_processes.md"
FULL = ["--unet-steps=3", "--text-encoder-steps=2", "--sample-every=0", "--unet-lr=1e-4", "--text-encoder-lr=1e-4"]
LORA = ["--method=lora", "--unet-steps=4", "--text-encoder-steps=2", "--sample-every=0", "--save-every=1"]
# A process that is not the first is killed at each phase; at a sample and a save it waits for the first one.
PHASES = {
    "cache": ("cache@1:2", []),
    "step": ("step.unet@1:2", []),
    "save": ("waiting@1:3", []),
    "save, the first process": ("checkpoint.write:3", []),
    "sample": ("waiting@1:1", ["--save-every=0", "--sample-every=1"]),
    "export": ("finish.begin@1:1", []),
    "export, the first process": ("finish.begin:1", []),
}


class World:
    """A prepared session of the demo, and copies of it that are trained."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.command = [sys.executable, "-m", "fastsd_helpers", "dreambooth"]
        self.env = dict(os.environ) | {"PYTHONPATH": str(REPOSITORY), "FASTSD_SCRATCH": str(folder / "scratch")}

    @functools.cached_property
    def begun(self) -> Path:
        """The sessions folder with the one that was prepared."""
        photos = REPOSITORY / "fastsd_helpers" / "demo" / "subjects" / "robot"
        root = f"--root={self.folder / 'begun'}"
        for words in (["new", "robot", root], ["prepare", "robot", root, f"--images={photos}", "--size=64"]):
            subprocess.run([*self.command, *words], env=self.env, check=True, capture_output=True)
        return self.folder / "begun"

    def words(self, name: str, *flags: str) -> list[str]:
        """The words that train a copy of the session by this name."""
        root = self.folder / name
        if not root.exists():
            shutil.copytree(self.begun, root)
        fixed = ["--base-model=demo", "--resolution=64", "--batch-size=2", "--precision=fp32", "--json"]
        return ["train", "robot", f"--root={root}", *fixed, *flags]

    def train(self, name: str, *flags: str, fault: str = "") -> dict:
        """Train it; returns the command's answer."""
        env = self.env | ({"FASTSD_FAULT": fault} if fault else {})
        ended = subprocess.run([*self.command, *self.words(name, *flags)], env=env, capture_output=True, text=True)
        lines = ended.stdout.strip().splitlines()
        return json.loads(lines[-1]) if lines else {"error": ended.stderr[-400:]}

    def stop_after_a_step(self, name: str, *flags: str) -> dict:
        """Train it, and ask the command to end once it has told of a step of the U-Net; returns its answer."""
        command = [*self.command, *self.words(name, *flags)]
        began = subprocess.Popen(command, env=self.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for line in began.stderr or ():
            if line.startswith("unet 1 of"):
                began.terminate()
        return json.loads((began.communicate()[0]).strip().splitlines()[-1])

    def on_two_machines(self, name: str, *flags: str) -> dict:
        """Train it with two launches that are configured as `accelerate config` does for two machines."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        started = []
        for rank in range(2):
            settings = {
                "compute_environment": "LOCAL_MACHINE",
                "distributed_type": "MULTI_GPU",
                "gpu_ids": "all",
                "machine_rank": rank,
                "main_process_ip": "127.0.0.1",
                "main_process_port": port,
                "mixed_precision": "no",
                "num_machines": 2,
                "num_processes": 2,
                "rdzv_backend": "static",
                "same_network": True,
            }
            file = self.folder / f"machine-{rank}.json"
            file.write_text(json.dumps(settings), encoding="utf-8")
            launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file)]
            command = [*launch, "-m", "fastsd_helpers", "dreambooth", *self.words(name, *flags)]
            started.append(subprocess.Popen(command, env=self.env, stdout=subprocess.PIPE, text=True))
        answers = [process.communicate()[0].strip().splitlines() for process in started]
        return json.loads(answers[0][-1]) if answers[0] else {"error": "no answer"}

    def in_a_notebook(self, name: str, gpus: int) -> tuple[int, bool]:
        """Train as a notebook's cell does, on a machine that seems to have GPUs.

        Returns:
            the processes that were used, and whether the cell saw its own child's progress.
        """
        from fastsd_helpers.dreambooth import DreamBoothConfig
        from fastsd_helpers.dreambooth.running.child_process import start_training
        from fastsd_helpers.sessions import Session

        self.words(name)
        seeming = self.folder / "seeming"
        seeming.mkdir()
        text = f"import torch\ntorch.cuda.device_count = lambda: {gpus}\n"
        (seeming / "sitecustomize.py").write_text(text, encoding="utf-8")
        os.environ |= self.env | {"PYTHONPATH": os.pathsep.join([str(seeming), str(REPOSITORY)])}
        session = Session.open("robot", root=self.folder / name)
        steps = {"unet_steps": 4, "text_encoder_steps": 2, "sample_every": 0, "save_every": 1}
        fixed = {"base_model": "demo", "resolution": 64, "batch_size": 2, "precision": "fp32", "method": "lora"}
        child = start_training(DreamBoothConfig(**fixed, **steps), session)
        child.wait()
        used = int(Session.open("robot", root=self.folder / name).record["settings"]["processes"])
        return used, child.live().step == 4

    def difference(self, one: str, other: str) -> float:
        """The largest difference between two runs' newest checkpoints, in any of their values."""
        from dreambooth_runs import learned

        from fastsd_helpers.sessions import Session

        first, second = (learned(Session.open("robot", root=self.folder / name)) for name in (one, other))
        if first.keys() != second.keys():
            raise SystemExit(f"{one} and {other} hold other tensors")
        return max(float((first[key].double() - second[key].double()).abs().max()) for key in first)


def rows_of(world: World) -> dict[str, Callable[[], tuple[str, bool]]]:
    """What is shown: a name -> what makes the row's text, and whether it is as it should be."""

    def equal(name: str, flags: list[str], count: int) -> tuple[str, bool]:
        world.train(f"{name}-one", *flags, f"--accumulation={count}")
        answer = world.train(f"{name}-{count}", *flags, f"--processes={count}")
        if "error" in answer:
            return answer["error"], False
        most = world.difference(f"{name}-one", f"{name}-{count}")
        return f"largest difference {most:g}; file {Path(answer['path']).name}", most == 0

    def phase(name: str) -> tuple[str, bool]:
        fault, flags = PHASES[name]
        if not (world.folder / "whole").exists():
            world.train("whole", *LORA, "--accumulation=2")
        folder = f"phase-{name.replace(', ', '-').replace(' ', '-')}"
        said = world.train(folder, *LORA, *flags, "--processes=2", fault=fault)
        resumed = world.train(folder, *LORA, *flags, "--processes=1")
        if "error" in resumed:
            return f"{said.get('error')} Then: {resumed['error']}", False
        most = world.difference("whole", folder)
        text = f"“{said.get('error', 'no error')}” resumed by one process at step {resumed['first_step']}"
        return f"{text}; largest difference {most:g}", most == 0 and "error" in said

    def machines() -> tuple[str, bool]:
        if not (world.folder / "whole").exists():
            world.train("whole", *LORA, "--accumulation=2")
        answer = world.on_two_machines("machines", *LORA)
        if "error" in answer:
            return answer["error"], False
        most = world.difference("whole", "machines")
        return f"largest difference {most:g}", most == 0

    def stopped() -> tuple[str, bool]:
        if not (world.folder / "whole").exists():
            world.train("whole", *LORA, "--accumulation=2")
        said = world.stop_after_a_step("stopped", *LORA, "--processes=2")
        resumed = world.train("stopped", *LORA, "--processes=1")
        most = world.difference("whole", "stopped")
        text = f"“{said.get('error')}” resumed by one process at step {resumed.get('first_step')}"
        return f"{text}; largest difference {most:g}", most == 0 and said.get("exit_code") == 130

    def notebook() -> tuple[str, bool]:
        if not (world.folder / "whole").exists():
            world.train("whole", *LORA, "--accumulation=2")
        used, seen = world.in_a_notebook("notebook", 2)
        most = world.difference("whole", "notebook")
        return f"{used} processes; largest difference {most:g}", (used, most, seen) == (2, 0, True)

    rows = {
        "all weights, 2 processes and accumulation 2": lambda: equal("full", FULL, 2),
        "LoRA, 2 processes and accumulation 2": lambda: equal("lora", LORA, 2),
        "LoRA, 4 processes and accumulation 4": lambda: equal("lora-of-four", LORA, 4),
        "stopped with SIGTERM after a step": stopped,
        "LoRA, two machines and accumulation 2": machines,
        "LoRA, a notebook's cell with two pretended GPUs and accumulation 2": notebook,
    }
    for name in PHASES:
        rows[f"killed: {name}"] = lambda name=name: phase(name)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="only the rows whose name has one of these words")
    parser.add_argument("--write", action="store_true", help=f"record the table in {RESULTS.relative_to(REPOSITORY)}")
    chosen = parser.parse_args()
    from several_readers import Readers, rows_of_readers

    with tempfile.TemporaryDirectory(prefix="several-processes-") as name:
        readers = functools.cache(functools.partial(Readers, Path(name)))
        rows, good = rows_of(World(Path(name))) | rows_of_readers(readers), True
        lines = kept_lines(rows) if chosen.only else {}
        for title, make in rows.items():
            if chosen.only and not any(word in title for word in chosen.only):
                continue
            began = time.monotonic()
            text, as_it_should = make()
            good &= as_it_should
            took = time.monotonic() - began
            lines[title] = f"| {title} | {text} | {'yes' if as_it_should else '**no**'} | {took:.0f} |"
            print(lines[title], flush=True)
            if chosen.write:
                page = make_page([lines[each] for each in rows if each in lines])
                RESULTS.write_text(page, encoding="utf-8")
    return 0 if good else 1


def kept_lines(rows: Iterable[str]) -> dict[str, str]:
    """The lines of the page that is there, of these rows: those that are not made again stay."""
    page = RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.is_file() else []
    return {title: line for title in rows for line in page if line.startswith(f"| {title} |")}


def make_page(lines: list[str]) -> str:
    import accelerate
    import torch

    about = f"{datetime.date.today()}, {platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    head = f"{about}, torch {torch.__version__}, accelerate {accelerate.__version__}, gloo on the CPU"
    return "\n".join(
        [
            "# Several processes",
            "",
            f"`python scripts/several_processes.py --write`: {head}.",
            "",
            "DreamBooth: the embedded demo model at 64 px, float32. Compared is every value of the newest checkpoint: "
            "weights and the optimizer's state. TrOCR: a tiny model with random weights and dropout, 40 lines, float32 "
            "but where it is named; compared are the weights of the finished model, or the bytes of all files. A "
            "process is killed with signal 9; “the first” is the one that writes. Rows may be of different days.",
            "",
            "| what | what came of it | as it should | seconds, both runs |",
            "|---|---|---|---:|",
            *lines,
            "",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
