"""Let sessions live through random sequences of steps and kills, and check after each step that nothing is lost.

    python scripts/fuzz_sessions.py [--sequences N] [--real N] [--steps N] [--seed S]

A sequence is a root with a few sessions that are made, prepared, captioned, trained, killed at fault points, copied,
renamed, lengthened, exported and deleted. `--sequences` (default: 200) forks each step from this process, with a few
lines in place of the networks; `--real` (default: 0) runs the command line in new interpreters, with the demo model.
Prints one line a sequence and exits with 1 at the first session that lost or mistook something, with what was done.
"""

import argparse
import os
import random
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests"), str(REPOSITORY / "scripts")]
# Before anything is imported: a process must not be forked from one whose threads have started.
os.environ |= {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}


def main() -> int:
    from faults.fuzzing import Failure, Forked, NewInterpreters, World, live

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=200, help="how many with the stand-in (default: 200)")
    parser.add_argument("--real", type=int, default=0, help="how many with real processes and the demo model")
    parser.add_argument("--steps", type=int, default=14, help="steps of a sequence (default: 14)")
    parser.add_argument("--seed", type=int, default=1, help="of the first sequence (default: 1)")
    chosen = parser.parse_args()
    os.fsync = lambda _handle: None  # processes are killed here and no machines, and a busy disk is slow
    began, kills = time.monotonic(), 0
    kinds = [("stand-in", Forked, chosen.sequences), ("real", NewInterpreters, chosen.real)]
    for kind, make, count in kinds:
        steps = make() if count else None
        for seed in range(chosen.seed, chosen.seed + count):
            with tempfile.TemporaryDirectory(prefix="fuzz-sessions-") as name:
                folder = Path(name)
                os.environ["FASTSD_SCRATCH"] = str(folder / "scratch")
                photos = draw_photos(folder / "photos")
                world = World(folder / "Sessions", photos, steps, random.Random(seed))
                try:
                    live(world, chosen.steps)
                except Failure as err:
                    print(f"{kind} {seed}: {err}")
                    return 1
                kills += world.kills
                print(
                    f"{kind} {seed}: {len(world.story)} steps, {world.kills} kills, {len(world.sessions)} sessions",
                    flush=True,
                )
    print(
        f"Nothing lost in {chosen.sequences + chosen.real} sequences, {kills} kills, {time.monotonic() - began:.0f} s."
    )
    return 0


def draw_photos(folder: Path) -> Path:
    """Six different pictures, as a user's own."""
    import demo_pictures as pictures
    import numpy as np

    folder.mkdir()
    generator = np.random.default_rng(0)
    for index, letter in enumerate("abcdef"):
        place, background = list(pictures.PLACES)[index % 5], list(pictures.BACKGROUNDS)[index % 5]
        pictures.draw_subject("robot", place, background, generator).save(folder / f"zib {letter}.png")
    return folder


if __name__ == "__main__":
    sys.exit(main())
