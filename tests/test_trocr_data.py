"""Lines with their text in every form people have them, error rates, and reading folders that may be killed."""

import json
import os
import random
import signal
import subprocess
import sys

import pytest
from forked import READING
from tiny_readers import noise_pictures, write_reader

from fastsd_helpers.errors import DatasetError, SettingsError
from fastsd_helpers.trocr.model.line import Line
from fastsd_helpers.trocr.reading.dataset import LabelledLine, LineSet, group_of, read_lines
from fastsd_helpers.trocr.reading.folder import parse_shard, rows_to_bytes
from fastsd_helpers.trocr.teaching.metrics import line_errors, normalise, score_lines


@pytest.fixture
def folder(tmp_path):
    for place, picture in enumerate(noise_pictures(4)):
        picture.save(tmp_path / f"a01-00{place // 2}-0{place}.png")
    return tmp_path


NAMES = [f"a01-00{place // 2}-0{place}.png" for place in range(4)]
TEXTS = ["the fox", "Mr. Fox, Esq.", "3,14", 'he said "no"']


def csv_of(separator, quote='"'):
    rows = [f"file_name{separator}text"]
    for name, text in zip(NAMES, TEXTS, strict=True):
        rows.append(f"{name}{separator}{quote}{text.replace(quote, 2 * quote)}{quote}")
    return "\n".join(rows)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("labels.csv", csv_of(",")),
        ("labels.csv", "\ufeff" + csv_of(";")),
        ("labels.csv", csv_of("\t")),
        ("labels.tsv", csv_of("\t").replace("file_name", "Image").replace("text", "Transcription")),
        ("labels.txt", "\n".join(f"{n}\t{t}" for n, t in zip(NAMES, TEXTS, strict=True))),
        ("gt.txt", "# IAM\n" + "\n".join(f"{n[:-4]} {t}" for n, t in zip(NAMES, TEXTS, strict=True))),
        (
            "metadata.jsonl",
            "\n".join(json.dumps({"file_name": n, "text": t}) for n, t in zip(NAMES, TEXTS, strict=True)),
        ),
    ],
    ids=["csv", "bom-semicolon", "tabs-in-csv", "tsv", "txt", "iam", "imagefolder"],
)
def test_every_table_gives_the_same_lines(folder, name, content):
    (folder / name).write_text(content, encoding="utf-8")
    found = read_lines(folder)
    assert [line.text for line in found.lines] == TEXTS
    assert [line.picture.name for line in found.lines] == NAMES
    assert {line.group for line in found.lines} == {"a01-000", "a01-001"}
    assert found.problems == []


def test_pairs_of_files_and_pairs_in_memory(folder):
    for name, text in zip(NAMES[:3], TEXTS, strict=False):
        (folder / name).with_suffix(".txt").write_text(f"\ufeff{text}\n", encoding="utf-8")
    found = read_lines(folder)
    assert [line.text for line in found.lines] == TEXTS[:3]
    assert found.problems == [f"{NAMES[3]} has no {NAMES[3][:-4]}.txt beside it."]
    assert [line.text for line in read_lines([(picture, "x") for picture in noise_pictures(2)]).lines] == ["x", "x"]


def test_what_is_wrong_with_a_table_is_said_with_its_line_and_the_rest_is_used(folder):
    rows = [csv_of(","), f"{NAMES[0]},other", "missing.png,text", f"{NAMES[1]},", "a,b,c", "lonely"]
    (folder / "labels.csv").write_text("\n".join(rows))
    found = read_lines(folder)
    assert [line.text for line in found.lines] == TEXTS
    told = "\n".join(found.problems)
    assert f"line 6: {NAMES[0]} comes a second time, with another text" in told
    assert "line 7: there is no image missing.png" in told
    assert "line 9: more fields than the head has" in told
    assert "line 10: fewer fields" in told


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("picture_id,words_there\n1,2", "no column for its text|no column for the image"),
        ("file_name,author\nx,y", "no column for its text; its columns are file_name, author"),
        ("file_name,text\nnothing.png,text", "there is no image nothing.png"),
    ],
)
def test_a_table_of_no_use_is_refused_with_what_it_has(folder, content, told):
    (folder / "labels.csv").write_text(content)
    with pytest.raises(DatasetError, match=told):
        read_lines(folder)


