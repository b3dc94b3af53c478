"""Two figures for each package, the dated list of known holes, and the check of the lock against it."""

import importlib.metadata
import importlib.resources
import re
import tomllib
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
from check_advisories import list_problems, lock_problems

from fastsd_helpers import doctor
from fastsd_helpers.errors import InstallError, ModelError
from fastsd_helpers.wheels import Lock, LockedRow, LockSet, advisories, read_lock
from fastsd_helpers.wheels.advisories import old_packages, parse_advisories, read_advisories
from fastsd_helpers.wheels.known_bad import known_bad
from fastsd_helpers.wheels.lockfile import canonical

packaging = pytest.importorskip("packaging.requirements")
Requirement = packaging.Requirement

ROOT = Path(__file__).resolve().parents[1]
IMAGES = sorted((ROOT / "tests" / "data" / "colab").glob("*.txt"))
# What an old image has and nothing here can close: the doctor would warn of it by name.
LEFT_OPEN: set[tuple[str, str]] = set()


def image(path: Path) -> dict[str, str]:
    return dict(line.split("==") for line in path.read_text(encoding="utf-8").splitlines() if line[0] != "#")


def ranges() -> dict[str, dict[str, list[str]]]:
    """Package -> its ranges -> the files that name them."""
    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for extra, lines in project["optional-dependencies"].items():
        for line in lines:
            asked = Requirement(line)
            if canonical(asked.name) != "fastsd-helpers":
                found[canonical(asked.name)][str(asked.specifier)].append(f"pyproject.toml [{extra}]")
    for line in (ROOT / "requirements-colab.txt").read_text(encoding="utf-8").splitlines():
        if line and line[0] != "#":
            asked = Requirement(line.partition(";")[0])
            found[canonical(asked.name)][str(asked.specifier)].append("requirements-colab.txt")
    for item in read_lock().sets:
        for line in item.wanted:
            asked = Requirement(line)
            found[canonical(asked.name)][str(asked.specifier)].append(f"wheels.lock {item.name}-{item.python}")
    return found


def test_a_package_has_one_range_in_all_files() -> None:
    several = {name: dict(places) for name, places in ranges().items() if len(places) > 1}
    assert several == {}


def test_the_pinned_versions_for_development_lie_in_these_ranges() -> None:
    asked = {name: Requirement(f"x{next(iter(places))}").specifier for name, places in ranges().items()}
    pins = [line for line in (ROOT / "requirements-dev.txt").read_text().splitlines() if line and line[0] != "#"]
    found = {canonical(name): version for name, version in (pin.split("==") for pin in pins)}
    assert len(set(asked) & set(found)) > 20
    assert {name: found[name] for name in asked if name in found and found[name] not in asked[name]} == {}


@pytest.mark.parametrize("path", IMAGES, ids=lambda path: path.stem)
def test_every_colab_image_lies_in_these_ranges(path: Path) -> None:
    here = image(path)
    # The tools for development are installed on no platform.
    asked = {
        name: Requirement(f"x{next(iter(places))}").specifier
        for name, places in ranges().items()
        if set().union(*places.values()) != {"pyproject.toml [dev]"}
    }
    shared = set(asked) & set(here)
    assert len(shared) > 10
    assert {name: here[name] for name in shared if not asked[name].contains(here[name], prereleases=True)} == {}


def test_there_are_ten_images_and_the_versions_are_facts_of_a_named_source() -> None:
    assert len(IMAGES) == 10
    assert all("googlecolab/backend-info" in path.read_text() for path in IMAGES)


def test_what_a_package_runs_from_is_never_above_what_it_is_safe_from() -> None:
    for name, least in read_advisories().safe_from.items():
        for text in ranges().get(name, ()):
            assert Requirement(f"x{text}").specifier.contains(least), f"{name} is safe from {least} and asked {text}"


def test_what_is_safe_is_free_of_every_hole_that_a_version_closes() -> None:
    listed = read_advisories()
    for row in listed.rows:
        if row.fixed_by and not row.sets:
            assert row.package in listed.safe_from or row.package not in ranges(), row
            least = listed.safe_from.get(row.package)
            assert least is None or not row.concerns(least), f"{row.package} {least} has {row.ids}"


