"""Reading with n-best texts and with a language model: what is kept, what is chosen, and when it is off."""

import json
import math
from dataclasses import asdict, replace

import pytest
from tiny_readers import noise_pictures, write_reader

from fastsd_helpers.errors import DatasetError, SettingsError
from fastsd_helpers.model_lookup import LANGUAGE
from fastsd_helpers.trocr import ReadConfig, Reader
from fastsd_helpers.trocr.ground_truth.labels import texts_of
from fastsd_helpers.trocr.language.ngram import learn_characters, open_characters
from fastsd_helpers.trocr.model.line import Line
from fastsd_helpers.trocr.reading.dataset import LabelledLine, LineSet
from fastsd_helpers.trocr.reading.rows import _settings_of
from fastsd_helpers.trocr.teaching.language import _gain, choose_weights, fit_language, keep_language

pytest.importorskip("transformers")
pytest.importorskip("jiwer")

OPTIONS = {"precision": "fp32", "max_new_tokens": 8}


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    folder = tmp_path_factory.mktemp("readers") / "reader"
    write_reader(folder, "base", seed=3, end=2.0)
    return folder


def read(folder, **options):
    return Reader(folder, **OPTIONS, **options).read(noise_pictures(12))


def test_n_best_gives_the_likeliest_texts_each_once_with_the_readers_log_probabilities(reader):
    plain, best = read(reader, beams=4), read(reader, beams=4, n_best=4)
    assert [line.text for line in best] == [line.text for line in plain]
    assert all(line.alternatives == () for line in plain)
    for line in best:
        texts = [other.text for other in line.alternatives]
        assert texts[0] == line.text
        assert len(set(texts)) == len(texts) <= 4
        first = line.alternatives[0].log_prob
        assert first <= sum(math.log(token.confidence) for token in line.tokens) + 1e-9, "the end counts too"
    assert sum(len(line.alternatives) for line in best) > 24
    # So many beams as texts are asked for, and no more texts than asked for.
    assert [line.text for line in read(reader, n_best=4)] == [line.text for line in best]
    assert max(len(line.alternatives) for line in read(reader, beams=4, n_best=2)) == 2


def test_alternatives_go_through_rows_and_older_rows_have_none(reader):
    line = read(reader, n_best=3)[0]
    row = json.loads(json.dumps(line.as_row()))
    assert row["alternatives"][0] == {"text": line.text, "log_prob": round(line.alternatives[0].log_prob, 6)}
    again = Line.from_row(row)
    assert [other.text for other in again.alternatives] == [other.text for other in line.alternatives]
    row.pop("alternatives")
    assert Line.from_row(row).alternatives == ()
    assert "alternatives" not in replace(line, alternatives=()).as_row()


def test_rescoring_takes_the_text_that_both_like_best_of_those_found(reader):
    model = replace(learn_characters(["fox dog 0123 the lazy " * 5]), greedy=(0.0, 0.0), rescoring=(0.8, 0.5))
    plain, chosen = read(reader, n_best=4), read(reader, n_best=4, language=model)
    assert [line.text for line in plain] != [line.text for line in chosen], "it has something to do"
    for before, after in zip(plain, chosen, strict=True):
        assert {other.text for other in after.alternatives} == {other.text for other in before.alternatives}
        scores = [log + 0.8 * model.log_prob(text) + 0.5 * len(text) for text, log in after.alternatives]
        assert scores[0] == pytest.approx(max(scores))
        assert after.alternatives[0].text == after.text
        assert dict(before.alternatives)[after.text] == pytest.approx(dict(after.alternatives)[after.text])