def test_tables_and_texts_of_other_code_pages_are_read_and_the_guess_is_said(folder, caplog):
    rows = "\n".join(f"{name};строка {place}, написано от руки" for place, name in enumerate(NAMES))
    (folder / "labels.csv").write_bytes(f"file_name;text\n{rows}".encode("cp1251"))
    assert read_lines(folder).lines[1].text == "строка 1, написано от руки"
    assert "labels.csv is not UTF-8, and read as Cyrillic (cp1251), for example" in caplog.text
    (folder / "labels.csv").unlink()
    caplog.clear()
    # The short one by itself could be anything: texts of one folder are judged together.
    for name, text in zip(NAMES, ["пёс", "кошка на диване", "снег", "наш дом у реки"], strict=True):
        (folder / name).with_suffix(".txt").write_bytes(text.encode("koi8-r"))
    assert [line.text for line in read_lines(folder).lines] == ["пёс", "кошка на диване", "снег", "наш дом у реки"]
    assert caplog.text.count("read as Cyrillic (koi8_u)") == 1


def test_a_split_never_divides_a_group(folder):
    (folder / "labels.csv").write_text(csv_of(","))
    rest, held = read_lines(folder).split(0.3)
    assert len(rest.lines) == len(held.lines) == 2
    assert not {line.group for line in rest.lines} & {line.group for line in held.lines}
    report = read_lines(folder).report()
    assert (report["lines"], report["groups"]) == (4, 2)


def test_a_split_is_the_one_that_was_recorded():
    """Another one would measure readers that were taught with an earlier version on lines they have learned from."""
    lines = LineSet([LabelledLine(f"{group}-{n}", None, "x", group) for group in "abcdefghij" for n in range(3)])
    for seed, groups in ((0, "fg"), (1, "dg")):
        rest, held = lines.split(0.2, seed=seed)
        assert {line.group for line in held.lines} == set(groups)
        assert sorted(line.name for line in (*rest.lines, *held.lines)) == sorted(line.name for line in lines.lines)


@pytest.mark.parametrize("sizes", [(900, 100), (400, 60, 50, 40, 30, 20)])
def test_a_large_group_is_not_held_out_whatever_the_seed(sizes):
    lines = LineSet([
        LabelledLine(f"{writer}-{place}", None, "x", f"w{writer}")
        for writer, size in enumerate(sizes) for place in range(size)
    ])  # fmt: skip
    for seed in range(20):
        rest, held = lines.split(0.1, seed=seed)
        assert 0 < len(held.lines) <= 0.2 * len(lines.lines)
        assert len(rest.lines) + len(held.lines) == len(lines.lines)


def test_a_split_that_cannot_be_small_is_said(caplog):
    lines = LineSet([LabelledLine(f"{n}", None, "x", "ab"[n % 2]) for n in range(10)])
    _rest, held = lines.split(0.1)
    assert len(held.lines) == 5
    assert "5 of 10 lines are held out, more than was asked for" in caplog.text


def test_a_quote_that_is_not_closed_swallows_no_line_in_silence(folder):
    rows = [f"{name}\t{text}" for name, text in zip(NAMES, ['"Hello, he said', *TEXTS[1:]], strict=True)]
    (folder / "labels.tsv").write_text("\n".join(["file_name\ttext", *rows]))
    assert [line.text for line in read_lines(folder).lines] == ['"Hello, he said', *TEXTS[1:]]
    (folder / "labels.tsv").unlink()
    rows = [f"{NAMES[0]},fox", f'{NAMES[1]},"Hello', f"{NAMES[2]},he", f"{NAMES[3]},said"]
    (folder / "labels.csv").write_text("\n".join(["file_name,text", *rows]))
    found = read_lines(folder)
    assert [line.text for line in found.lines] == ["fox"]
    assert f"the text of {NAMES[1]} goes on over 2 more lines" in found.problems[0]
    (folder / "labels.csv").write_text("\n".join(["file_name,text", f'{NAMES[1]},"Hello', "x" * 200_000]))
    with pytest.raises(DatasetError, match=r"labels\.csv, after line 1: field larger than field limit"):
        read_lines(folder)


@pytest.mark.parametrize("name", ["labels.tsv", "labels.csv"])
@pytest.mark.parametrize("place", [0, 2])
@pytest.mark.parametrize("length", [10, 50_000])
def test_tabs_without_quoting_are_read_however_much_comes_after_an_open_quote(folder, name, place, length):
    """Past 131,072 characters the parser gives up on a field, which must not end the reading."""
    texts = [text + "x" * length for text in TEXTS]
    texts[place] = '"' + texts[place]
    rows = [f"{name}\t{text}" for name, text in zip(NAMES, texts, strict=True)]
    (folder / name).write_text("\n".join(["file_name\ttext", *rows]))
    found = read_lines(folder)
    assert [line.text for line in found.lines] == texts
    assert found.problems == []


def test_a_field_beyond_the_parsers_limit_is_told_in_every_kind_of_table(folder):
    for name, separator in (("labels.csv", ","), ("labels.csv", ";"), ("labels.tsv", "\t")):
        row = f"{NAMES[0]}{separator}{'x' * 140_000}"
        (folder / name).write_text("\n".join([f"file_name{separator}text", row]))
        with pytest.raises(DatasetError, match=r"field larger than field limit"):
            read_lines(folder / name)