def test_the_doctor_and_the_ranges_agree_on_what_is_too_old() -> None:
    asked = {name: next(iter(places)) for name, places in ranges().items()}
    floors = [row for row in known_bad() if "older than this project" in row.what]
    assert {row.package for row in floors} == {"transformers", "diffusers"}
    for row in floors:
        assert row.versions.replace("<", ">=") == asked[row.package]


# ----------------------------------------------------------------------------------------------------- the lock


def test_no_locked_version_has_a_known_hole_without_an_answer() -> None:
    assert list(lock_problems(read_lock(), read_advisories())) == []


def lock_of(name: str, version: str, *, own: bool = False, set_name: str = "webui") -> Lock:
    row = LockedRow(name, version, (), "")
    return Lock("2026-01-01", (LockSet(set_name, "3.12", own, "linux x86_64", (), (row,), "", ""),))


@pytest.mark.parametrize("version", ["3.13.0", "3.11.15", "3.14.3"])
def test_a_lock_with_a_version_in_a_range_fails(version: str) -> None:
    said = list(lock_problems(lock_of("aiohttp", version), read_advisories()))
    assert any("has CVE-2026-128131 (fixed by 3.14.4)" in line for line in said)
    assert any("older than 3.14.4" in line for line in said)
    assert list(lock_problems(lock_of("aiohttp", "3.14.5"), read_advisories())) == []


def test_the_tools_that_build_sources_are_held_to_the_list_too() -> None:
    listed = parse_advisories(ROW)
    lock = lock_of("beta", "1.0")
    with_tools = Lock(lock.made, (replace(lock.sets[0], build="alpha==1.9 --hash=sha256:00\nomega==1\n"),))
    assert list(lock_problems(with_tools, listed)) == ["build tools: alpha 1.9 has CVE-2026-1234 (fixed by 2.0)"]
    assert list(lock_problems(lock, listed)) == []


def test_a_web_uis_set_is_held_to_the_same_rows_unless_one_answers_for_it() -> None:
    listed = read_advisories()
    assert list(lock_problems(lock_of("gradio", "3.41.2", own=True, set_name="a1111"), listed)) == []
    assert list(lock_problems(lock_of("gradio", "3.41.2", own=True, set_name="comfyui"), listed))
    assert list(lock_problems(lock_of("uv", "0.8.0", own=True, set_name="a1111"), listed))


ROW = """
[[advisory]]
package = "alpha"
ids = ["CVE-2026-1234"]
affected = "<2"
date = 2026-11-29
source = "read"
answer = "fixed by 2.0"
"""


