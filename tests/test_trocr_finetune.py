"""Fine-tuning on real files with tiny models: it learns, goes on after a kill, and what it writes is a reader."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
from closeness import assert_close_to
from forked import READING
from installed import require_installed
from PIL import Image, ImageDraw
from tiny_readers import write_reader

from fastsd_helpers.device import Device
from fastsd_helpers.errors import DatasetError, DiskFull, Interrupted, SettingsError, TrainingFailed
from fastsd_helpers.trocr import Reader
from fastsd_helpers.trocr.model.checkpoint import load_tokenizer
from fastsd_helpers.trocr.model.vocabulary import comes_back, measure_coverage, prepare_vocabulary
from fastsd_helpers.trocr.reading.dataset import LabelledLine, LineSet, read_lines
from fastsd_helpers.trocr.teaching import finetuning
from fastsd_helpers.trocr.teaching.augment import KINDS, change_line
from fastsd_helpers.trocr.teaching.finetuning import (
    FineTuneConfig,
    Schedule,
    _named_failures,
    choose_schedule,
    finetune,
)
from fastsd_helpers.trocr.teaching.trainer import _choose_precision
from fastsd_helpers.trocr.teaching.training_lines import TrainingLines, drop_unfitting, label_ids

require_installed("accelerate")

torch = pytest.importorskip("torch")
pytest.importorskip("jiwer")
transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()

GREEK = "αβγδ"


def draw(text):
    """A made-up letter that a model of 30 000 numbers learns in seconds: one quarter of the image is black."""
    picture = Image.new("RGB", (64, 64), "white")
    x, y = divmod(ord(text) % 4, 2)
    ImageDraw.Draw(picture).rectangle((32 * x + 2, 32 * y + 2, 32 * x + 29, 32 * y + 29), fill="black")
    return picture


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Twelve digits, six writers (groups) with two lines each."""
    folder = tmp_path_factory.mktemp("digits")
    rows = ["file_name,text,group"]
    for place in range(12):
        draw(str(place % 3)).save(folder / f"{place}.png")
        rows.append(f"{place}.png,{place % 3},w{place // 2}")
    (folder / "labels.csv").write_text("\n".join(rows))
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    write_reader(folder, "stage1", spread=0.15)
    return folder


QUICK = {"epochs": 220, "lr": 2e-3, "batch_size": 8, "augment": False, "precision": "fp32", "held_out": 0.3}
QUICK |= {"measure_every": 110}


@pytest.mark.numeric
def test_it_learns_and_what_it_writes_is_a_reader(data, base, tmp_path):
    result = finetune(FineTuneConfig(**QUICK, patience=0), data, tmp_path / "run", model=base)
    assert result.cer_before > 0.9
    assert result.cer_after <= result.cer_before / 2
    assert result.steps == 220
    assert [line.text for line in Reader(result.path).read([draw(str(digit)) for digit in range(3)])] == ["0", "1", "2"]
    generation = json.loads((result.path / "generation_config.json").read_text())
    assert generation.get("use_cache", True) is True  # before 5, what is the default is left out
    assert "%** after" in (result.path / "README.md").read_text()
    assert not (tmp_path / "run" / "checkpoints").exists(), "the optimizer's state is of no use any more"
    # A second call finds the run finished and changes nothing; other settings are refused by name.
    weights = (result.path / "model.safetensors").stat().st_mtime_ns
    assert finetune(FineTuneConfig(**QUICK, patience=0), data, tmp_path / "run", model=base) == result
    assert (result.path / "model.safetensors").stat().st_mtime_ns == weights
    with pytest.raises(SettingsError, match=r"lr was 0.002 and is 0.1"):
        finetune(FineTuneConfig(**{**QUICK, "lr": 0.1}, patience=0), data, tmp_path / "run", model=base)