def test_the_report_counts_what_it_says(folder):
    texts = ["abba", "abba", "abba", "cab", "cab", "zoé"]
    lines = [LabelledLine(f"{place}", None, text, "gh"[place % 2]) for place, text in enumerate(texts)]
    assert LineSet(lines, ["one is broken", "another too"], "here").report() == {
        "source": "here",
        "lines": 6,
        "groups": 2,
        "characters": 4 + 4 + 4 + 3 + 3 + 3,
        "length_median": 4,
        "length_max": 4,
        "different_letters": 6,  # a b c z o é
        "rare_letters": "cozé",  # a and b come eight times each
        "repeated_texts": 2 + 1,
        "left_out": 2,
        "left_out_by_reason": {"unusable": 2},
    }
    empty = LineSet([]).report()
    assert {empty[name] for name in ("lines", "characters", "length_median", "length_max", "repeated_texts")} == {0}


@pytest.mark.parametrize("count", [1, 4, 5, 6])
def test_letters_are_rare_below_five(count):
    found = LineSet([LabelledLine("1", None, "a" * count + "b" * 5, "g")]).report()
    assert found["rare_letters"] == ("a" if count < 5 else "")


def test_odd_files_and_names_are_reported_and_the_rest_is_used(folder):
    (folder / "labels.csv").write_text("\n".join([csv_of(","), "x" * 300 + ".png,text", "a\0b.png,text"]))
    found = read_lines(folder)
    assert len(found.lines) == len(TEXTS)
    assert len(found.problems) == 2
    (folder / "labels.csv").write_bytes(b"\xff\xfef\x00i\x00l")
    with pytest.raises(DatasetError, match="not UTF-16"):
        read_lines(folder)
    (folder / "labels.csv").unlink()
    for name, text in zip(NAMES, [b"the fox", b"caf\xe9", b"3,14", b"ok"], strict=True):
        (folder / name).with_suffix(".txt").write_bytes(text)
    found = read_lines(folder)
    assert [line.text for line in found.lines] == ["the fox", "café", "3,14", "ok"]
    assert found.problems == []
    (folder / NAMES[1]).with_suffix(".txt").write_bytes("ein schöner grüner Käfer fällt über Bö".encode()[:-1] + b"!")
    found = read_lines(folder)
    assert [line.text for line in found.lines] == ["the fox", "3,14", "ok"]
    assert "is not UTF-8 throughout: after 'r Käfer fällt über B' it cannot be read" in found.problems[0]


# ------------------------------------------------------------------------------------------------------ scores


def test_error_rates_are_counted_over_all_characters():
    pytest.importorskip("jiwer")
    scores = score_lines(["abcd", "ef"], ["abxd", "ef"])
    assert scores.cer.rate == pytest.approx(1 / 6)
    assert (scores.cer.edits, scores.cer.symbols) == (1, 6)
    assert scores.wer.rate == pytest.approx(1 / 2)
    assert scores.exact == 0.5
    assert scores.cer.low <= scores.cer.rate <= scores.cer.high
    assert score_lines(["a"], ["a"]).cer.high == 0


@pytest.mark.parametrize(
    ("truth", "read", "characters", "words"),
    [
        # (edits, symbols) counted by hand
        ("quick brown", "qwick brown", (1, 11), (1, 2)),
        ("quick brown", "qwicc brown", (2, 11), (1, 2)),  # two in one word
        ("quick brown", "qwick bruwn", (2, 11), (2, 2)),  # one in each of two
        ("quick brown", "quick", (6, 11), (1, 2)),  # a word and the blank before it are missing
        ("quick", "quick brown", (6, 5), (1, 1)),  # and are too much
        ("quick brown", "quickbrown", (1, 11), (2, 2)),  # only the blank
        ("quick  brown", "quick brown", (1, 12), (0, 2)),  # runs of blanks separate words as one does
        ("a b c d", "d c b a", (4, 7), (4, 4)),
        ("abcd", "wxyz", (4, 4), (1, 1)),
        ("abcd", "bcde", (2, 4), (1, 1)),  # one left out, one too much
        ("abc", "", (3, 3), (1, 1)),
        ("", "abc de", (6, 0), (2, 0)),
        ("  abc ", "abc", (0, 3), (0, 1)),
    ],
)
def test_characters_and_words_are_counted_each_by_its_own_rule(truth, read, characters, words):
    pytest.importorskip("jiwer")
    assert line_errors(truth, read) == characters
    assert line_errors(truth, read, words=True) == words
    scores = score_lines([truth, "same"], [read, "same"])
    assert (scores.cer.edits, scores.cer.symbols) == (characters[0], characters[1] + 4)
    assert (scores.wer.edits, scores.wer.symbols) == (words[0], words[1] + 1)
    assert scores.cer.rate == pytest.approx(characters[0] / (characters[1] + 4))
    assert scores.wer.rate == pytest.approx(words[0] / (words[1] + 1))


