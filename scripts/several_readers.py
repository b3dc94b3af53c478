"""Teaching and reading TrOCR on several processes of this machine's CPU: rows of scripts/several_processes.py."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]
_TEXT = "the quick brown fox"
_LINES = 40
_TEACH = ["--batch-size=4", "--epochs=2", "--lr=1e-3", "--patience=0", "--no-language", "--measure-every=1"]
_READ = ["--no-pages", "--precision=fp32", "--max-new-tokens=6", "--device=cpu"]
# The cells of the notebook: read, correct, fine-tune.
_CELLS = """
import json, logging, sys
from pathlib import Path
from fastsd_helpers import forms
from fastsd_helpers.forms.trocr.finetuning import TeachConfig
from fastsd_helpers.trocr.reading.session import ReadingSession, ReadPicturesConfig
images, model, folder, accumulation = sys.argv[1:]
said = []
handler = logging.Handler()
handler.emit = lambda record: said.append(record.getMessage())
logging.getLogger("fastsd_helpers").addHandler(handler)
logging.getLogger("fastsd_helpers").setLevel(logging.INFO)
session = ReadingSession(Path(folder))
how = dict(images=images, reader=model, pages="lines", precision="fp32", max_new_tokens=6)
forms.read_pictures(ReadPicturesConfig(**how), session)
read = [[line.text, line.read.confidence] for line in session.lines()]
for line in session.lines():
    session.correct(line.key, "fox")
settings = TeachConfig(epochs=2, batch_size=4, lr=1e-3, precision="fp32", patience=0, held_out=0.25, language=False,
                       accumulation=int(accumulation))