class Letters:
    """An engine that sees "the" in two lines: the first is rather "txe"; the second nearly "to", until it goes on."""

    most_steps = 8

    def __init__(self, tokenizer, end):
        self.ids = {letter: tokenizer.convert_tokens_to_ids(letter) for letter in "thxeo"} | {"end": end}
        self.after = {
            self.ids[last]: {self.ids[letter]: score for letter, score in seen.items()}
            for last, seen in {"t": {}, "h": {"e": 0}, "x": {"e": 0}, "e": {"end": 0}, "o": {"end": -12}}.items()
        }

    def begin(self, hidden, beams, steps):
        self.lines = hidden.tolist()

    def step(self, state, tokens):
        torch = pytest.importorskip("torch")
        scores = torch.full((len(self.lines), 1, 1000), -9.0)
        unsure = [{"x": 0, "h": -0.5}, {"h": 0, "o": -0.3}]
        for row, (line, last) in enumerate(zip(self.lines, tokens[:, 0].tolist(), strict=True)):
            seen = self.after.get(last, {self.ids["t"]: 0})
            for token, score in (seen or {self.ids[one]: value for one, value in unsure[line].items()}).items():
                scores[row, 0, token] = score
        return scores

    def keep(self, state, lines):
        self.lines = [self.lines[line] for line in lines.tolist()]


def test_whole_lines_are_repaired_where_token_by_token_the_reader_would_be_led_astray(reader):
    torch = pytest.importorskip("torch")
    model = replace(learn_characters(["to to to to the to to"]), rescoring=(0.0, 0.0))

    def found(**weights):
        one = Reader(reader, language=replace(model, **weights), **OPTIONS)
        one.engine = Letters(one.checkpoint.tokenizer, one.limits.eos[0])
        return [one._text(line).strip() for line in one._search(torch.arange(2))]

    assert found() == ["txe", "the"]
    assert found(greedy=(0.5, 0.0))[1] != "the"
    assert found(alternatives=(0.5, 0.0)) == ["the", "the"]


def test_a_greedy_line_is_ranked_with_its_alternatives_by_weights_that_are_chosen_in_one_reading(reader):
    model = replace(learn_characters(["fox dog 0123 the lazy " * 5]), alternatives=(0.6, 0.6))
    plain, ranked = read(reader), read(reader, language=model)
    other = [at for at, (before, after) in enumerate(zip(plain, ranked, strict=True)) if before.text != after.text]
    assert other, "it has something to do"
    opened, lines = Reader(reader, **OPTIONS), lines_of([line.text for line in ranked])
    chosen, gains = choose_weights(opened, model, LineSet([lines.lines[at] for at in other]))
    assert (gains[0].way, gains[0].cer_with) == ("alternatives", 0.0)
    found = read(reader, language=chosen)
    assert [found[at].text for at in other] == [ranked[at].text for at in other]
    assert opened.read(noise_pictures(12)) == plain, "what it was chosen with is as before"


@pytest.mark.parametrize("beams", [1, 3])
def test_beside_a_search_it_changes_what_is_written_and_not_how_sure_the_reader_is(reader, beams):
    model = replace(learn_characters(["fox dog 0123 the lazy " * 5]), greedy=(2.0, 0), beams=(2.0, 0), rescoring=(0, 0))
    plain, fused = read(reader, beams=beams), read(reader, beams=beams, language=model)
    assert [line.text for line in plain] != [line.text for line in fused]
    assert sum(model.log_prob(line.text) / max(1, len(line.text)) for line in fused) > sum(
        model.log_prob(line.text) / max(1, len(line.text)) for line in plain
    )
    assert all(0 <= line.confidence <= 1 for line in fused)
    numbers = read(reader, beams=beams, language=model, allowed_characters="0-9")
    assert all(set(line.text) <= set("0123456789") for line in numbers)


def test_where_its_weight_is_nothing_everything_is_as_without(reader, caplog):
    model = learn_characters(["fox"])
    off = replace(model, **dict.fromkeys(model.weights, (0.0, 0.0)))
    caplog.set_level("INFO")
    assert read(reader, language=off) == read(reader)
    assert "does not help with greedy decoding; see --beams 4" in caplog.text
    assert read(reader, beams=2, language=off) == read(reader, beams=2)
    assert "does not help with a beam search" in caplog.text