def test_the_normalised_rates_are_those_of_the_normalised_texts():
    pytest.importorskip("jiwer")
    truths, readings = ["The Quick, brown", "Fox."], ["the qwicc brown", "fax"]
    scores, plain = score_lines(truths, readings), score_lines(["the quick brown", "fox"], readings)
    assert (scores.cer_normalised, scores.wer_normalised) == (plain.cer, plain.wer)
    assert (plain.cer.edits, plain.wer.edits) == (3, 2)
    assert scores.cer.edits == 3 + 5  # T, Q, the comma, F, the point


def test_the_interval_holds_95_of_100_resamples_and_is_a_point_where_all_lines_are_alike():
    pytest.importorskip("jiwer")
    alike = score_lines(["abcd"] * 9, ["abcx"] * 9)
    assert (alike.cer.low, alike.cer.rate, alike.cer.high) == (0.25, 0.25, 0.25)
    # One line of 40 is wrong: 36 % of the resamples do not have it, 98 % have it three times at most.
    rare = score_lines(["abcd"] * 40, ["wxyz", *["abcd"] * 39])
    assert rare.cer.low == 0
    assert rare.cer.high == pytest.approx(3 / 40)
    assert score_lines(["abcd"] * 40, ["wxyz", *["abcd"] * 39]) == rare, "the same for the same lines and seed"


def test_normalised_text_forgives_case_points_and_blanks():
    pytest.importorskip("jiwer")
    assert normalise("The  Fox, 'Esq.'") == "the fox esq"
    scores = score_lines(["The Fox."], ["the fox"])
    assert scores.cer.rate > 0
    assert scores.cer_normalised.rate == 0
    assert line_errors("", "abc") == (3, 0)
    assert line_errors("a b", "a  b ", words=True) == (0, 2)


# -------------------------------------------------------------------------------------------------- the folder


def test_a_shard_is_given_as_one_of_many(monkeypatch):
    assert parse_shard("2/4") == (1, 4)
    assert parse_shard(None) == (0, 1)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert parse_shard(None) == (3, 8)
    for wrong in ("0/4", "5/4", "a", "1"):
        with pytest.raises(SettingsError, match="--shard is"):
            parse_shard(wrong)


def test_rows_become_every_format():
    rows = [
        Line('a "b", c', 0.5, name="x.png").as_row(),
        Line("", 0.0, name="y.png", problem="y.png is blank.").as_row(),
    ]
    assert rows_to_bytes(rows, "txt") == b'a "b", c\n\n'
    assert json.loads(rows_to_bytes(rows, "json"))[1]["problem"] == "y.png is blank."
    assert rows_to_bytes(rows, "csv").decode().splitlines()[1] == 'x.png,"a ""b"", c",0.5,,,,,,'
    assert [json.loads(line) for line in rows_to_bytes(rows, "jsonl").splitlines()] == rows


READ = """
import sys
from pathlib import Path
from fastsd_helpers.trocr import Reader
from fastsd_helpers.trocr.reading import folder as bulk
bulk._PART = 4
reader = Reader(sys.argv[1], precision="fp32", max_new_tokens=6, batch_size=4)
shard = bulk.parse_shard(sys.argv[4]) if len(sys.argv) > 4 else (0, 1)
print(bulk.read_folder(reader, Path(sys.argv[2]), Path(sys.argv[3]), shard=shard, format="json"))
"""


def test_a_run_that_was_stopped_goes_on_and_shards_give_the_whole(tmp_path, monkeypatch):
    from fastsd_helpers.trocr import Reader
    from fastsd_helpers.trocr.reading import folder as bulk

    write_reader(tmp_path / "reader", seed=1, end=4.0)
    (tmp_path / "lines").mkdir()
    for place, picture in enumerate(noise_pictures(7)):
        picture.save(tmp_path / "lines" / f"{place}.png")
    monkeypatch.setattr(bulk, "_PART", 2)
    reader = Reader(tmp_path / "reader", precision="fp32", max_new_tokens=6, batch_size=2)
    whole = bulk.read_folder(reader, tmp_path / "lines", tmp_path / "whole")
    assert (whole.pictures, whole.read_now, whole.read_before) == (7, 7, 0)

    def stop(_name):
        raise KeyboardInterrupt

    monkeypatch.setattr(bulk, "fault_point", stop)
    with pytest.raises(KeyboardInterrupt):
        bulk.read_folder(reader, tmp_path / "lines", tmp_path / "cut")
    monkeypatch.undo()
    monkeypatch.setattr(bulk, "_PART", 2)
    went_on = bulk.read_folder(reader, tmp_path / "lines", tmp_path / "cut")
    assert (went_on.read_now, went_on.read_before) == (5, 2)
    assert bulk.read_folder(reader, tmp_path / "lines", tmp_path / "shared", shard=(1, 2)).path is None
    shared = bulk.read_folder(reader, tmp_path / "lines", tmp_path / "shared", shard=(0, 2))
    assert went_on.path.read_bytes() == whole.path.read_bytes() == shared.path.read_bytes()
    reader.settings = type(reader.settings)(beams=2)
    with pytest.raises(SettingsError, match="another run: beams was 1 and is 2"):
        bulk.read_folder(reader, tmp_path / "lines", tmp_path / "whole")


