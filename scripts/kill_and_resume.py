"""Kill a training at 40 seeded moments, resume each time in a fresh process, and compare the weights it ends with.

    python scripts/kill_and_resume.py [--variant VARIANT] [--moments N] [--seed S] [--write]

Prints one line for each moment and exits with 1 if any run ended with other weights than the uninterrupted one.
`--write` records the table in benchmarks/results/kill_and_resume.md (for a variant, kill_and_resume_VARIANT.md):
full trains all weights of SD 1.5's layout, lora a LoRA of it, sd21 that of SD 2.1 with v-prediction, sdxl a LoRA of
SDXL, sdxl-full all of its weights in bf16 by Adafactor, prior with class images and min-SNR weights, buckets on images
of several shapes at two resolutions. It takes about 10 s a moment on one core.
"""

import argparse
import datetime
import platform
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]

RESULTS = REPOSITORY / "benchmarks" / "results"
HEAD = """\
| # | killed at | last step | not yet synced | resumed from | said about what was skipped | equal |
|---:|---|---|---|---|---|---|"""


def main() -> int:
    from faults.kill_resume import choose_moments, count_passings, kill_and_resume, make_world

    chosen = read_options()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="kill-and-resume-") as name:
        folder = Path(name)
        world = make_world(folder, chosen.variant)
        passings, expected = count_passings(world, folder / "uninterrupted")
        print(HEAD, flush=True)
        outcomes = []
        for number, moment in enumerate(choose_moments(passings, count=chosen.moments, seed=chosen.seed), start=1):
            outcomes.append(kill_and_resume(world, folder / f"moment-{number}", moment, expected))
            print(outcomes[-1].row(number), flush=True)
            if chosen.write:  # after each, so that a run that is ended early has recorded what it did
                write_page(make_page(outcomes, expected, chosen, time.monotonic() - started), chosen.variant)
    print("\n" + summarise(outcomes))
    return 0 if all(outcome.equal for outcome in outcomes) else 1


def write_page(page: str, variant: str) -> None:
    suffix = "" if variant == "full" else f"_{variant.replace('-', '_')}"
    (RESULTS / f"kill_and_resume{suffix}.md").write_text(page, encoding="utf-8")


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    variants = ["full", "lora", "sd21", "sdxl", "sdxl-full", "prior", "buckets"]
    parser.add_argument("--variant", default="full", choices=variants, help="what is trained")
    parser.add_argument("--moments", type=int, default=40, help="how many (default: 40)")
    parser.add_argument("--seed", type=int, default=1, help="chooses the moments and what the mount loses (default: 1)")
    parser.add_argument("--write", action="store_true", help=f"record the table in {RESULTS.relative_to(REPOSITORY)}/")
    return parser.parse_args()


def summarise(outcomes: list) -> str:
    equal = sum(outcome.equal for outcome in outcomes)
    stages = Counter(outcome.reached.split()[0] for outcome in outcomes)
    kinds = Counter(outcome.moment.point.split(".")[0] for outcome in outcomes)
    damaged = sum(bool(outcome.passed_over) for outcome in outcomes)
    lost = sum(
        any(word in outcome.lost for word in ("missing", "truncated", "empty", "flipped")) for outcome in outcomes
    )
    where = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    return (
        f"{equal} of {len(outcomes)} resumed runs ended with the weights of the uninterrupted run, bit for bit.\n"
        f"Killed at fault points of: {where}. Last step in the text encoder's stage: {stages['text_encoder']}, in the "
        f"U-Net's: {stages['unet']}.\n"
        f"In {lost} the mount lost or damaged files; in {damaged} something was skipped at the resume, and said so."
    )


def make_page(outcomes: list, expected: dict[str, str], chosen: argparse.Namespace, seconds: float) -> str:
    from faults.kill_resume import SETTINGS, VARIANTS

    from fastsd_helpers.device import describe_device
    from fastsd_helpers.runtime import versions

    rows = "\n".join(outcome.row(number) for number, outcome in enumerate(outcomes, start=1))
    hashes = "\n".join(f"| {name} | `{sha256}` |" for name, sha256 in expected.items())
    family, own = VARIANTS[chosen.variant]
    settings = ", ".join(f"{name} {value}" for name, value in {**SETTINGS, **own}.items())
    variant = "" if chosen.variant == "full" else f" --variant {chosen.variant}"
    library = ", ".join(f"{name} {version}" for name, version in versions().items())
    today = datetime.datetime.now(datetime.UTC).date()
    return f"""# Killed at {len(outcomes)} moments, resumed, and compared

{summarise(outcomes)}

Each run is killed with SIGKILL at the n-th passing of a named fault point (`name:n`) and its machine is lost: the next
process is a new one with an empty scratch folder, on a new view of a simulated Drive that holds only what had been
delivered, in any order; files not yet synced then are missing, truncated, empty, changed by one bit
(flipped) or whole. When it has finished, name, order, type, shape and bytes of every tensor of the finished file and
of the last checkpoint (weights, optimizer, loss history) are hashed and compared with the uninterrupted run's.

{HEAD}
{rows}

| uninterrupted run | sha256 over its tensors |
|---|---|
{hashes}

A base model of the layout of {family} at small widths, random weights; {settings}.
Which moments, and what a crash leaves of files not yet synced, follows from the seed; which files those are also
depends on how fast the machine is, so the columns from "not yet synced" to the sentences vary from run to run.

Measured on {today}: {describe_device().name}, {platform.machine()}, one core, {seconds:.0f} s in all; {library}.

Again: `python scripts/kill_and_resume.py{variant} --moments {chosen.moments} --seed {chosen.seed} --write`
"""


if __name__ == "__main__":
    sys.exit(main())