def test_the_models_own_is_used_by_itself_and_a_file_by_its_name(reader, tmp_path):
    import shutil

    own = tmp_path / "own"
    shutil.copytree(reader, own)
    model = replace(learn_characters(["fox dog"]), greedy=(2.0, 0.0))
    model.save(own / LANGUAGE)
    file = model.save(tmp_path / "m.safetensors")
    without = [line.text for line in read(reader)]
    with_it = [line.text for line in read(reader, language=file)]
    assert with_it != without
    assert [line.text for line in read(own)] == with_it
    assert [line.text for line in read(own, language="none")] == without
    with pytest.raises(SettingsError, match=r"There is no language model .*missing"):
        Reader(reader, language="missing", **OPTIONS)
    # What was read with another one, or none, is read again; what was read before there was any is not.
    plain, used = Reader(reader, **OPTIONS), Reader(reader, language=file, **OPTIONS)
    assert _settings_of(plain, "lines") == ["fp32", 1, str(plain.limits), True, "lines"]
    assert _settings_of(used, "lines") == [*_settings_of(plain, "lines"), f"language {model.digest}"]
    assert _settings_of(Reader(reader, n_best=2, **OPTIONS), "lines")[-1] == "n-best 2"
    assert ReadConfig(n_best=3).beam_width == 3


# --------------------------------------------------------------------------------------------------------- weights


def lines_of(texts):
    pictures = noise_pictures(len(texts))
    return LineSet([LabelledLine(f"{at}", pictures[at], text, f"{at}") for at, text in enumerate(texts)])


def test_weights_are_chosen_where_they_help_and_nothing_where_they_do_not(reader):
    model = learn_characters(["fox dog 0123 the lazy " * 5])
    wanted = [line.text for line in read(reader, language=replace(model, greedy=(0.4, 0.0)))]
    chosen, gains = choose_weights(Reader(reader, **OPTIONS), model, lines_of(wanted))
    greedy = gains[0]
    assert (greedy.way, greedy.weight, greedy.cer_with, greedy.lines) == ("greedy", 0.4, 0.0, 12)
    assert greedy.cer_without > 0
    assert chosen.greedy == (0.4, 0.0)
    assert "% without, 0.00 % with" in greedy.in_words()
    assert chosen.about["gains"] == [gain.in_words() for gain in gains]
    # Where the reader alone is right, it stays alone.
    right = [line.text for line in read(reader)]
    chosen, gains = choose_weights(Reader(reader, **OPTIONS), model, lines_of(right))
    assert (gains[0].way, chosen.greedy) == ("none", (0.0, 0.0))
    assert gains[0].in_words() == "greedy: CER 0.00 % without, no better with: off"