def test_another_reader_and_other_pictures_of_the_same_names_are_another_run(tmp_path):
    from fastsd_helpers.trocr import Reader
    from fastsd_helpers.trocr.reading import folder as bulk

    for name, seed in (("one", 1), ("two", 2)):
        write_reader(tmp_path / name / "model", seed=seed, end=4.0)  # where fine-tuning puts every reader
        (tmp_path / name / "lines").mkdir()
        for place, picture in enumerate(noise_pictures(2, seed=seed)):
            picture.save(tmp_path / name / "lines" / f"{place}.png")
    one, two = (Reader(tmp_path / name / "model", precision="fp32", max_new_tokens=4) for name in ("one", "two"))
    bulk.read_folder(one, tmp_path / "one" / "lines", tmp_path / "out")
    assert bulk.read_folder(one, tmp_path / "one" / "lines", tmp_path / "out").read_before == 2
    with pytest.raises(SettingsError, match="another run: weights_sha256 was"):
        bulk.read_folder(two, tmp_path / "one" / "lines", tmp_path / "out")
    with pytest.raises(SettingsError, match="another run: pictures_sha256 was"):
        bulk.read_folder(one, tmp_path / "two" / "lines", tmp_path / "out")


@pytest.mark.slow
def test_a_killed_run_and_two_processes_end_with_the_same_bytes(tmp_path, forks):
    write_reader(tmp_path / "reader", seed=1, end=4.0)
    (tmp_path / "lines" / "sub").mkdir(parents=True)
    for place, picture in enumerate(noise_pictures(11)):
        picture.save(tmp_path / "lines" / ("sub" if place % 3 == 0 else "") / f"{place:02d}.png")
    (tmp_path / "lines" / "05.png").write_bytes(b"")

    def run(out, *more, fault=None):
        environment = os.environ | ({"FASTSD_FAULT": fault} if fault else {})
        words = ["-c", READ, str(tmp_path / "reader"), str(tmp_path / "lines"), str(tmp_path / out), *more]
        return forks(*READING).run(words, env=environment)

    # In a new interpreter, which differs from the forked ones in all that is its own.
    command = [sys.executable, "-c", READ, *(str(tmp_path / name) for name in ("reader", "lines", "whole"))]
    whole = subprocess.run(command, capture_output=True, text=True, check=False)
    assert whole.returncode == 0, whole.stderr
    assert run("cut", fault="trocr.part:2").returncode == -signal.SIGKILL
    assert len(list((tmp_path / "cut" / "parts").glob("part-*"))) == 2
    went_on = run("cut")
    assert "read_now=3, read_before=8" in went_on.stdout, went_on.stderr
    assert "path=None" in run("shared", "1/2").stdout
    assert run("shared", "2/2").returncode == 0
    expected = (tmp_path / "whole" / "lines.json").read_bytes()
    assert (tmp_path / "cut" / "lines.json").read_bytes() == expected
    assert (tmp_path / "shared" / "lines.json").read_bytes() == expected
    rows = json.loads(expected)
    assert [row["name"] for row in rows] == sorted(row["name"] for row in rows)
    assert [row["name"] for row in rows if row["problem"]] == ["05.png"]
    # Other pictures, or another reader, do not go into the same folder.
    (tmp_path / "lines" / "99.png").write_bytes(b"x")
    other = run("whole")
    assert "holds the results of another run: pictures was 11 and is 12" in other.stderr


def test_separators_that_end_no_line_of_a_file_stay_inside_a_text(folder):
    text = "one\u2028two\x85three"
    row = json.dumps({"file_name": NAMES[0], "text": text}, ensure_ascii=False)
    (folder / "metadata.jsonl").write_text(row + "\n", encoding="utf-8")
    assert [line.text for line in read_lines(folder).lines] == [text]


# ------------------------------------------------------------------------------------- tables of every kind, again


def line_set(*texts, groups=None):
    groups = groups or [f"g{place}" for place in range(len(texts))]
    return LineSet(
        [LabelledLine(f"{n}", None, text, group) for n, (text, group) in enumerate(zip(texts, groups, strict=True))]
    )


