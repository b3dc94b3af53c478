"""Kill a training at 40 seeded moments on a small Google Drive with a trash, go on elsewhere, and compare the weights.

    python scripts/kill_on_full_drive.py [--moments N] [--seed S] [--write]

The Drive is simulated (tests/trash_mount.py): what is deleted counts until its trash is emptied, unless it was emptied
before; deliveries are late and out of order, on every fourth Drive slow too; free space is reported late; on every
third the deletion of one emptied file in three arrives before its emptying, so that it counts in full, and every eighth
never changes what it reports. There is room for two checkpoints and the finished file, where all that is ever written
takes over twice that. Where room for the finished file is not sure, the run says so and ends; the trash is then emptied
as it says, and the session trained again.
Exits with 1 if a run lost anything, ended with other weights, or the Drive was ever asked for more than its quota.
`--write` records the table in benchmarks/results/kill_on_full_drive.md. About 15 s a moment on one core.
"""

import argparse
import datetime
import shutil
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]

RESULT = REPOSITORY / "benchmarks" / "results" / "kill_on_full_drive.md"
HEAD = """\
| # | killed at | last step | not yet synced | from | late by, overtaken | most, MB | trash, MB | no room for | same |
|---:|---|---|---|---|---|---:|---:|---|---|"""


def main() -> int:
    from faults.kill_resume import choose_drive_moments, count_passings, kill_and_resume, make_world

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=40, help="how many (default: 40)")
    parser.add_argument("--seed", type=int, default=1, help="chooses the moments and what the mount does (default: 1)")
    parser.add_argument("--write", action="store_true", help=f"record the table in {RESULT.relative_to(REPOSITORY)}")
    chosen = parser.parse_args()
    started, rows, failed = time.monotonic(), [], 0
    print(HEAD, flush=True)
    with tempfile.TemporaryDirectory(prefix="kill-on-full-drive-") as name:
        folder = Path(name)
        world = make_world(folder)
        passings, expected = count_passings(world, folder / "uninterrupted")
        for number, moment in enumerate(choose_drive_moments(passings, count=chosen.moments, seed=chosen.seed), 1):
            drive = make_drive(number)
            place = folder / f"moment-{number}"
            outcome = kill_and_resume(world, place, moment, expected, drive=drive)
            shutil.rmtree(place)
            failed += not outcome.equal
            verdict = "yes" if outcome.equal else f"NO: {outcome.problem}"
            lag = "never changes" if drive.lag_s == float("inf") else f"{drive.lag_s} s"
            rows.append(
                f"| {number} | `{moment.fault}` | {outcome.reached} | {outcome.lost} | {outcome.resumed_from} "
                f"| {lag}, {drive.overtaken:.0%} | {outcome.most / 1e6:.1f} | {outcome.trash / 1e6:.1f} "
                f"| {outcome.poor or '-'} | {verdict} |"
            )
            print(rows[-1], flush=True)
    summary = (
        f"{len(rows) - failed} of {len(rows)} resumed runs ended with the weights of the uninterrupted run, bit for "
        f"bit, on a Drive of {make_drive(1).quota / 1e6:.0f} MB"
        + (" that was never asked for more." if not failed else "; the others are marked NO, with why.")
    )
    print(f"\n{summary}")
    if chosen.write:
        about = __doc__.split("\n\n")[2]
        page = f"# Killed on a Drive with little room, resumed, and compared\n\n{summary}\n\n{about}\n"
        table = "\n".join([HEAD, *rows])
        today = datetime.datetime.now(datetime.UTC).date()
        again = f"Again: `python scripts/kill_on_full_drive.py --moments {chosen.moments} --seed {chosen.seed} --write`"
        took = f"Measured on {today} in {time.monotonic() - started:.0f} s."
        RESULT.write_text(f"{page}\n{table}\n\n{took} {again}\n", encoding="utf-8")
    return 1 if failed else 0


def make_drive(number: int):
    """The Drive of a moment, by its number."""
    from trash_mount import Drive

    lag_s = float("inf") if number % 8 == 0 else (0.0, 0.2, 0.5, 1.0)[number % 4]
    return Drive(20_000_000, lag_s, overtaken=1 / 3 if number % 3 == 0 else 0.0)


if __name__ == "__main__":
    sys.exit(main())
