"""How often a default training saves on a Google Drive with 8, 13, 15 and 100 GB free, counted both ways.

    python scripts/plan_drive_saving.py [--write]

Once with every checkpoint that was ever written counting (as where the trash keeps them whole), once with old ones
emptied before they are removed. SD 1.5, 8-bit AdamW as on a T4, 350 + 1500 steps; nothing is trained or loaded.
`--write` records the table in benchmarks/results/drive_saving.md.
"""

import argparse
import importlib
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

RESULT = REPOSITORY / "benchmarks" / "results" / "drive_saving.md"
FREE_GB = (8, 13, 15, 100)
STAGES = {"text_encoder": 350, "unet": 1500}
COUNTED = {"every one ever written": False, "old ones emptied, not seen yet": None, "old ones emptied, seen": True}
HEAD = """\
| method | GB free | what counts | saved every | kept | most at a time, GB | U-Net steps lost at worst |
|---|---:|---|---|---:|---:|---:|"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"record the table in {RESULT.relative_to(REPOSITORY)}")
    chosen = parser.parse_args()
    rows = [
        make_row(method, free, words)
        for method in ("full", "lora")
        for free in FREE_GB
        for words in COUNTED
    ]  # fmt: skip
    table = "\n".join([HEAD, *rows])
    print(table)
    if chosen.write:
        RESULT.write_text(f"{PAGE}\n{table}\n\n{NOTES}", encoding="utf-8")
    return 0


def make_row(method: str, free: int, words: str) -> str:
    """One line: what a run of this method plans with so much free."""
    from fastsd_helpers.dreambooth.running.forecast import Standing, plan_run
    from fastsd_helpers.dreambooth.running.saving_outlook import counts_of
    from fastsd_helpers.dreambooth.settings import DreamBoothConfig
    from fastsd_helpers.registry import find_model

    planning = importlib.import_module("fastsd_helpers.dreambooth.running.forecast")
    planning.free_bytes = lambda _folder: free * 10**9  # a Drive with so much free
    planning.keeps_trash = planning.delivers_late = lambda _folder: True
    counts = counts_of(find_model("sd15"))
    config = DreamBoothConfig(method=method, optimizer="adamw8bit")
    standing = Standing(gives_back=COUNTED[words])
    kind = config.method, config.lora_rank
    made = plan_run(
        config, STAGES, counts.trained(*kind), counts.export_bytes(*kind, STAGES), REPOSITORY, standing=standing
    )  # fmt: skip
    every = made.config.save_every
    if not made.room_for_one:
        saved = "no room for one of the U-Net"
    elif every == 0 or every >= STAGES["unet"]:
        saved = "the end of each stage"
    else:
        saved = f"{every} steps"
    lost = made.lost_steps["unet"]
    return f"| {method} | {free} | {words} | {saved} | {made.config.keep_last} | {made.peak_bytes / 1e9:.2f} | {lost} |"


PAGE = """\
# How often a training can save on a Google Drive

Deleted files stay in Drive's trash and count there until it is emptied. A file that was emptied to 0 bytes before it
was deleted counts nothing there, so old checkpoints are emptied first; then those that are kept, the one on its way and
the finished file bound the room. Until an emptied checkpoint has been seen to give its room back ("not seen yet"),
nothing is written that would not fit if it never did. Where it did not come back, every one ever written counts, as
it did for all before.
"""
NOTES = """\
SD 1.5, 8-bit AdamW: a U-Net checkpoint is 5.16 GB, the finished file 2.13 GB; a LoRA of rank 16: 19 MB and 10 MB.
With 13 GB the finished file takes the place of the checkpoint before the last, which goes first.

Again: `python scripts/plan_drive_saving.py --write`
"""

if __name__ == "__main__":
    sys.exit(main())