def test_a_report_counts_lines_letters_and_lengths():
    found = line_set("aaaaab", "bbbb", "cc", "cc", "cc", "a", groups=["x", "x", "y", "y", "z", "z"])
    found.source, found.problems = "here", ["one", "two"]
    assert found.report() == {
        "source": "here",
        "lines": 6,
        "groups": 3,
        "characters": 17,
        "length_median": 2,
        "length_max": 6,
        "different_letters": 3,
        "rare_letters": "",
        "repeated_texts": 2,
        "left_out": 2,
        "left_out_by_reason": {"unusable": 2},
    }
    assert line_set("aaaa", "bbbbb", "cdc").report()["rare_letters"] == "acd", "fewer than five times, in their order"
    assert line_set("a", "bbb", "cc", "dddd").report()["length_median"] == 3
    empty = LineSet([]).report()
    assert (empty["lines"], empty["length_median"], empty["length_max"], empty["repeated_texts"]) == (0, 0, 0, 0)


def test_a_split_holds_out_whole_groups_of_about_the_part_that_was_asked_for():
    lines = line_set(*["x"] * 100, groups=[f"g{place // 5}" for place in range(100)])
    lines.source = "here"
    for part, count in [(0.1, 10), (0.11, 15), (0.5, 50), (0.05, 5), (0.99, 95)]:
        rest, held = lines.split(part)
        assert (len(held.lines), len(rest.lines)) == (count, 100 - count), part
        assert (rest.source, held.source) == ("here", "here")
    chosen = [{line.group for line in lines.split(0.1, seed=seed)[1].lines} for seed in range(8)]
    assert len({tuple(sorted(groups)) for groups in chosen}) > 4, "the seed chooses"
    assert lines.split(0.1, seed=3)[1].lines == lines.split(0.1, seed=3)[1].lines
    one, two = line_set("a", "b", groups=["x", "y"]).split(0.5)
    assert len(one.lines) == len(two.lines) == 1
    with pytest.raises(DatasetError, match="All lines are of one group"):
        line_set("a", "b", groups=["x", "x"]).split(0.5)


def test_where_every_group_is_too_large_the_smallest_is_held_out(caplog):
    lines = line_set(*["x"] * 60, groups=["a"] * 30 + ["b"] * 11 + ["c"] * 19)
    for seed in range(5):
        rest, held = lines.split(0.05, seed=seed)
        assert {line.group for line in held.lines} == {"b"}
        assert {line.group for line in rest.lines} == {"a", "c"}
    assert "11 of 60 lines are held out" in caplog.text
    caplog.clear()
    lines.split(0.1)  # 11 is less than twice 6
    assert "held out" not in caplog.text


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("a01-122-02.jpg", "a01-122"),
        ("a01_122_02.png", "a01_122"),
        ("page.1-07", "page"),
        ("line7.png", "line7"),
        ("letters/a01-122-02.jpg", "letters"),
        ("a/b/c-1.png", "a/b"),
        ("-1.png", "-1"),
        ("x", "x"),
        ("n-x.png", "n-x"),
    ],
)
def test_lines_of_one_page_or_folder_are_one_group(name, group):
    assert group_of(name) == group


def test_pictures_are_found_without_their_folder_or_ending(folder):
    for place in ("images", "image", "lines"):
        (folder / place).mkdir()
        noise_pictures(1)[0].save(folder / place / f"{place}.jpg")
    noise_pictures(1)[0].save(folder / "scan.jpeg")
    noise_pictures(1)[0].save(folder / "old.tif")
    names = ["images", "image.jpg", "lines", "scan", "old", NAMES[0][:-4]]
    (folder / "labels.csv").write_text("\n".join(["file_name,text", *(f"{name},t" for name in names), "gone,t"]))
    found = read_lines(folder / "labels.csv")
    assert [line.picture.relative_to(folder).as_posix() for line in found.lines] == [
        "images/images.jpg", "image/image.jpg", "lines/lines.jpg", "scan.jpeg", "old.tif", NAMES[0],
    ]  # fmt: skip
    assert found.problems == ["labels.csv, line 8: there is no image gone."]


def test_a_second_line_of_one_picture_is_left_out_and_said(folder):
    rows = [f"{NAMES[0]} one", f"{NAMES[0]} one", f"{NAMES[0]} two", f"{NAMES[1]} three"]
    (folder / "labels.txt").write_text("\n".join(rows))
    found = read_lines(folder)
    assert [line.text for line in found.lines] == ["one", "three"]
    assert [problem.split(", ")[1:] for problem in found.problems] == [
        [f"line 2: {NAMES[0]} comes a second time", "with the same text; left out."],
        [f"line 3: {NAMES[0]} comes a second time", "with another text; left out."],
    ]


