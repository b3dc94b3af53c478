"""Make wheels.lock anew with uv and say in words what changed.

    python scripts/make_lock.py                     # `make lock`; needs the network and uv
    python scripts/make_lock.py --only comfyui      # resolve the sets of that name alone; the others stay as they are
    python scripts/make_lock.py --only trocr --change gradio pillow    # and in it these alone, with what they bring
    python scripts/make_lock.py --images DIR        # no new lock: check it against package lists of Colab images
                                                    # (<release>-gpu.txt, -cpu.txt, -os.txt)

Sets for the platform's Python come from the sections of requirements-colab.txt, a web UI's from the list beside its
code. The index is the one uv is set to use; only file names, sizes and hashes of it are written.
"""

import argparse
import datetime
import re
import subprocess
import sys
import tempfile
import tomllib
from email.parser import HeaderParser
from pathlib import Path
from urllib.parse import unquote

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from check_advisories import lock_problems  # noqa: E402

from fastsd_helpers.errors import InstallError  # noqa: E402
from fastsd_helpers.wheels import Environment, Lock, find_uv, make_plan, read_lock  # noqa: E402
from fastsd_helpers.wheels.advisories import read_advisories  # noqa: E402
from fastsd_helpers.wheels.lockfile import canonical, digest_of  # noqa: E402

LOCK = ROOT / "wheels.lock"
PYTHONS = ("3.11", "3.12", "3.13")
_WEBUI = ROOT / "fastsd_helpers" / "webui"
OWN = {
    "a1111": ("3.11", _WEBUI / "a1111.txt"),
    "comfyui": ("3.12", _WEBUI / "comfyui.txt"),
    "forge-neo": ("3.13", _WEBUI / "forge-neo.txt"),
}
# Colab's Ubuntu 22.04 has glibc 2.35; Kaggle's images are of the same kind.
UV_PLATFORM, PLATFORM = "x86_64-manylinux_2_35", "linux x86_64"
# The platform's own packages leave every resolution for its Python; opencv-python is another build of the headless one.
LEFT_OUT = (
    *("torch", "torchvision", "torchaudio", "triton", "numpy", "ipywidgets", "ipython", "ipykernel"),
    *("opencv-python", "opencv-contrib-python"),
)
ONE_BUILD = {"opencv-python": "opencv-python-headless", "opencv-contrib-python": "opencv-python-headless"}
BUILD_TOOLS = ("setuptools==69.5.1", "wheel==0.45.1")
_ARCHIVE = re.compile(
    r"(?P<line>(?P<name>\S+) @ (?P<url>https://\S+) --hash=sha256:(?P<sha256>[0-9a-f]{64}))"
    r"\s+# version (?P<version>\S+), (?P<bytes>\d+) bytes"
)


def sections() -> dict[str, list[str]]:
    """The requirement lines of requirements-colab.txt, by section."""
    found: dict[str, list[str]] = {}
    for line in (ROOT / "requirements-colab.txt").read_text(encoding="utf-8").splitlines():
        if match := re.fullmatch(r"# \[([\w-]+)\]", line):
            found[match[1]] = []
        elif line and not line.startswith("#"):
            next(reversed(found.values())).append(line)
    return found


def held_back() -> list[str]:
    """What a new lock may choose at most: the `# lock: NAME<VERSION  why` lines of requirements-colab.txt."""
    text = (ROOT / "requirements-colab.txt").read_text(encoding="utf-8")
    return re.findall(r"^# lock: (\S+)", text, flags=re.MULTILINE)


def own_list(text: str) -> tuple[list[str], list[str]]:
    """The requirement lines of a web UI's list, and those of its part `# [override]`, which other packages' wishes
    do not count against."""
    plain: list[str] = []
    overrides: list[str] = []
    into = plain
    for line in text.splitlines():
        if match := re.match(r"# \[(override|end)\]", line):
            into = overrides if match[1] == "override" else plain
        elif line and not line.startswith("#"):
            into.append(line)
    return plain, overrides


def uv(*words: str) -> None:
    """Run uv; a failure ends this script with what it said."""
    program = find_uv()
    if program is None:
        sys.exit("uv is not installed: pip install uv")
    done = subprocess.run([str(program), *words], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"uv {' '.join(words[:2])} failed:\n{done.stderr.strip()}")


