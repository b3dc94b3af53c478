"""Put known faults back into a copy of the package, one by one, and see whether the tests notice each of them.

    python scripts/put_faults_back.py [--only NUMBER ...] [--list]

Each fault is one a user would suffer from, in silence: wrong results, lost work, a name that leaves its folder. The
project is copied to a temporary folder, a fault is put in there, the tests named for it are run there and must fail,
and the fault is taken out again; the checkout itself is never changed. Exits with 1 if a fault goes unnoticed, and with
2 if the table below no longer fits the code. It takes 1 to 10 s a fault on one free core.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = "fastsd_helpers"
# What is not the project's own, or as large as it is of no use to a test.
LEFT_OUT = (".git", ".venv*", "__pycache__", ".pytest_cache", ".ruff_cache", "*.egg-info", "demo-output")


@dataclass(frozen=True)
class Fault:
    """One fault: what a user would suffer, where it is, and the tests that must fail with it.

    `original` is found by its text, so a file that moves needs another `file` here and nothing else.
    """

    says: str
    file: str  # below the package
    original: str
    changed: str
    tests: tuple[str, ...]  # pytest node ids below tests/; each must fail


FAULTS = (
    Fault(
        "a value too large for fp16 becomes infinite in a large tensor, unsaid",
        "checkpoints/formats/dtypes.py",
        'if narrow.max() < 0xFC00 and narrow.view("<i2").max() < 0x7C00:',
        'if narrow.max() <= 0xFC00 and narrow.view("<i2").max() <= 0x7C00:',
        ("test_checkpoints_files.py::test_one_value_too_large_among_ordinary_ones_is_refused_wherever_it_stands",),
    ),
    Fault(
        "the character error rate counts wrong words, and is far too good",
        "trocr/teaching/metrics.py",
        "found = (jiwer.process_words if words else jiwer.process_characters)(truth, read)",
        "found = (jiwer.process_characters if words else jiwer.process_words)(truth, read)",
        ("test_trocr_data.py::test_characters_and_words_are_counted_each_by_its_own_rule",),
    ),
    Fault(
        "a checkpoint cut by a full disk is taken for whole",
        "dreambooth/resume/generation.py",
        'raise DriveError(f"Could not write {path}: {err}.", "Free some space on this machine\'s own disk.") from err',
        "del err",
        ("test_resume.py::test_a_file_that_the_system_does_not_let_grow_is_reported_and_never_taken_for_whole",),
    ),
    Fault(
        "photos do not come once each in an epoch where a batch crosses its end",
        "dreambooth/training/randomness.py",
        "divmod(position + len(picked), images)",
        "divmod(position - len(picked), images)",
        (
            "test_chance.py::test_every_picture_comes_once_in_each_epoch_whatever_the_batch",
            "test_chance.py::test_steps_and_their_parts_go_through_the_epochs_without_a_gap",
        ),
    ),
    Fault(
        "the held-out loss is measured on training pictures",
        "dreambooth/training/stages.py",
        "        if dataset.held_out:\n",
        "        if not dataset.held_out:\n",
        ("test_stages.py::test_the_pictures_that_are_judged_are_those_held_out_and_the_label_says_which",),
    ),
    Fault(
        "a loss on training pictures is shown as one of pictures never trained on",
        "dreambooth/training/stages.py",
        '"held-out images" if dataset.held_out else',
        '"held-out images" if not dataset.held_out else',
        ("test_stages.py::test_the_pictures_that_are_judged_are_those_held_out_and_the_label_says_which",),
    ),
    Fault(
        "a checkpoint that arrives late puts older weights into the ones after it",
        "dreambooth/resume/store.py",
        "if newest is not None and newest.sha256 == entry.sha256:",
        "if newest is not None or newest.sha256 == entry.sha256:",
        (
            "test_resume.py::test_a_role_is_carried_as_it_was_last_saved_while_older_copies_are_still_on_their_way",
            "test_resume.py::test_every_generation_holds_what_was_saved_last_whatever_waits_fails_and_is_carried",
        ),
    ),
    Fault(
        "a download through the link that breaks half way looks whole",
        "tunnels/gate/proxy.py",
        "            connection.abort()  # half an answer must not look like a whole one\n        except Conn",
        "            pass\n        except Conn",
        ("test_gate.py::test_half_an_answer_of_unknown_length_does_not_look_like_a_whole_one_either",),
    ),
    Fault(
        "an import as ../x leaves the sessions' folder",
        "sessions/importing.py",
        "(check_name(name) if source is not None else _name_there(name, home))",
        "(check_name(name) if source is None else _name_there(name, home))",
        (
            "test_importing.py::test_a_name_that_cannot_be_a_sessions_is_refused_at_every_way_in",
            "test_importing.py::test_an_old_session_in_place_keeps_a_name_that_would_be_refused_today",
        ),
    ),
    Fault(
        "an import in place as ../x writes outside of the sessions' folder",
        "sessions/importing.py",
        "(check_name(name) if source is not None else _name_there(name, home))",
        "(check_name(name) if source is not None else name)",
        ("test_importing.py::test_a_session_in_place_is_one_of_the_folders_there_and_no_other",),
    ),
    Fault(
        "the web UI and the playground get a session's oldest model",
        "sessions/session.py",
        "return max(made, key=lambda path: path.stat().st_mtime).absolute()",
        "return min(made, key=lambda path: path.stat().st_mtime).absolute()",
        (
            "test_webui.py::test_of_several_finished_models_of_a_session_the_newest_is_taken",
            "test_playground.py::test_of_several_finished_models_of_a_session_the_newest_is_drawn_with",
        ),
    ),
    Fault(
        "every handwritten line with a loop is cut instead of read a second time",
        "trocr/model/search.py",
        "            banned.append(tail[-unit])\n",
        "            pass\n",
        (
            "test_trocr_search.py::"
            "test_a_reading_that_bans_loops_writes_no_piece_a_third_time_and_else_the_likeliest_token",
            "test_trocr_search.py::test_a_looped_line_that_ends_in_its_second_reading_is_kept_whole",
        ),
    ),
    Fault(
        "a password in a pasted link is shown in what is logged later",
        "downloads/links.py",
        "                remember_secret(password)\n",
        "                pass\n",
        ("test_fetch.py::test_a_secret_in_a_pasted_link_is_hidden_in_whatever_is_logged_later",),
    ),
    Fault(
        "a launch with an SDXL file gets Stable Diffusion 1.5's memory flags",
        "webui/running/launching.py",
        'family = family or needed.family or "sd15"',
        'family = family or "sd15"',
        ("test_webui.py::test_the_family_of_a_file_is_what_is_in_it_and_decides_its_flags",),
    ),
    Fault(
        "a training begun in a terminal is not found by a notebook",
        "sessions/lock.py",
        'return process if holder.get("machine") == machine_id() and process.is_alive() else None',
        'return None if holder.get("machine") == machine_id() and process.is_alive() else process',
        (
            "test_sessions.py::test_who_holds_a_session_on_this_machine_is_found_while_it_lives",
            "test_child.py::test_a_training_begun_in_a_terminal_is_found_watched_and_stopped",
        ),
    ),
    Fault(
        "a training's first steps are not shown on a machine that was started a moment ago",
        "dreambooth/running/live.py",
        "self._last = -math.inf",
        "self._last = 0.0",
        ("test_child.py::test_the_journal_keeps_the_mean_loss_between_its_lines",),
    ),
    Fault(
        "a password in a pasted link is shown in its plain form, where the link has %XX",
        "downloads/links.py",
        "(parts.password, unquote(parts.password))",
        "(parts.password,)",
        ("test_fetch.py::test_a_secret_in_a_pasted_link_is_hidden_in_whatever_is_logged_later",),
    ),
    Fault(
        "every setting of every form is folded away",
        "options.py",
        "    advanced: bool = False,\n    known:",
        "    advanced: bool = True,\n    known:",
        (
            "test_options.py::test_what_an_option_does_not_say_is_off",
            "test_forms.py::test_plain_settings_are_in_plain_sight",
        ),
    ),
    Fault(
        "a run begun with an earlier version goes on with other noise",
        "dreambooth/training/randomness.py",
        'int.from_bytes(digest[:8], "little")',
        'int.from_bytes(digest[8:16], "little")',
        (
            "test_chance.py::test_draws_are_those_that_were_recorded",
            "test_denoising.py::test_the_noise_of_the_held_out_loss_is_fixed_and_never_trained_with",
            "test_stages.py::test_a_lora_begins_with_the_matrices_that_were_recorded",
        ),
    ),
    Fault(
        "a run begun with an earlier version goes on with other noise, once torch takes seeds of 64 bits",
        "dreambooth/training/randomness.py",
        "digest[:8]",
        "digest[:7]",
        ("test_chance.py::test_draws_are_those_that_were_recorded",),
    ),
    Fault(
        "a model in 64-bit numbers is converted to nothing",
        "checkpoints/formats/dtypes.py",
        "        raise _too_large(wide[np.isfinite(wide)], wanted, owner)\n    return narrow\n",
        "        raise _too_large(wide[np.isfinite(wide)], wanted, owner)\n    return None\n",
        ("test_checkpoints_files.py::test_values_of_64_bits_become_torchs",),
    ),
    Fault(
        "a checkpoint's list that is JSON of another kind ends the resume in a traceback",
        "dreambooth/resume/generation.py",
        "except (ValueError, KeyError, TypeError, AttributeError, RecursionError):",
        "except (ValueError, TypeError, AttributeError, RecursionError):",
        (
            "test_resume.py::test_a_manifest_that_is_something_else_is_passed_over",
            "test_resume.py::test_a_manifest_that_lacks_any_field_is_passed_over",
        ),
    ),
    Fault(
        "a LoRA of another model is put in in part",
        "dreambooth/training/stages.py",
        "        if own.keys() != tensors.keys():\n",
        "        if False:\n",
        ("test_stages.py::test_a_lora_of_other_layers_is_refused_and_not_put_in_in_part",),
    ),
    Fault(
        "Flux: when the VAE fails, its reason is lost and a transformer alone stays",
        "checkpoints/models/folder_conversion.py",
        "        dst.unlink(missing_ok=True)\n        raise\n",
        "        dst.unlink(missing_ok=True)\n",
        ("test_checkpoints_flux.py::test_of_two_files_neither_stays_when_one_of_them_fails_and_the_reason_is_told",),
    ),
    Fault(
        "Flux: when the VAE fails, the transformer alone stays as if it were done",
        "checkpoints/models/folder_conversion.py",
        "        dst.unlink(missing_ok=True)\n        raise\n",
        "        raise\n",
        ("test_checkpoints_flux.py::test_of_two_files_neither_stays_when_one_of_them_fails_and_the_reason_is_told",),
    ),
    Fault(
        "a disk that fails while a model is read ends in a traceback",
        "checkpoints/formats/safetensors_file.py",
        """            raise self._unreadable(f"the tensor {name!r}", err) from err\n""",
        "            del err\n",
        ("test_checkpoints_files.py::test_a_disk_that_fails_while_a_tensor_is_read_is_named_and_nothing_is_left",),
    ),
    Fault(
        "a long table with one open quote ends in a traceback",
        "trocr/ground_truth/tables.py",
        "    except DatasetError:\n        run_on = True\n",
        "    except DatasetError:\n",
        ("test_trocr_data.py::test_tabs_without_quoting_are_read_however_much_comes_after_an_open_quote",),
    ),
    Fault(
        "the report of a set of lines calls every letter rare but the rare ones",
        "trocr/reading/dataset.py",
        "if count < 5",
        "if count >= 5",
        (
            "test_trocr_data.py::test_the_report_counts_what_it_says",
            "test_trocr_data.py::test_letters_are_rare_below_five",
        ),
    ),
    Fault(
        "the report of a set of lines counts every text as repeated",
        "trocr/reading/dataset.py",
        "sum(count - 1 for count in texts.values())",
        "sum(count for count in texts.values())",
        ("test_trocr_data.py::test_the_report_counts_what_it_says",),
    ),
    Fault(
        "a row of dashes is taken for a loop and cut",
        "trocr/model/search.py",
        "len(set(ids[-unit:])) <= 2",
        "len(set(ids[-unit:])) <= 1",
        ("test_trocr_search.py::test_a_tail_is_a_loop_from_its_length_on_and_not_one_token_before",),
    ),
    Fault(
        "the first cell asks for a restart after every installation",
        "wheels/installer.py",
        "for package, version in imported.items() if now.get(package) != version))",
        "for package, version in imported.items()))",
        ("test_wheels.py::test_only_what_is_in_memory_at_another_version_asks_for_a_restart",),
    ),
    Fault(
        "with a folder of wheels, a package that comes from GitHub cannot be installed",
        "wheels/tools.py",
        "if row.url and folder and (folder / row.files[0].name).is_file():",
        "if row.url and folder and (folder / row.files[0].name):",
        ("test_wheels.py::test_an_archive_with_an_address_is_taken_from_the_folder_else_asked_for_there",),
    ),
    Fault(
        "the bounds on wrong passwords that were asked for are not those of the gate",
        "tunnels/gate/server.py",
        "Entrance(login, limiter or LoginLimiter(), session_s=",
        "Entrance(login, LoginLimiter(), session_s=",
        (
            "test_gate.py::test_the_bounds_that_were_given_are_those_of_the_gate",
            "test_gate.py::test_two_gates_may_share_one_count",
        ),
    ),
    Fault(
        "--min-snr does nothing without class pictures",
        "dreambooth/training/loss.py",
        "if not min_snr and not class_rows:",
        "if not class_rows:",
        (
            "test_denoising.py::test_the_loss_is_the_formulas",
            "test_denoising.py::test_every_setting_of_the_objective_gives_another_loss",
        ),
    ),
    Fault(
        "offset noise is another noise for each row of the picture, not one value for all of it",
        "dreambooth/training/randomness.py",
        "torch.randn((batch_size, channels, 1, 1), generator=generator)",
        "torch.randn((batch_size, channels, 8, 1), generator=generator)",
        ("test_chance.py::test_offset_noise_is_one_value_for_each_picture_and_channel",),
    ),
    Fault(
        "an image that shares its bucket with few others is seen more often than the rest",
        "dreambooth/training/randomness.py",
        "earlier = epoch * images[bucket] + places[:-1].count(bucket)",
        "earlier = number",
        ("test_chance.py::test_a_batch_is_of_one_bucket_and_every_image_comes_equally_often",),
    ),
    Fault(
        "a mirrored image is told with what was cut off of it unmirrored",
        "dreambooth/families/framing.py",
        "cut_left = max(0, round(self.photo[0] * x) - width - cut_left)",
        "cut_left = max(0, cut_left)",
        (
            "test_buckets.py::test_what_is_cut_off_is_read_back_exactly_from_images_that_hold_their_own_coordinates",
            "test_sdxl.py::test_in_every_bucket_an_image_is_told_with_what_is_cut_off_of_it_there",
        ),
    ),
    Fault(
        "class images of another size than the photos of their batch do not count",
        "dreambooth/training/stages.py",
        "loss + config.prior_weight * self.loss_of(batch.apart)",
        "loss + 0 * self.loss_of(batch.apart)",
        ("test_buckets.py::test_class_images_have_the_photos_shapes_and_count_the_same_in_a_pass_of_their_own",),
    ),
    Fault(
        "the cut of a bucket is around the middle though the subject's place is known",
        "dreambooth/dataset/buckets.py",
        "cover(width, height, size, focus)",
        "cover(width, height, size)",
        ("test_buckets.py::test_the_subject_is_kept_as_far_as_the_shape_allows",),
    ),
    Fault(
        "offset noise is left out",
        "dreambooth/training/stages.py",
        "noise = noise + config.offset_noise * offset",
        "noise = noise + 0 * offset",
        ("test_stages.py::test_a_forward_pass_is_the_pictures_that_were_drawn_with_their_prompts",),
    ),
    Fault(
        "a checkpoint without a scratch folder cannot be loaded",
        "dreambooth/resume/generation.py",
        "if self._scratch is None or path.is_relative_to(self._scratch):",
        "if self._scratch is None and path.is_relative_to(self._scratch):",
        ("test_resume.py::test_every_generation_holds_what_was_saved_last_whatever_waits_fails_and_is_carried",),
    ),
    Fault(
        "what was carried over from a base file is not said",
        "checkpoints/models/folder_conversion.py",
        'notes.append(f"{len(carried)} tensors',
        'str(f"{len(carried)} tensors',
        ("test_checkpoints_files.py::test_what_folders_lack_is_carried_over_from_a_base_file_and_that_is_said",),
    ),
)


class TableError(Exception):
    """The table does not fit the code: a sentence that says what to change in it."""


@dataclass(frozen=True)
class Outcome:
    """What the tests said of one fault."""

    failed: tuple[str, ...]  # of the tests named, those that failed
    silent: tuple[str, ...]  # and those that did not
    seconds: float


def main() -> int:
    chosen = read_options()
    numbers = chosen.only or range(1, len(FAULTS) + 1)
    if chosen.list:
        for number in numbers:
            fault = FAULTS[number - 1]
            print(f"{number:3} {fault.file}: {fault.says}")
        return 0
    with tempfile.TemporaryDirectory(prefix="put-faults-back-") as name:
        copy = Path(name) / "project"
        shutil.copytree(REPOSITORY, copy, ignore=shutil.ignore_patterns(*LEFT_OUT), symlinks=True)
        try:
            for number in numbers:
                find_original(copy, FAULTS[number - 1])
            require_copy_is_used(copy)
            require_green(copy, sorted({test for number in numbers for test in FAULTS[number - 1].tests}))
            print("| # | a user would suffer this | noticed | by | s |\n|---:|---|---|---|---:|", flush=True)
            unnoticed = [number for number in numbers if not try_fault(copy, number)]
        except TableError as err:
            print(f"put_faults_back: {err}", file=sys.stderr)
            return 2
    count = len(numbers)
    print(f"\n{count - len(unnoticed)} of {count} faults are noticed." + (f" NOT: {unnoticed}." if unnoticed else ""))
    return 1 if unnoticed else 0


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = range(1, len(FAULTS) + 1)
    parser.add_argument("--only", type=int, nargs="+", choices=numbers, metavar="NUMBER", help="these faults alone")
    parser.add_argument("--list", action="store_true", help="only name the faults")
    return parser.parse_args()


def find_original(copy: Path, fault: Fault) -> tuple[Path, str]:
    """The file of a fault and what is in it, in which the original text is found exactly once."""
    path = copy / PACKAGE / fault.file
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    count = text.count(fault.original)
    if count != 1:
        others = [
            other.relative_to(copy / PACKAGE).as_posix()
            for other in sorted((copy / PACKAGE).rglob("*.py"))
            if other != path and fault.original in other.read_text(encoding="utf-8")
        ]
        where = (
            f"it is now in {', '.join(others)}" if others else "no other file has it: put the new text into the table"
        )
        raise TableError(
            f'the text of the fault "{fault.says}" is {count} times in {fault.file}, and must be there once; {where}.'
        )
    return path, text


def try_fault(copy: Path, number: int) -> bool:
    """Put one fault in, run its tests, take it out again; prints its row and says whether it was noticed."""
    fault = FAULTS[number - 1]
    path, text = find_original(copy, fault)
    started = time.monotonic()
    path.write_text(text.replace(fault.original, fault.changed), encoding="utf-8")
    try:
        compile(path.read_text(encoding="utf-8"), fault.file, "exec")
        failed = run_tests(copy, fault.tests)
    except SyntaxError as err:
        raise TableError(f'the changed text of the fault "{fault.says}" is no Python: {err}.') from err
    finally:
        path.write_text(text, encoding="utf-8")
    silent = tuple(test for test in fault.tests if test not in failed)
    outcome = Outcome(tuple(failed), silent, time.monotonic() - started)
    print(row_of(number, fault, outcome), flush=True)
    return not silent


def row_of(number: int, fault: Fault, outcome: Outcome) -> str:
    by = "<br>".join(f"{test.partition('::')[2]}" for test in outcome.failed) or "nothing"
    said = "yes" if not outcome.silent else f"**NOT** by {'<br>'.join(outcome.silent)}"
    return f"| {number} | {fault.says} ({fault.file}) | {said} | {by} | {outcome.seconds:.0f} |"


def run_tests(copy: Path, tests: tuple[str, ...] | list[str]) -> list[str]:
    """Run tests in the copy; returns those of them that failed (an error while a test is set up counts as well)."""
    done = python_in(copy, "-m", "pytest", "-q", "--tb=no", "-rfE", "-p", "no:cacheprovider",
                     *(f"tests/{test}" for test in tests))  # fmt: skip
    if done.returncode not in (0, 1):
        raise TableError(f"the tests {', '.join(tests)} could not be run:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    told = re.findall(r"^(?:FAILED|ERROR) tests/(\S+?::\w+)", done.stdout, re.MULTILINE)
    return [test for test in tests if test in told]


def require_copy_is_used(copy: Path) -> None:
    """Else an installed package would be tested, which has no fault in it."""
    done = python_in(copy, "-c", f"import {PACKAGE}; print({PACKAGE}.__file__)")
    if not Path(done.stdout.strip() or "/").resolve().is_relative_to(copy.resolve()):
        raise TableError(f"tests would use {done.stdout.strip() or 'no package'} instead of the copy {copy}.")


def require_green(copy: Path, tests: list[str]) -> None:
    """A test that fails anyway would notice everything."""
    failed = run_tests(copy, tests)
    if failed:
        raise TableError(f"without any fault these tests fail already: {', '.join(failed)}.")


def python_in(copy: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    environ = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=copy, env=environ, capture_output=True, text=True, timeout=1800, check=False)


if __name__ == "__main__":
    sys.exit(main())
