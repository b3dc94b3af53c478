"""Write docs/webui-flags.md: the files and flags that `fastsd webui launch --dry-run` chooses for GPUs people rent.

python scripts/make_webui_flags.py
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from fastsd_helpers.errors import WebUIError  # noqa: E402
from fastsd_helpers.registry import find_model  # noqa: E402
from fastsd_helpers.webui.catalog import WebUI, uis  # noqa: E402
from fastsd_helpers.webui.flags import GPUS, Machine, choose_flags  # noqa: E402
from fastsd_helpers.webui.placing.bundles import choose_bundle, file_name  # noqa: E402

MODELS = ("sd15", "sdxl", "flux-dev", "flux-schnell")
FAMILIES = {"sd15": "Stable Diffusion 1.5", "sdxl": "Stable Diffusion XL", "flux": "Flux"}


def make_page() -> str:
    """The whole page as Markdown."""
    lines = [
        "# The files and flags a web UI is started with",
        "",
        "What `fastsd webui launch --dry-run --gpu GPU --model KEY` chooses. Written by",
        "`scripts/make_webui_flags.py`; a test compares this page with the code. None of this was run on these GPUs",
        "yet: the limits follow from the sizes of the weights and the web UIs' own documentation.",
    ]
    for ui in uis():
        lines += [
            "",
            f"## {ui.title}",
            "",
            f"Tried: {ui.tried}.",
            "",
            "| GPU | model | flags | why |",
            "| --- | --- | --- | --- |",
        ]
        for gpu, machine in GPUS.items():
            for family, title in FAMILIES.items():
                try:
                    flags, reasons = choose_flags(ui, family, machine)
                    shown = f"`{' '.join(flags)}`" if flags else "none"
                except WebUIError as err:
                    shown, reasons = "refused", [err.problem, err.hint]
                lines.append(f"| {gpu}, {machine.gpu_gib:.0f} GiB | {title} | {shown} | {' '.join(reasons)} |")
        lines += _files_of(ui)
    return "\n".join(lines) + "\n"


def _files_of(ui: WebUI) -> list[str]:
    """Files of each model for each machine, without a token, added up against GPU and RAM in decimal GB."""
    lines = [
        "",
        "Without a token, in GB (10^9 bytes). On the GPU: the model and 2.5 to work in. In RAM, at most: the larger of",
        "the largest file, while it is read, and the text encoders and VAE, while they rest; and 3 for the program. A",
        "file that is read is mapped, so its pages give way to what rests: the two are not added up.",
        "",
        "| machine | model | files | on the GPU | in RAM |",
        "| --- | --- | --- | --- | --- |",
    ]
    for gpu in ("T4", "L4", "A100"):
        for key in MODELS:
            spec = find_model(key)
            if spec.family in ui.families:
                specs = choose_bundle(spec, ui, GPUS[gpu]).specs
                lines.append(
                    f"| {gpu} | {key} | {_row([(file_name(one), one.bytes or 0) for one in specs], GPUS[gpu])} |"
                )
    return lines


def _row(files: list[tuple[str, int]], machine: Machine) -> str:
    names = ", ".join(f"{name} ({size / 1e9:.1f})" for name, size in files)
    gpu, host = (gib * 2**30 / 1e9 for gib in (machine.gpu_gib, machine.host_gib))
    sizes = [size / 1e9 for _name, size in files]
    drawing, resting = sizes[0] + 2.5, max(*sizes, sum(sizes[1:])) + 3
    return f"{names} | {drawing:.1f} of {gpu:.1f} | {resting:.1f} of {host:.1f}"


if __name__ == "__main__":
    (ROOT / "docs" / "webui-flags.md").write_text(make_page(), encoding="utf-8")