def test_an_answer_is_checked_against_the_version_that_is_locked() -> None:
    fixed = parse_advisories(ROW)
    assert list(lock_problems(lock_of("alpha", "1.9"), fixed)) == [
        "webui 3.12: alpha 1.9 has CVE-2026-1234 (fixed by 2.0)"
    ]
    assert list(lock_problems(lock_of("alpha", "2.0"), fixed)) == []
    assert list(lock_problems(lock_of("alpha", "1.9+cu126"), fixed))
    for why in ("not reachable: nothing here calls that part of it", "open: no version is free of it, and it is used"):
        answered = parse_advisories(ROW.replace("fixed by 2.0", why))
        assert list(lock_problems(lock_of("alpha", "1.9"), answered)) == []
    # A row for one set alone answers for no other, nor for another hole.
    own = ROW.replace("fixed by 2.0", "open: this web UI needs the old one, and it is used") + 'sets = ["a1111"]\n'
    both = parse_advisories(ROW + own)
    assert list(lock_problems(lock_of("alpha", "1.9", set_name="a1111"), both)) == []
    assert list(lock_problems(lock_of("alpha", "1.9"), both))
    other = parse_advisories(ROW + own.replace("CVE-2026-1234", "CVE-2026-9999"))
    assert list(lock_problems(lock_of("alpha", "1.9", set_name="a1111"), other))


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ("date = 2026-11-29\n", "", "has no date"),
        ("date = 2026-11-29", 'date = "today"', "has no date"),
        ('package = "alpha"\n', "", "no package"),
        ('"alpha"', '"Alpha_Beta"', "as indexes compare names"),
        ('ids = ["CVE-2026-1234"]\n', "", "has no ids"),
        ('"CVE-2026-1234"', '"CVE-26-1"', "has no ids"),
        ('["CVE-2026-1234"]', "[]", "has no ids"),
        ('affected = "<2"\n', "", "no range"),
        ('"<2"', '"below 2"', "no range"),
        ('"<2"', '"<2,"', "no range|no answer|"),
        ('"<2"', '"<<2"', "no range"),
        ('"<2"', '""', "no range"),
        ('answer = "fixed by 2.0"\n', "", "no answer"),
        ('"fixed by 2.0"', '"fixed"', "no answer"),
        ('"fixed by 2.0"', '"not reachable"', "no answer"),
        ('"fixed by 2.0"', '"open: yes"', "no answer"),
        ('"fixed by 2.0"', '"fixed by 1.5"', "lies in its range"),
        ('source = "read"', 'source = "heard"', "no source"),
        ('source = "read"', 'source = "read"\nolde = "x"', "unknown keys olde"),
    ],
)
def test_a_row_that_lacks_something_is_named_with_what_it_lacks(before: str, after: str, words: str) -> None:
    assert before in ROW
    said = list_problems(ROW + ROW.replace(before, after))
    if words.endswith("|"):  # a comma at the end is still a range
        assert said == []
        return
    assert said
    assert all(line.startswith("row 2 ") for line in said)
    assert re.search(words, " ".join(said))
    assert len(parse_advisories(ROW).rows) == 1


def test_a_damaged_list_is_an_error_with_what_to_do() -> None:
    for text in (ROW.replace('ids = ["CVE-2026-1234"]', ""), ROW + 'olde = "x"', "[[advisory", "rows = 1"):
        with pytest.raises(InstallError, match="cannot be read") as damaged:
            parse_advisories(text)
        assert "Install fastsd_helpers again" in damaged.value.hint


def test_every_id_stands_for_one_answer() -> None:
    seen: dict[tuple[str, str, tuple[str, ...]], str] = {}
    for row in read_advisories().rows:
        for found in row.ids:
            key = (row.package, found, row.sets)
            assert key not in seen, f"{found} twice for {row.package}"
            seen[key] = row.answer


def test_rows_for_single_sets_name_sets_that_are_web_uis() -> None:
    assert {name for row in read_advisories().rows for name in row.sets} <= {"a1111", "comfyui", "forge-neo"}


# --------------------------------------------------------------------------------------------------- the doctor


def installed(monkeypatch: pytest.MonkeyPatch, versions: dict[str, str]) -> None:
    def version(name: str) -> str:
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.metadata, "version", version)


def test_the_doctor_names_an_old_package_with_its_holes_what_closes_them_and_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    installed(monkeypatch, {"aiohttp": "3.11.15", "pillow": "12.3.0", "torch": "2.6.0+cu124"})
    old = {finding.what.split()[0]: finding for finding in doctor.examine(looks=["holes"]).findings}
    assert set(old) == {"aiohttp", "torch"}
    assert old["aiohttp"].what.startswith("aiohttp 3.11.15 has known vulnerabilities (CVE-2025-69223, CVE-2026-128131,")
    assert "here the gate does not unpack what is sent to it" in old["aiohttp"].what
    assert old["aiohttp"].todo == 'To fix them: pip install -U "aiohttp>=3.14.4"'
    assert "pip" not in old["torch"].todo  # it belongs to the platform
    assert {finding.level for finding in old.values()} == {"note"}  # it fails nothing, and stands in nobody's way


def test_on_colab_the_advice_is_an_environment_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, {"aiohttp": "3.11.15"})
    monkeypatch.setattr(advisories, "where", lambda: "colab")
    (finding,) = doctor.examine(looks=["holes"]).findings
    assert finding.todo.startswith("To fix them in an environment of your own: pip install -U")