def test_a_group_column_decides_and_an_empty_field_falls_back_to_the_name(folder):
    rows = [f"{NAMES[0]},a,anna", f"{NAMES[1]},b,", f"{NAMES[2]},c,anna"]
    (folder / "labels.csv").write_text("\n".join([" File_Name , TEXT ,Writer", *rows]))
    assert [line.group for line in read_lines(folder).lines] == ["anna", "a01-000", "anna"]
    objects = [{"image": NAMES[0], "text": "a", "page": 7}, {"image": NAMES[1], "text": "b"}]
    (folder / "labels.csv").unlink()
    (folder / "labels.jsonl").write_text("\n".join(map(json.dumps, objects)))
    assert [line.group for line in read_lines(folder).lines] == ["7", "a01-000"]


def test_lines_of_json_that_are_none_are_said_with_their_number(folder):
    good = json.dumps({"file_name": NAMES[0], "text": "a"})
    (folder / "labels.jsonl").write_text(
        "\n".join([good, "", "{", "[1]", json.dumps({"file_name": NAMES[1], "text": 5})])
    )
    found = read_lines(folder)
    assert [line.text for line in found.lines] == ["a", "5"]  # a house number, as pandas writes it
    assert [problem.split(":")[0] for problem in found.problems] == ["labels.jsonl, line 3", "labels.jsonl, line 4"]
    assert "not a JSON object" in found.problems[1]
    (folder / "labels.jsonl").write_text(json.dumps({"file_name": NAMES[0]}))
    with pytest.raises(
        DatasetError, match=r"labels\.jsonl, line 1, has no column for its text; its columns are file_name"
    ):
        read_lines(folder)


def test_names_and_texts_are_told_apart_by_a_tab_first_and_comments_are_none(folder):
    rows = ["# a comment", "", f"{NAMES[0]}\tone two", f"{NAMES[1]} three four", f"{NAMES[2]}", " \t "]
    (folder / "labels.txt").write_text("\n".join(rows))
    found = read_lines(folder)
    assert [line.text for line in found.lines] == ["one two", "three four"]
    assert found.problems == ["labels.txt, line 5: a name and no text."]


def test_a_folder_with_one_table_of_any_name_is_read_and_with_two_it_is_not(folder):
    (folder / "mine.TSV").write_text(csv_of("\t"))
    assert len(read_lines(folder).lines) == 4
    (folder / "other.csv").write_text(csv_of(","))
    with pytest.raises(DatasetError, match=r"has no usable line: .*has no a01-000-00\.txt beside it"):
        read_lines(folder)
    (folder / "labels.csv").write_text(f"file_name,text\n{NAMES[0]},just one")
    assert [line.text for line in read_lines(folder).lines] == ["just one"], "a well-known name comes first"


def test_what_is_no_table_is_refused_with_what_would_be(folder):
    with pytest.raises(DatasetError, match="is not a table of lines") as caught:
        read_lines(folder / NAMES[0])
    assert ".csv, .tsv, .jsonl, .txt" in caught.value.hint
    with pytest.raises(DatasetError, match="There is no file or folder"):
        read_lines(folder / "nothing")
    (folder / "sub").mkdir()
    with pytest.raises(DatasetError, match="holds neither a table of lines, nor transcribed pages, nor images"):
        read_lines(folder / "sub")
    with pytest.raises(DatasetError, match=r"list has no usable line\."):
        read_lines([])
    again = line_set("a")
    assert read_lines(again) is again


def test_only_the_first_twenty_problems_are_told_one_by_one(folder, caplog):
    for count, more in [(20, None), (21, "1 more"), (25, "5 more")]:
        rows = [f"{NAMES[0]},good", *(f"gone-{n}.png,text" for n in range(count))]
        (folder / "labels.csv").write_text("\n".join(["file_name,text", *rows]))
        caplog.clear()
        assert len(read_lines(folder).problems) == count
        told = [record.getMessage() for record in caplog.records]
        assert sum("there is no image" in text for text in told) == 20
        assert [text for text in told if "more lines left out" in text] == (
            [f"... and {more} lines left out."] if more else []
        )


def test_pairs_in_folders_keep_their_names_and_both_endings_are_known(folder):
    (folder / "deep").mkdir()
    noise_pictures(1)[0].save(folder / "deep" / "one.JPG")
    (folder / "deep" / "one.gt.txt").write_text(" the text \n")
    (folder / NAMES[0]).with_suffix(".txt").write_text("a guess of a program")
    (folder / NAMES[0]).with_suffix(".gt.txt").write_text("first")
    (folder / NAMES[1]).with_suffix(".txt").write_text("  ")
    found = read_lines(str(folder))
    assert [(line.name, line.text, line.group) for line in found.lines] == [
        (NAMES[0], "first", "a01-000"),
        ("deep/one.JPG", "the text", "deep"),
    ]
    assert found.problems[0] == f"{NAMES[1]} has no text."
    assert found.source == str(folder)