def resolve(
    lines: list[str],
    python: str,
    work: Path,
    *,
    own: bool,
    constraints: list[str] | None = None,
    overrides: list[str] | None = None,
) -> list[dict]:
    """The packages of a resolution, as uv's pylock.toml lists them."""
    (work / "in.txt").write_text("\n".join([*lines, *(overrides or ())]))
    against = overrides or () if own else [f"{name} ; sys_platform == 'never'" for name in LEFT_OUT]
    (work / "overrides.txt").write_text("\n".join(against))
    (work / "constraints.txt").write_text("\n".join(constraints or ()))
    out = work / "pylock.toml"
    out.unlink(missing_ok=True)
    words = ["pip", "compile", str(work / "in.txt"), "--python-version", python, "--python-platform", UV_PLATFORM]
    words += ["--quiet", "--no-config", "--format", "pylock.toml", "-o", str(out), "-c", str(work / "constraints.txt")]
    uv(*words, "--overrides", str(work / "overrides.txt"))
    return tomllib.loads(out.read_text(encoding="utf-8")).get("packages", [])


def usable_files(package: dict) -> list[tuple[str, int, str]]:
    """(name, bytes, sha256) of a package's files: the wheels for this platform, or its source when there is none."""
    files = package.get("wheels") or [package["sdist"]]
    found = []
    for file in files:
        name = file.get("name") or unquote(file["url"].partition("#")[0].rsplit("/", 1)[1])
        found.append((name, file.get("size", 0), file["hashes"]["sha256"]))
    return sorted(found)


def line_of(package: dict) -> str:
    """A requirement line with every usable file's hash."""
    hashes = "".join(f" --hash=sha256:{sha256}" for _name, _bytes, sha256 in usable_files(package))
    return f"{canonical(package['name'])}=={package['version']}{hashes}"


def needs_of(lines: list[str], python: str, work: Path) -> dict[str, list[str]]:
    """`name==version` -> what each package asks for on this Python, read from its own metadata."""
    (work / "lines.txt").write_text("\n".join(lines) + "\n")
    (work / "build.txt").write_text("\n".join(BUILD_TOOLS) + "\n")
    target = work / f"target-{python}"
    words = ["pip", "install", "--quiet", "--no-config", "--no-deps", "--target", str(target)]
    words += [
        "--python-version",
        python,
        "--python-platform",
        UV_PLATFORM,
        "--build-constraints",
        str(work / "build.txt"),
    ]
    uv(*words, "--require-hashes", "-r", str(work / "lines.txt"))
    place = {
        "extra": "",
        "implementation_name": "cpython",
        "os_name": "posix",
        "platform_machine": "x86_64",
        "platform_python_implementation": "CPython",
        "platform_system": "Linux",
        "python_full_version": f"{python}.5",
        "python_version": python,
        "sys_platform": "linux",
    }
    found = {}
    for path in sorted(target.glob("*.dist-info/METADATA")):
        said = HeaderParser().parsestr(path.read_text(encoding="utf-8", errors="replace"))
        asked = [Requirement(text) for text in said.get_all("Requires-Dist") or []]
        texts = set()
        for item in asked:
            if item.marker is None or item.marker.evaluate(place):
                name = canonical(item.name)
                texts.add(f"{ONE_BUILD.get(name, name)}{item.specifier}")
        found[f"{canonical(said['Name'])}=={said['Version']}"] = sorted(texts)
    return found