@pytest.mark.parametrize("path", IMAGES, ids=lambda path: path.stem)
def test_what_an_image_keeps_is_closed_here_or_warned_of(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, image(path))
    found = list(old_packages())
    assert {item.name for item in found} >= {"diffusers", "pillow"}
    left = {(item.name, item.version) for item in found if item.is_open}
    assert left <= LEFT_OPEN
    levels = {finding.what.split()[0]: finding.level for finding in doctor.examine(looks=["holes"]).findings}
    assert {name for name, level in levels.items() if level == "warning"} == {name for name, _ in left}


def test_the_doctor_warns_of_what_nothing_here_closes(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = parse_advisories(ROW + '[safe_from]\nalpha = "2.0"\n')
    monkeypatch.setattr(advisories, "read_advisories", lambda: listed)
    installed(monkeypatch, {"alpha": "1.9"})
    (finding,) = doctor.examine(looks=["holes"]).findings
    assert finding.level == "warning"
    assert finding.what == "alpha 1.9 has known vulnerabilities (CVE-2026-1234); nothing here fixes CVE-2026-1234."


@pytest.mark.parametrize("door", ["reader", "captions"])
def test_an_old_sentencepiece_reads_no_tokenizer_of_a_model(
    door: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    from fastsd_helpers.captions import prompts
    from fastsd_helpers.trocr.model.checkpoint import load_tokenizer

    monkeypatch.setattr(prompts, "find_folder", lambda *_: tmp_path)
    load = {"reader": lambda: load_tokenizer(tmp_path), "captions": lambda: prompts._open_captioner("x")}[door]
    (tmp_path / "sentencepiece.bpe.model").write_bytes(b"made up")
    real, here = importlib.metadata.version, {"sentencepiece": "0.2.0"}
    monkeypatch.setattr(importlib.metadata, "version", lambda name: here.get(name) or real(name))
    with pytest.raises(ModelError, match=r"sentencepiece 0\.2\.0, which a crafted file can exploit \(CVE-2026-"):
        load()
    (tmp_path / "tokenizer.json").write_text("{}")  # read in its place, by another library
    advisories.require_safe_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    here["sentencepiece"] = "0.2.1"
    advisories.require_safe_tokenizer(tmp_path)


def test_a_safe_package_and_one_that_is_not_here_are_not_named(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, {"aiohttp": "3.14.5", "uv": "0.13.9"})
    assert doctor.examine(looks=["holes"]).findings == ()


def test_the_list_is_part_of_the_package() -> None:
    text = importlib.resources.files("fastsd_helpers").joinpath("advisories.toml").read_text(encoding="utf-8")
    assert parse_advisories(text) == read_advisories()
    assert list_problems(text) == []
    assert len(read_advisories().rows) > 45


def test_a_new_lock_is_resolved_from_what_is_safe_and_an_unsafe_one_is_not_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import importlib.util

    spec = importlib.util.spec_from_file_location("make_lock_for_advisories", ROOT / "scripts" / "make_lock.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    constraints = script.with_safe_floors(["aiohttp==3.13.0", "aiosignal==1.4.0", "pillow==12.3.0"])
    assert {"aiosignal==1.4.0", "pillow==12.3.0", "aiohttp>=3.14.4", "pillow>=12.3"} <= set(constraints)
    assert "aiohttp==3.13.0" not in constraints
    text = (ROOT / "wheels.lock").read_text(encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["make_lock.py"])
    monkeypatch.setattr(script, "make_lock", lambda *_: text)
    monkeypatch.setattr(script, "lock_problems", lambda *_: ["webui 3.12: aiohttp 3.13.0 has CVE-2026-128131"])
    assert script.main() == 1
    assert "aiohttp 3.13.0 has CVE-2026-128131" in capsys.readouterr().out
    assert (ROOT / "wheels.lock").read_text(encoding="utf-8") == text
    assert not (ROOT / "wheels.new").exists()
