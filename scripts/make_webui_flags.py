"""Write docs/webui-flags.md: what `fastsd webui launch --dry-run` chooses for the GPUs people rent.

python scripts/make_webui_flags.py
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from fastsd_helpers.errors import WebUIError  # noqa: E402
from fastsd_helpers.webui.catalog import uis  # noqa: E402
from fastsd_helpers.webui.flags import GPUS, choose_flags  # noqa: E402

FAMILIES = {"sd15": "Stable Diffusion 1.5", "sdxl": "Stable Diffusion XL", "flux": "Flux"}


def make_page() -> str:
    """The whole page as Markdown."""
    lines = [
        "# The flags a web UI is started with",
        "",
        "What `fastsd webui launch --dry-run --gpu GPU --family FAMILY` chooses. Written by",
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
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    (ROOT / "docs" / "webui-flags.md").write_text(make_page(), encoding="utf-8")