def test_a_text_file_is_learned_from_and_counts_as_much_as_helps_on_lines_that_are_known(reader, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("fox dog 0123 the lazy " * 5)
    learned = Reader(reader, language=str(path), **OPTIONS)
    assert learned.language.digest == learn_characters([path.read_text()]).digest
    assert Reader(reader, language=str(tmp_path), **OPTIONS).language.digest == learned.language.digest
    with pytest.raises(SettingsError, match="There is no language model"):
        Reader(reader, language="", **OPTIONS)
    wanted = [line.text for line in read(reader, language=replace(learned.language, greedy=(0.4, 0.0)))]
    fitted, gain = fit_language(learned, lines_of(wanted))
    assert (gain.weight, gain.cer_with) == (0.4, 0.0)
    assert [line.text for line in fitted.read(noise_pictures(12))] == wanted
    # Where the model alone is right, the language model is off; of few lines nothing can be told.
    right = [line.text for line in read(reader)]
    fitted, gain = fit_language(learned, lines_of(right))
    assert gain.way == "none"
    assert [line.text for line in fitted.read(noise_pictures(12))] == right
    assert fit_language(learned, lines_of(wanted[:9])) == (learned, None)
    assert fit_language(Reader(reader, **OPTIONS), lines_of(wanted))[1] is None


def test_what_helps_some_lines_and_harms_others_is_not_taken():
    none, one, both = ("none", 0.0, 0.0), ("greedy", 0.1, 0.0), ("greedy", 0.2, 0.0)
    truths = ["abcd"] * 4
    assert _gain(1, {none: [2, 2, 2, 2], one: [0, 5, 0, 0]}, truths).way == "none"
    assert asdict(_gain(1, {none: [2, 2, 2, 2], both: [1, 1, 1, 1]}, truths)) == {
        "beams": 1, "way": "greedy", "weight": 0.2, "bonus": 0.0, "cer_without": 0.5, "cer_with": 0.25, "lines": 4,
    }  # fmt: skip
    assert _gain(1, {none: [1] * 4, both: [1] * 4}, truths).way == "none", "as many errors are no gain"


def test_it_is_kept_beside_the_model_only_where_it_helps(reader, tmp_path, caplog):
    import shutil

    own = tmp_path / "own"
    shutil.copytree(reader, own)
    texts = ["fox dog 0123 the lazy"] * 3
    wanted = [line.text for line in read(own, language=replace(learn_characters(texts), greedy=(0.4, 0.0)))]
    gains = keep_language(own, lines_of(texts), lines_of(wanted), **OPTIONS)
    assert gains[0].weight == 0.4
    assert open_characters(own / LANGUAGE).greedy == (0.4, 0.0)
    assert [line.text for line in Reader(own, **OPTIONS).read(noise_pictures(12))] == wanted
    shutil.rmtree(own / "language")
    right = [line.text for line in read(own)]
    assert not any(gain.weight for gain in keep_language(own, lines_of(["zzz"]), lines_of(right), **OPTIONS))
    assert not (own / LANGUAGE).exists()
    assert keep_language(own, lines_of(right), lines_of(right), **OPTIONS) == (), "learned lines measure nothing"
    assert "No language model of the texts is kept" not in caplog.text
    assert keep_language(own, lines_of(right), lines_of(right), texts=["more"], **OPTIONS) == ()
    assert "No language model of the texts is kept" in caplog.text


def test_texts_are_files_and_folders_of_them_in_any_encoding(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "one.txt").write_text("größe", encoding="utf-16")
    (tmp_path / "a" / "two.md").write_bytes(b"\xef\xbb\xbfalpha")
    (tmp_path / "a" / "photo.jpg").write_bytes(b"\xff\xd8")
    (tmp_path / "b").write_text("beta")
    assert sorted(texts_of([tmp_path / "a", tmp_path / "b"])) == ["alpha", "beta", "größe"]
    with pytest.raises(DatasetError, match="There is no file or folder"):
        texts_of([tmp_path / "c"])
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank.txt").write_text("\ufeff \n", encoding="utf-8")
    with pytest.raises(DatasetError, match=r"There is no text in .*blank\.txt"):
        texts_of([tmp_path / "blank.txt"])
    with pytest.raises(DatasetError, match="no text file"):
        texts_of([tmp_path / "empty"])


def test_a_command_makes_one_and_reads_with_it(reader, tmp_path, capsys):
    from fastsd_helpers.cli import main

    def run(*words):
        code = main([*map(str, words), "--json"])
        return code, json.loads(capsys.readouterr().out.splitlines()[-1])

    (tmp_path / "text.txt").write_text("fox dog 0123 the lazy\n" * 9)
    noise_pictures(1)[0].save(tmp_path / "line.png")
    code, made = run("trocr", "language", "--text", tmp_path / "text.txt", "--out", tmp_path / "m.safetensors")
    assert (code, made["path"], made["order"]) == (0, str(tmp_path / "m.safetensors"), 6)
    common = ("--model", reader, "--language", tmp_path / "m.safetensors", "--max-new-tokens", 6, "--n-best", 3)
    code, data = run("trocr", "read", tmp_path / "line.png", *common)
    assert code == 0
    assert len(data["lines"][0]["alternatives"]) > 1
    code, data = run("trocr", "read", tmp_path / "line.png", *common, "--no-pages", "--out", tmp_path / "out",
                     "--format", "json")  # fmt: skip
    (line,) = json.loads((tmp_path / "out" / "line.json").read_text())["pages"][0]["regions"][0]["lines"]
    assert line["alternatives"][0]["text"].split() == line["text"].split()
    code, data = run("trocr", "language", "--text", tmp_path / "none.txt", "--out", tmp_path / "m.safetensors")
    assert (code, data["error"]) == (2, f"There is no file or folder {tmp_path / 'none.txt'}.")


def test_a_fine_tuning_tells_what_a_language_model_is_worth_and_an_older_run_goes_on(reader, tmp_path):
    from fastsd_helpers.trocr.teaching.finetuning import FineTuneConfig, finetune

    pytest.importorskip("accelerate")
    learned = lines_of(["fox dog", "the lazy dog", "quick fox", "brown dog"])
    held = lines_of(["lazy fox", "dog", "the brown fox"])
    (tmp_path / "more.txt").write_text("jumps over the lazy dog")
    settings = {"epochs": 0.01, "precision": "fp32", "augment": False}
    out = tmp_path / "run"
    with pytest.raises(DatasetError, match="There is no file or folder"):
        finetune(FineTuneConfig(**settings), learned, out, model=reader, held_out=held, texts=[tmp_path / "none.txt"])
    assert not (out / "checkpoints").exists(), "it is said before anything is learned"
    made = finetune(
        FineTuneConfig(**settings), learned, out, model=reader, held_out=held, texts=[tmp_path / "more.txt"]
    )
    assert [gain["beams"] for gain in made.language] == [1, 4]
    assert {gain["lines"] for gain in made.language} == {3}
    assert (made.path / LANGUAGE).is_file() == any(gain["weight"] for gain in made.language)
    assert "With its language model, greedy: CER" in (made.path / "README.md").read_text()
    assert finetune(FineTuneConfig(**settings), learned, out, model=reader, held_out=held) == made
    without = FineTuneConfig(**settings, language=False)
    with pytest.raises(SettingsError, match="--no-language leaves that out"):
        finetune(without, learned, tmp_path / "no", model=reader, held_out=held, texts=[tmp_path / "more.txt"])
    assert not (tmp_path / "no").exists()
    # As a version wrote it that knew of none: the run is the same one, and its result opens.
    for name, gone in (("settings.json", "language"), ("result.json", "language")):
        values = json.loads((out / name).read_text(encoding="utf-8"))
        values.pop(gone)
        (out / name).write_text(json.dumps(values))
    again = finetune(FineTuneConfig(**settings), learned, out, model=reader, held_out=held)
    assert again == replace(made, language=())
    config = FineTuneConfig(**settings, language=False)
    assert finetune(config, learned, tmp_path / "without", model=reader, held_out=held).language == ()


def test_a_models_language_goes_where_the_model_goes(reader, tmp_path):
    from fastsd_helpers.downloads.pipeline import Listing
    from fastsd_helpers.model_lookup.readers import _reader_files
    from fastsd_helpers.trocr.model.checkpoint import copy_files

    sizes = {path.name: path.stat().st_size for path in reader.iterdir()}
    listing = Listing("hub", {**sizes, LANGUAGE: 9}, lambda name: json.loads((reader / name).read_text()))
    assert LANGUAGE in _reader_files(listing), "it is downloaded"
    learn_characters(["fox"]).save(tmp_path / "own" / LANGUAGE)
    (tmp_path / "int8").mkdir()
    copy_files(tmp_path / "own", ("config.json", LANGUAGE), tmp_path / "int8")
    assert (tmp_path / "int8" / LANGUAGE).read_bytes() == (tmp_path / "own" / LANGUAGE).read_bytes()