class Rows(list):
    """What a Hub dataset is to us: rows with names, and the list of those names."""

    column_names = ("image", "sentence", "writer_id")


def test_a_dataset_gives_its_columns_and_pairs_may_have_a_third_part():
    pictures = noise_pictures(3)
    found = read_lines(Rows([{"image": pictures[0], "sentence": " a ", "writer_id": 3},
                             {"image": pictures[1], "sentence": None, "writer_id": 3}]))  # fmt: skip
    assert [(line.name, line.text, line.group) for line in found.lines] == [("line 1", "a", "3")]
    assert found.lines[0].picture is pictures[0]
    assert found.problems == ["line 2 has no text."]
    assert found.source == "Rows"
    found = read_lines([(pictures[0], "a"), (pictures[1], "b", "me"), (pictures[2], "c", None)])
    assert [line.group for line in found.lines] == ["line 1", "me", "line 3"]
    wrong = Rows([{"image": 1}])
    wrong.column_names = ("image", "number")
    with pytest.raises(DatasetError, match="The dataset has no column for its text; its columns are image, number"):
        read_lines(wrong)


def test_a_tab_table_whose_quotes_are_texts_is_read_whole(folder):
    quoted = ['"' + text for text in TEXTS]
    rows = [f"{name}\t{text}" for name, text in zip(NAMES, quoted, strict=True)]
    (folder / "labels.tsv").write_text("\n".join(["file_name\ttext", *rows]))
    assert [line.text for line in read_lines(folder).lines] == quoted
    rows[0] = f'{NAMES[0]}\t"' + "x" * 140_000  # past what the csv module takes for one field
    (folder / "labels.tsv").write_text("\n".join(["file_name\ttext", *rows]))
    with pytest.raises(DatasetError, match="field larger than field limit"):
        read_lines(folder)


@pytest.mark.parametrize("separator", [",", ";", "|", "\t"])
def test_the_head_tells_what_separates_the_fields(folder, separator):
    others = ",;|".replace(separator, "")
    rows = [f"file_name{separator}text", *(f"{name}{separator}a{others}b" for name in NAMES[:2])]
    for blank in ([], [""], ["", " \t", ""]):
        (folder / "labels.csv").write_text("\n".join([*blank, *rows, f"gone{separator}x"]))
        found = read_lines(folder)
        assert [line.text for line in found.lines] == [f"a{others}b"] * 2
        assert found.problems == [f"labels.csv, line {len(blank) + 4}: there is no image gone."]


def test_the_interval_is_that_of_a_thousand_resamples_of_the_lines():
    """Written out: rates of lines drawn with replacement, of which the 2.5 % at either end are left out."""
    pytest.importorskip("jiwer")
    truths = ["a" * length for length in (1, 2, 3, 5, 8, 13, 21)]
    readings = ["b", "aa", "aab", "aaaaa", "bbbbaaaa", "a" * 13, "b" * 21]
    edits = [1, 0, 1, 0, 4, 0, 21]
    for seed in (0, 5):
        chance = random.Random(seed)
        rates = []
        for _ in range(1000):
            drawn = chance.choices(list(zip(edits, map(len, truths), strict=True)), k=7)
            rates.append(sum(edit for edit, _ in drawn) / sum(symbols for _, symbols in drawn))
        rates.sort()
        found = score_lines(truths, readings, seed=seed).cer
        assert (found.low, found.high) == (rates[25], rates[974])
        assert (found.edits, found.symbols) == (27, 53)
    one = score_lines(["a"], ["b"]).cer
    assert (one.rate, one.low, one.high) == (1, 1, 1)
    nothing = score_lines([""], ["ab"]).cer
    assert (nothing.rate, nothing.low, nothing.high, nothing.symbols) == (2, 2, 2, 0)


@pytest.mark.parametrize("name", ["labels.csv", "labels.tsv", "labels.jsonl", "labels.txt"])
@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_table_is_a_sentence(folder, name, content):
    (folder / name).write_text(content)
    with pytest.raises(
        DatasetError, match=r"labels\.(csv|tsv) has no column for the image's name and its text|no usable line"
    ):
        read_lines(folder / name)


def test_exact_is_the_part_of_the_lines_without_any_error():
    pytest.importorskip("jiwer")
    assert score_lines(["a", "b", "c", " d "], ["a", "x", "y", "d"]).exact == 0.5
    assert score_lines(["a", "b", "c"], ["a", "x", "y"]).exact == pytest.approx(1 / 3)
    assert score_lines(["a"], ["A"]).exact == 0
    with pytest.raises(ValueError, match="2 true lines and 1 readings"):
        score_lines(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="0 true lines and 0 readings"):
        score_lines([], [])