made = forms.teach_reader(settings, session)
journal = next(Path(folder).rglob("teaching.log")).read_text()
print(json.dumps({"read": read, "model": str(made.path), "said": said, "log": journal}))
"""


class Readers:
    """A tiny model with random weights, lines with their texts, and what is done with both."""

    def __init__(self, folder: Path) -> None:
        from tiny_readers import noise_pictures, write_reader

        self.folder = folder / "readers"
        self.model, self.lines = self.folder / "model", self.folder / "lines"
        self.lines.mkdir(parents=True)
        write_reader(self.model, seed=1, end=4.0)
        rows = ["file_name,text,group"]
        for place, picture in enumerate(noise_pictures(_LINES, seed=3)):
            picture.save(self.lines / f"{place}.png")
            rows.append(f"{place}.png,{_TEXT[: 1 + (7 * place) % 19].strip()},w{place // 4}")
        (self.lines / "labels.csv").write_text("\n".join(rows), encoding="utf-8")
        self.env = dict(os.environ) | {"PYTHONPATH": str(REPOSITORY), "FASTSD_SCRATCH": str(self.folder / "scratch")}

    def command(self, kind: str, name: str, *flags: str) -> list[str]:
        """The command line that teaches or reads into the folder of this name."""
        fixed = _TEACH if kind == "finetune" else _READ
        own = ["trocr", kind, str(self.lines), f"--out={self.folder / name}", f"--model={self.model}", *fixed]
        return [sys.executable, "-m", "fastsd_helpers", *own, *flags, "--json"]

    def run(self, kind: str, name: str, *flags: str, fault: str = "") -> dict[str, Any]:
        """Run it; returns the command's answer."""
        env = self.env | ({"FASTSD_FAULT": fault} if fault else {})
        ended = subprocess.run(self.command(kind, name, *flags), env=env, capture_output=True, text=True)
        lines = ended.stdout.strip().splitlines()
        return json.loads(lines[-1]) if lines else {"error": ended.stderr[-400:]}

    def stop_after_a_step(self, name: str, *flags: str) -> dict[str, Any]:
        """Teach, and ask the command to end once it has measured; returns its answer."""
        command = self.command("finetune", name, *flags)
        began = subprocess.Popen(command, env=self.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for line in began.stderr or ():
            if line.startswith("Step 2 of"):
                began.terminate()
        return json.loads(began.communicate()[0].strip().splitlines()[-1])

    def in_a_notebook(self, name: str, gpus: int, accumulation: int) -> dict[str, Any]:
        """What the notebook's cells do in a process of their own, on a machine that seems to have GPUs."""
        seeming = self.folder / f"seeming-{gpus}"
        seeming.mkdir()
        text = f"import torch\ntorch.cuda.device_count = lambda: {gpus}\n"
        (seeming / "sitecustomize.py").write_text(text, encoding="utf-8")
        env = self.env | {"PYTHONPATH": os.pathsep.join([str(seeming), str(REPOSITORY)])}
        words = [str(self.lines), str(self.model), str(self.folder / name), str(accumulation)]
        ended = subprocess.run([sys.executable, "-c", _CELLS, *words], env=env, capture_output=True, text=True)
        lines = ended.stdout.strip().splitlines()
        return json.loads(lines[-1]) if ended.returncode == 0 else {"error": ended.stderr[-600:]}

    def difference(self, one: Any, other: Any) -> float:
        """The largest difference between two fine-tuned models, in any of their weights."""
        from safetensors.torch import load_file

        first, second = (load_file(Path(path) / "model.safetensors") for path in (one, other))
        return max(float((first[key].double() - second[key].double()).abs().max()) for key in first)

    def files(self, name: str) -> dict[str, bytes]:
        """The files of a reading and what they hold; its notes are not among them."""
        folder = self.folder / name
        found = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        return {str(path.relative_to(folder)): path.read_bytes() for path in found if ".fastsd-run" not in path.parts}


def rows_of_readers(readers: Callable[[], Readers]) -> dict[str, Callable[[], tuple[str, bool]]]:
    """What is shown: a name -> what makes the row's text, and whether it is as it should be."""

    def once(kind: str, name: str, *flags: str) -> dict[str, Any]:
        if not (readers().folder / name).exists():
            return readers().run(kind, name, *flags)
        return {}

    def compared(name: str, said: dict[str, Any], resumed: dict[str, Any] | None = None) -> tuple[str, bool]:
        for answer in (resumed,) if resumed is not None else (said,):
            if "error" in answer:
                return f"{said.get('error')} {answer['error']}", False
        most = readers().difference(*(readers().folder / each / "model" for each in ("taught", name)))
        then = f"“{said['error']}” resumed by one process at step {resumed['first_step']}; " if resumed else ""
        return f"{then}largest difference {most:g}", most == 0

    def teach() -> tuple[str, bool]:
        once("finetune", "taught", "--precision=fp32", "--accumulation=2")
        return compared("two", readers().run("finetune", "two", "--precision=fp32", "--processes=2"))

    def teach_lora() -> tuple[str, bool]:
        how = ["--precision=bf16", "--method=lora", "--gradient-checkpointing"]
        one = readers().run("finetune", "lora-one", *how, "--accumulation=4")
        other = readers().run("finetune", "lora-two", *how, "--accumulation=2", "--processes=2")
        if "error" in one | other:
            return str((one | other)["error"]), False
        most = readers().difference(one["path"], other["path"])
        return f"largest difference {most:g}", most == 0

    def killed() -> tuple[str, bool]:
        once("finetune", "taught", "--precision=fp32", "--accumulation=2")
        fault = "trocr.checkpoint@1:3"
        said = readers().run("finetune", "killed", "--precision=fp32", "--processes=2", fault=fault)
        return compared("killed", said, readers().run("finetune", "killed", "--precision=fp32"))

    def stopped() -> tuple[str, bool]:
        once("finetune", "taught", "--precision=fp32", "--accumulation=2")
        said = readers().stop_after_a_step("stopped", "--precision=fp32", "--processes=2")
        return compared("stopped", said, readers().run("finetune", "stopped", "--precision=fp32"))

    def read(name: str, *flags: str, fault: str = "") -> tuple[str, bool]:
        formats = "--format=txt,json,csv,alto,page"
        once("read", "read", formats)
        said = readers().run("read", name, formats, *flags, fault=fault)
        then = ""
        if fault:
            resumed = readers().run("read", name, formats)
            then = f"“{said.get('error')}” resumed by one process with {resumed.get('read_before')} pages read; "
        found, wanted = readers().files(name), readers().files("read")
        return f"{then}{len(found)} files, {'all equal' if found == wanted else 'not equal'}", found == wanted != {}

    def notebook() -> tuple[str, bool]:
        one = readers().in_a_notebook("cells-one", 1, 2)
        two = readers().in_a_notebook("cells-two", 2, 1)
        if "error" in one | two:
            return str((one | two)["error"]), False
        most = readers().difference(one["model"], two["model"])
        (texts, sure), (others, others_sure) = (zip(*answer["read"], strict=True) for answer in (one, two))
        apart = max(abs(first - second) for first, second in zip(sure, others_sure, strict=True))
        told = [line for line in [*two["said"], *two["log"].splitlines()] if line.startswith("2 processes on")]
        same = f"{'the same' if texts == others else 'another'} text, confidences at most {apart:.0e} apart"
        good = (most, texts == others, len(told)) == (0, True, 2) and apart < 1e-5
        return f"“{' '.join(told)}” {same}; largest difference of a weight {most:g}", good

    return {
        "TrOCR, all weights, 2 processes and accumulation 2": teach,
        "TrOCR, LoRA in bf16, 2 processes with accumulation 2 and one with 4": teach_lora,
        "TrOCR, the second process killed while a checkpoint is saved": killed,
        "TrOCR, stopped with SIGTERM after a step": stopped,
        "TrOCR reading a folder, 2 processes and one": lambda: read("read-by-two", "--processes=2"),
        "TrOCR reading a folder, the second process killed": lambda: read(
            "read-killed", "--processes=2", fault="trocr.page@1:5"
        ),
        "TrOCR, a notebook's cells with two pretended GPUs: reading, and accumulation 2": notebook,
    }