def test_a_run_never_deletes_the_reader_it_begins_with(base, data, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(base, run / "model")
    for restart in (False, True):
        with pytest.raises(SettingsError, match="is in the run's own folder"):
            finetune(FineTuneConfig(**QUICK), data, run, model=run / "model", restart=restart)
    assert (run / "model" / "model.safetensors").is_file()


def test_weights_that_are_no_numbers_end_a_run_by_name(data, base, tmp_path):
    config = FineTuneConfig(**{**QUICK, "epochs": 4, "lr": 1.0, "measure_every": 2}, warmup=0)
    spoiled = mock.patch.object(torch.optim.AdamW, "step", autospec=True, side_effect=spoil)
    with spoiled, pytest.raises(TrainingFailed, match="no longer numbers"):
        finetune(config, data, tmp_path / "run", model=base)


def spoil(optimizer, *_args, **_kwargs):
    with torch.no_grad():
        optimizer.param_groups[0]["params"][0].fill_(float("nan"))


def test_a_full_disk_and_a_full_gpu_are_named(tmp_path, monkeypatch):
    with pytest.raises(TrainingFailed, match="The GPU's memory is too small"), _named_failures(tmp_path):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(DiskFull), _named_failures(tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(RuntimeError, match="shapes"), _named_failures(tmp_path):
        raise RuntimeError("shapes do not fit")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    with pytest.raises(DiskFull), _named_failures(tmp_path):
        raise RuntimeError("PytorchStreamWriter failed writing file")  # what torch.save makes of it


@pytest.mark.parametrize("method", ["freeze", "decoder", "lora"])
def test_what_shall_stay_stays_and_the_rest_learns(data, base, tmp_path, method):
    if method == "lora":
        pytest.importorskip("peft")
    settings = {**QUICK, "epochs": 2, "lr": 1e-2, "measure_every": 2}
    config = FineTuneConfig(**settings, method=method, frozen_layers=1, lora_rank=2)
    result = finetune(config, data, tmp_path / "run", model=base)
    before, after = (Reader(folder, precision="fp32").checkpoint.model.state_dict() for folder in (base, result.path))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(name.startswith("decoder") for name in changed)
    encoder = {name for name in changed if name.startswith("encoder") and "pooler" not in name}
    assert bool(encoder) == (method != "decoder")
    if method == "freeze":
        assert not any("layers.0." in name or "embeddings" in name for name in encoder)


def test_what_was_left_alone_is_chosen_by_lines_and_size_and_said():
    few = choose_schedule(FineTuneConfig(), 40, 3_600_000)
    assert (few.epochs, few.lr, few.token_noise) == (40, 2e-4, 0.3)
    assert "40 lines are 5 steps each" in few.reason
    many = choose_schedule(FineTuneConfig(method="lora"), 5000, 334_000_000)
    assert (many.epochs, many.lr) == (10, 4e-4)
    assert choose_schedule(FineTuneConfig(epochs=3, lr=1e-5, token_noise=0.0), 40, 3) == Schedule(3, 1e-5, "")


def test_labels_have_no_start_token_and_end_with_the_end(base):
    tokenizer = Reader(base, precision="fp32").checkpoint.tokenizer
    ids = label_ids(tokenizer, "the fox", 2, 96)
    assert ids[0] != tokenizer.bos_token_id
    assert ids[-1] == 2
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the fox"
    assert len(label_ids(tokenizer, "x" * 500, 2, 20)) == 20


SCRIPT = """
import json, sys
from fastsd_helpers.trocr.teaching.finetuning import FineTuneConfig, Schedule, choose_schedule, finetune
data, base, out = sys.argv[1:4]
settings = json.loads(sys.argv[4])
result = finetune(FineTuneConfig(**settings), data, __import__("pathlib").Path(out), model=base)
print(json.dumps({"first": result.first_step, "steps": result.steps, "cer": result.cer_after}))
"""


@pytest.mark.numeric
@pytest.mark.slow
@pytest.mark.parametrize(("fault", "method"), [(2, "full"), (3, "full"), (3, "lora")])
def test_a_run_that_ends_early_ends_there_after_a_kill_too(data, base, tmp_path, forks, fault, method):
    if method == "lora":
        pytest.importorskip("peft")
    # At this rate nothing is ever learned: the first measurement stays the best, and the third is the last.
    settings = {**QUICK, "epochs": 40, "lr": 1e-8, "patience": 2, "measure_every": 2, "method": method}

    def run(out, fault=None):
        environment = os.environ | ({"FASTSD_FAULT": fault} if fault else {})
        words = ["-c", SCRIPT, str(data), str(base), str(out), json.dumps(settings)]
        return forks(*READING).run(words, env=environment)

    whole = run(tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    assert run(tmp_path / "cut", f"trocr.checkpoint:{fault}").returncode == -signal.SIGKILL
    os.rename(tmp_path / "cut", tmp_path / "moved")
    again = run(tmp_path / "moved")
    assert again.returncode == 0, again.stderr
    before, after = (json.loads(done.stdout.splitlines()[-1]) for done in (whole, again))
    assert before["steps"] == after["steps"] == 6
    assert before["cer"] == after["cer"]
    one, other = ((tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "moved"))
    assert one == other


class StopAt(threading.Event):
    """Set by the report of a run's step, as Stop in a notebook sets it in the middle of a run."""

    def __init__(self, step):
        super().__init__()
        self.step, self.seen = step, []

    def __call__(self, progress):
        self.seen.append(progress)
        if progress.stage == "teaching" and progress.step >= self.step > 0:
            self.set()


@pytest.mark.numeric
@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_run_that_is_stopped_anywhere_goes_on_and_ends_as_one_that_was_not(data, base, tmp_path, method):
    if method == "lora":
        pytest.importorskip("peft")
    # 8 lines in batches of 3 are 3 steps an epoch, measured after every second: stops in the middle of an epoch, at
    # its end, beside a measurement and at one.
    config = FineTuneConfig(
        **{**QUICK, "epochs": 4, "batch_size": 3, "augment": True, "measure_every": 2}, patience=0, method=method
    )
    whole = StopAt(0)
    result = finetune(config, data, tmp_path / "whole", model=base, report=whole, stop=whole)
    assert [whole.seen[0].stage, whole.seen[-1].stage] == ["before", "after"]
    assert result.steps == 12
    reached = []
    for step in (1, 4, 6, 11):
        watch = StopAt(step)
        with pytest.raises(Interrupted, match=rf"at step {step} of {result.steps}") as caught:
            finetune(config, data, tmp_path / "cut", model=base, report=watch, stop=watch)
        assert "everything up to there is saved" in caught.value.problem
        begun = next(progress for progress in watch.seen if progress.stage == "teaching" and progress.cer is None)
        reached.append(begun.step)
    assert reached == [0, 1, 4, 6], "each goes on from where the one before said it stopped"
    last = StopAt(0)
    again = finetune(config, data, tmp_path / "cut", model=base, report=last, stop=last)
    assert again.first_step == 11
    assert again.curve == result.curve
    told = [(progress.step, progress.cer) for progress in last.seen if progress.cer is not None]
    assert told == list(result.curve), "the curve of a watcher has what was measured before the stop too"
    one, other = ((tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "cut"))
    assert one == other


def test_a_stop_while_the_held_out_lines_are_read_ends_there(data, base, tmp_path):
    stop = threading.Event()
    stop.set()
    with pytest.raises(Interrupted, match="while the held-out lines were read"):
        finetune(FineTuneConfig(**QUICK), data, tmp_path / "run", model=base, stop=stop)
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.numeric
@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_as_one_that_was_not(data, base, tmp_path, forks):
    settings = json.dumps({**QUICK, "epochs": 4, "batch_size": 4, "augment": True, "patience": 0, "measure_every": 2})

    def run(out, fault=None):
        environment = os.environ | ({"FASTSD_FAULT": fault} if fault else {})
        return forks(*READING).run(["-c", SCRIPT, str(data), str(base), str(out), settings], env=environment)

    # In a new interpreter, which differs from the forked ones in all that is its own.
    command = [sys.executable, "-c", SCRIPT, str(data), str(base), str(tmp_path / "whole"), settings]
    whole = subprocess.run(command, capture_output=True, text=True, check=False)
    assert whole.returncode == 0, whole.stderr
    killed = run(tmp_path / "cut", "trocr.checkpoint:2")
    assert killed.returncode == -signal.SIGKILL
    # What a kill in the middle of writing leaves: a newer folder with a part missing.
    newest = max((tmp_path / "cut" / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    torn = newest.with_name("checkpoint-999")
    torn.mkdir()
    (torn / "model.safetensors").write_bytes(b"\0" * 9)
    went_on = run(tmp_path / "cut")
    assert went_on.returncode == 0, went_on.stderr
    assert json.loads(went_on.stdout.splitlines()[-1])["first"] == 4
    from safetensors.torch import load_file

    one, other = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_unreadable_pictures_are_left_out_and_one_group_cannot_be_split(data, base, tmp_path):
    with pytest.raises(DatasetError, match="All lines are of one group"):
        finetune(FineTuneConfig(**QUICK), [(draw("1"), "1")], tmp_path / "run", model=base)


# ------------------------------------------------------------------------------------------------- vocabulary


@pytest.mark.numeric
@pytest.mark.parametrize("kind", ["base", "stage1", "small"])
@pytest.mark.parametrize("mode", ["extend", "replace"])
def test_new_letters_get_tokens_whose_vectors_are_those_of_their_bytes(tmp_path, kind, mode):
    write_reader(tmp_path / "reader", kind)
    checkpoint = Reader(tmp_path / "reader", precision="fp32").checkpoint
    model, tokenizer = checkpoint.model, checkpoint.tokenizer
    texts = [GREEK, "the αβ fox"]
    before = measure_coverage(tokenizer, texts)
    assert set(before.costly_letters + before.lost_letters) >= set(GREEK)
    pieces = tokenizer.encode("α", add_special_tokens=False)
    words = model.decoder.get_input_embeddings().weight.detach().clone()
    scale = getattr(model.decoder.get_input_embeddings(), "embed_scale", 1.0)
    tokenizer, added = prepare_vocabulary(model, tokenizer, texts, mode)
    assert set(GREEK) <= set(added)
    after = measure_coverage(tokenizer, texts)
    assert after.advice == "keep"
    assert not after.lost_letters
    ids = tokenizer.encode("αβ the", add_special_tokens=False)
    assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True).strip() == "αβ the"
    place = tokenizer.convert_tokens_to_ids("α")
    table = model.decoder.get_input_embeddings()
    known = [piece for piece in pieces if piece != 3]
    expected = words[known].mean(0) if known else words.mean(0)
    assert_close_to(table.weight[place], expected, of_largest=1e-6)  # means of a few fp32 vectors, in any order
    assert getattr(table, "embed_scale", 1.0) == scale
    assert model.decoder.get_output_embeddings().weight.shape[0] == len(tokenizer)
    assert (kind != "stage1") == (model.decoder.get_output_embeddings().weight.data_ptr() == table.weight.data_ptr()), (
        "tied stays tied"
    )


@pytest.mark.numeric
def test_a_reader_with_new_letters_is_written_and_opened_again(data, base, tmp_path):
    folder = tmp_path / "greek"
    folder.mkdir()
    rows = ["file_name,text,group"]
    for place in range(8):
        draw("ab"[place % 2]).save(folder / f"{place}.png")
        rows.append(f"{place}.png,{GREEK[place % 2]},w{place // 2}")
    (folder / "labels.csv").write_text("\n".join(rows), encoding="utf-8")
    for mode in ("extend", "replace"):
        config = FineTuneConfig(
            **{**QUICK, "held_out": 0.25, "epochs": 80, "measure_every": 40}, vocabulary=mode, patience=0
        )
        result = finetune(config, folder, tmp_path / mode, model=base)
        texts = [line.text for line in Reader(result.path, precision="fp32").read([draw("a"), draw("b")])]
        assert set(texts) <= {"α", "β"}, "whether it tells them apart is another test's question"
        assert result.cer_after <= 0.5
        assert set(result.added_letters) == {"α", "β"}


@pytest.mark.parametrize("text", ["Łódź, gęś", "žluťoučký kůň", "ÄÖÜ ß É þ"])
def test_letters_that_a_byte_level_tokenizer_writes_bytes_with_still_come_back(tmp_path, text):
    write_reader(tmp_path / "reader", "base")
    checkpoint = Reader(tmp_path / "reader", precision="fp32").checkpoint
    lost = measure_coverage(checkpoint.tokenizer, [text]).lost_letters
    tokenizer, _added = prepare_vocabulary(checkpoint.model, checkpoint.tokenizer, [text, "α"], "extend")
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text
    assert measure_coverage(tokenizer, [text]).lost_letters == lost == ""
    assert "α" in tokenizer.get_vocab()


GERMAN = ["fürſt", "der Fürſt über Öl", "the fox", "ꝑ tꝛ ſey", "e\u0303 n\u0304 x", "שלום עולם", "a  b", "Ende."]


@pytest.mark.parametrize("kind", ["base", "small"])
@pytest.mark.parametrize("mode", ["extend", "replace"])
def test_every_training_text_comes_back_after_the_vocabulary_is_fitted_also_from_disk(tmp_path, kind, mode):
    write_reader(tmp_path / "reader", kind)
    checkpoint = Reader(tmp_path / "reader", precision="fp32").checkpoint
    rows = checkpoint.model.decoder.get_input_embeddings().weight.shape[0]
    tokenizer, added = prepare_vocabulary(checkpoint.model, checkpoint.tokenizer, GERMAN, mode)
    assert [text for text in GERMAN if not comes_back(tokenizer, text)] == []
    assert added
    if mode == "extend":
        assert len(tokenizer) == rows + len(added), "one token a letter, and none of the old ones moved"
    tokenizer.save_pretrained(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert [text for text in GERMAN if not comes_back(again, text)] == []
    assert [again.encode(text) for text in GERMAN] == [tokenizer.encode(text) for text in GERMAN]


def test_lines_a_model_cannot_write_are_left_out_by_name_and_never_cut(data, base, tmp_path, caplog):
    checkpoint = Reader(base, precision="fp32").checkpoint
    texts = ["short", "x" * 200, "fine"]
    lines = LineSet([LabelledLine(f"line {n}", draw("1"), text, "g") for n, text in enumerate(texts)])
    kept = drop_unfitting(lines, checkpoint.tokenizer, 20, FineTuneConfig())
    assert [line.text for line in kept.lines] == ["short", "fine"]
    assert "line 1 is left out: its text takes" in caplog.text
    assert "1 of 3 lines are too long" in caplog.text
    with pytest.raises(DatasetError, match="None of the 1 lines can be learned: 1 are too long"):
        drop_unfitting(LineSet(lines.lines[1:2]), checkpoint.tokenizer, 20, FineTuneConfig())
    tokenizer, _added = prepare_vocabulary(checkpoint.model, checkpoint.tokenizer, ["abc"], "replace")
    other = LineSet([LabelledLine("a", None, "cab", "g"), LabelledLine("b", None, "dog", "g")])
    kept = drop_unfitting(other, tokenizer, 20, FineTuneConfig(vocabulary="replace"))
    assert [line.text for line in kept.lines] == ["cab"]
    assert "b is left out: its text has characters that this vocabulary gives back as others: 'dog'" in caplog.text


def test_a_run_of_a_version_without_unicode_forms_keeps_its_texts(tmp_path):
    lines = LineSet([LabelledLine("1", None, "e\u0301", "g")])
    config = FineTuneConfig(normal_form="none")
    finetuning._check_settings(tmp_path, config, "m", lines, LineSet([]), False)
    settings = json.loads((tmp_path / "settings.json").read_text())
    del settings["normal_form"]
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    assert finetuning._is_earlier(tmp_path)
    finetuning._check_settings(tmp_path, config, "m", lines, LineSet([]), False)
    assert finetuning._is_earlier(tmp_path), "it stays one, however often it is resumed"
    with pytest.raises(SettingsError, match="lr was"):
        finetuning._check_settings(
            tmp_path, FineTuneConfig(normal_form="none", lr=1e-3), "m", lines, LineSet([]), False
        )


# ------------------------------------------------------------------------------------------------ augmentation


@pytest.mark.parametrize("kind", KINDS)
def test_each_change_changes_the_picture_a_little_and_can_be_repeated(kind):
    picture = draw("8")
    one, other = (change_line(picture, np.random.default_rng(3), kind) for _ in range(2))
    assert np.array_equal(np.asarray(one), np.asarray(other))
    same = one.size == picture.size and np.array_equal(np.asarray(one), np.asarray(picture))
    assert same == (kind == "none")
    assert abs(np.asarray(one).mean() - np.asarray(picture).mean()) < 40


def test_noise_exchanges_letters_before_and_never_what_is_to_be_written(base):
    checkpoint = Reader(base, precision="fp32").checkpoint
    lines = read_lines([(draw("1"), "the fox and the hen", "one"), (draw("2"), "the hen", "two")])
    end = checkpoint.limits.eos[0]

    def rows(noise, epoch=0):
        config = FineTuneConfig(token_noise=noise, augment=False)
        found = TrainingLines(lines, checkpoint, checkpoint.tokenizer, checkpoint.limits.start, end, 64, config)
        found.epoch = epoch
        return [found[place] for place in range(len(found))]

    plain, noisy = rows(0.0), rows(0.5)
    known = {token for row in plain for token in row["labels"]}
    assert [row["labels"] for row in noisy] == [row["labels"] for row in plain]
    assert [row["before"] for row in rows(0.5)] == [row["before"] for row in noisy]  # a function of (seed, epoch, line)
    assert [row["before"] for row in rows(0.5, epoch=1)] != [row["before"] for row in noisy]
    for row, exact in zip(noisy, plain, strict=True):
        assert exact["before"] == [checkpoint.limits.start, *exact["labels"][:-1]]
        assert row["before"][0] == checkpoint.limits.start
        assert set(row["before"][1:]) <= known
    assert noisy[0]["before"] != plain[0]["before"]


@pytest.mark.parametrize(
    ("kind", "has_bf16", "expected"),
    [
        ("cpu", True, "bf16"),
        ("cpu", False, "fp32"),
        ("cuda", True, "bf16"),
        ("cuda", False, "fp16"),
        ("mps", True, "fp32"),
    ],
)
def test_the_format_of_the_sums_is_what_the_device_computes_fast(kind, has_bf16, expected):
    assert _choose_precision(Device(kind, kind, 2**33, has_bf16)) == expected