def make_lock(only: str | None = None, change: list[str] | None = None) -> str:
    """The text of a new wheels.lock; with `only`, every other set is taken from the one that is there.

    With `change` as well, whatever that set has already stays at its version, but for the packages named.
    """
    old = tomllib.loads(LOCK.read_text(encoding="utf-8")) if only else {}
    files: dict[str, tuple[str, int]] = {}
    needs: dict[str, dict[str, list[str]]] = {python: {} for python in PYTHONS}
    archives: dict[str, str] = {}
    sets = []

    def keep(name: str, python: str) -> None:
        row = old["sets"].get(f"{name}-{python}")
        if row is None:
            sys.exit(f"wheels.lock has no set {name} for Python {python} yet: run this without --only.")
        locked = row["requirements"].splitlines()
        for line in locked:
            for sha256 in re.findall(r"sha256:(\w+)", line):
                size, _, file = old["files"][sha256].partition(" ")
                files[sha256] = (file, int(size))
            package = re.match(r"\S+", line)[0]
            if not row["own_environment"]:
                needs[python][package] = old["needs"][python].get(package, [])
            elif package in old["archives"]:
                archives[package] = old["archives"][package]
        sets.append((name, python, row["own_environment"], row["wanted"], locked))

    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        if only:
            build = old["build"]["requirements"].splitlines()
        else:
            build = [line_of(package) for package in resolve(list(BUILD_TOOLS), "3.11", work, own=True)]
        for name, lines in sections().items():
            for python in PYTHONS:
                if only not in (None, name):
                    keep(name, python)
                    continue
                print(f"  {name}, Python {python}", flush=True)
                before = old["sets"].get(f"{name}-{python}") if change else None
                held = [line.partition(" ")[0] for line in before["requirements"].splitlines()] if before else []
                held = [pin for pin in held if pin.partition("==")[0] not in map(canonical, change or ())]
                packages = resolve(lines, python, work, own=False, constraints=[*with_safe_floors(held), *held_back()])
                locked = [line_of(package) for package in packages]
                files |= {sha256: (file, size) for item in packages for file, size, sha256 in usable_files(item)}
                needs[python] |= needs_of(locked, python, work)
                wanted = [str(Requirement(line.partition(";")[0])) for line in lines]
                sets.append((name, python, False, wanted, locked))
        for name, (python, path) in OWN.items():
            if only not in (None, name):
                keep(name, python)
                continue
            print(f"  {name}, Python {python}", flush=True)
            texts, overrides = own_list(path.read_text(encoding="utf-8"))
            fixed = [match for line in texts if (match := _ARCHIVE.fullmatch(line))]
            ranges = [line for line in texts if " @ " not in line]
            packages = resolve(ranges, python, work, own=True, overrides=overrides)
            files |= {sha256: (file, size) for item in packages for file, size, sha256 in usable_files(item)}
            for match in fixed:
                archives[match["name"]] = match["version"]
                files[match["sha256"]] = (match["url"].rsplit("/", 1)[1], int(match["bytes"]))
            locked = sorted([*(line_of(package) for package in packages), *(match["line"] for match in fixed)])
            sets.append((name, python, True, [], locked))
    made = old["made"] if only else datetime.date.today().isoformat()
    return write_lock(sets, build, needs, archives, files, made)


def with_safe_floors(pins: list[str]) -> list[str]:
    """Constraints that hold these versions, but for those older than what they are safe from."""
    floors = {name: Requirement(f"{name}>={least}") for name, least in read_advisories().safe_from.items()}
    kept = [
        pin
        for pin in pins
        for name, _, version in [pin.partition("==")]
        if name not in floors or floors[name].specifier.contains(version, prereleases=True)
    ]
    return [*kept, *map(str, floors.values())]


def write_lock(sets: list, build: list[str], needs: dict, archives: dict, files: dict, made: str) -> str:
    """The lock as text, in an order that keeps differences small."""
    text = [
        "# wheels.lock: the exact versions and file hashes that `fastsd install` uses. `make lock` writes it.",
        "# A set's requirements are ordinary requirement lines: pip install --require-hashes -r reads them too.",
        "schema = 1",
        f'made = "{made}"',
        "",
        "# tools for the few packages that come as source only; they are built once, then kept as wheels in the cache",
        "[build]",
        *block("requirements", build),
    ]
    for name, python, own, wanted, locked in sets:
        versions = [re.match(r"\S+?==[^\s]+", line) for line in locked]
        asked = [] if own else [need for match in versions for need in needs[python][match[0]]]
        lines = "\n".join(locked)
        text += ["", f'[sets."{name}-{python}"]', f'name = "{name}"', f'python = "{python}"']
        text += [f"own_environment = {str(own).lower()}", f'platform = "{PLATFORM}"']
        text += [f'sha256 = "{digest_of(python, wanted, lines, asked)}"', *array("wanted", wanted)]
        text += block("requirements", locked)
    text += ["", "# versions of the archives, whose lines name none", "[archives]"]
    text += [f'{name} = "{version}"' for name, version in sorted(archives.items())]
    text += ["", "# what each package asks for on a Python, so that one already here can be kept when it fits"]
    for python, asked in needs.items():
        text += [f'[needs."{python}"]']
        text += [
            f'"{key}" = [{", ".join(f_quote(item) for item in asked[key])}]' for key in sorted(asked) if asked[key]
        ]
    text += ["", "# bytes and name of every file, by its sha256", "[files]"]
    text += [f'{sha} = "{size} {name}"' for sha, (name, size) in sorted(files.items(), key=lambda item: item[1])]
    return "\n".join(text) + "\n"


def block(name: str, lines: list[str]) -> list[str]:
    """A TOML string of several lines."""
    return [f"{name} = '''", *lines, "'''"]


def array(name: str, items: list[str]) -> list[str]:
    """A TOML array, an item a line."""
    return [f"{name} = [", *(f"    {f_quote(item)}," for item in items), "]"] if items else [f"{name} = []"]


def f_quote(text: str) -> str:
    """A TOML string of text that has no backslash or quote in it."""
    assert not set(text) & set('"\\'), text
    return f'"{text}"'


def changes(old: Lock | None, new: Lock) -> list[str]:
    """What a new lock changes, in words."""
    if old is None:
        return ["There was no lock before."]
    said = []
    before = {(item.name, item.python): {row.name: row.version for row in item.rows} for item in old.sets}
    for item in new.sets:
        then = before.pop((item.name, item.python), {})
        now = {row.name: row.version for row in item.rows}
        parts = [f"{name} {then[name]} -> {now[name]}" for name in now if name in then and then[name] != now[name]]
        parts += [f"{name} {now[name]} is new" for name in now if name not in then]
        parts += [f"{name} is gone" for name in then if name not in now]
        if parts:
            said.append(f"{item.name}, Python {item.python}: " + "; ".join(parts))
    said += [f"the set {name}, Python {python} is gone" for name, python in before]
    return said or ["Nothing changed: every version is the same as before."]


# -------------------------------------------------------------------------------------------------- Colab's images


def check_images(folder: Path) -> list[str]:
    """What of each Colab image would not stay as it is, by the lock and by uv."""
    lock = read_lock(LOCK)
    failures = []
    with tempfile.TemporaryDirectory() as temporary:
        for path in sorted(folder.glob("*-?pu.txt"), reverse=True):
            release, _, kind = path.stem.partition("-")
            system = (folder / f"{release}-os.txt").read_text(encoding="utf-8")
            python = re.search(r"Python (\d+\.\d+)", system)[1]
            pins = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if "==" in line]
            installed = {canonical(pin.split("==")[0]): pin.split("==")[1] for pin in pins}
            held = [pin for pin in pins if canonical(pin.split("==")[0]) not in LEFT_OUT and "+" not in pin]
            for name, lines in sections().items():
                print(f"  {release} {kind}: {name}", flush=True)
                resolved = {
                    canonical(p["name"]): p["version"]
                    for p in resolve(lines, python, Path(temporary), own=False, constraints=held)
                }
                moved = [f"{n} {installed[n]} -> {v}" for n, v in resolved.items() if installed.get(n, v) != v]
                failures += [f"{release}-{kind} {name}: {item}" for item in moved]
                here = Environment(
                    Path("python"), f"{python}.0", Path("/"), Path("/"), PLATFORM, False, installed, False
                )
                try:
                    plan = make_plan(lock.find(name, python), here)
                except InstallError as err:
                    failures.append(f"{release}-{kind} {name}: {err.problem}")
                    continue
                replaced = [f"{c.name} {c.before} -> {c.after}" for c in plan.changes if c.before]
                failures += [f"{release}-{kind} {name} replaces {item}" for item in replaced]
    return failures


def main() -> int:
    """Run one of the two jobs; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [*sections(), *OWN]
    parser.add_argument("--only", choices=names, metavar="NAME", help=f"resolve this set alone: {', '.join(names)}")
    parser.add_argument(
        "--change", nargs="+", metavar="PACKAGE", help="with --only: what else is locked in it already stays as it is"
    )
    parser.add_argument("--images", type=Path, metavar="DIR", help="check the lock against Colab's package lists")
    chosen = parser.parse_args()
    if chosen.change and chosen.only not in sections():
        parser.error(f"--change goes together with --only and one of: {', '.join(sections())}")
    if chosen.images:
        failures = check_images(chosen.images)
        print("\n".join(failures) or "Every image keeps every package it has.")
        return int(bool(failures))
    try:
        old = read_lock(LOCK) if LOCK.exists() else None
    except InstallError as err:
        print(f"The old lock is of no use for comparing: {err.problem}")
        old = None
    text = make_lock(chosen.only, chosen.change)
    candidate = LOCK.with_suffix(".new")
    candidate.write_text(text, encoding="utf-8")
    new = read_lock(candidate)  # its digests and rows are checked before it replaces the old one
    problems = list(lock_problems(new, read_advisories()))
    if problems:
        candidate.unlink()
        print(
            "The lock stays as it was: the new one has known vulnerabilities that no row of advisories.toml answers "
            "for."
        )
        print("\n".join(problems))
        return 1
    candidate.replace(LOCK)
    print("\n".join(changes(old, new)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
