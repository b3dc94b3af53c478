"""Steps over fixed buffers, as a GPU records them, on the CPU: the same tokens as the plain steps'."""

import contextlib
import types

import pytest
from closeness import assert_close_to, assert_same_lines, written
from tiny_readers import STEPS, judge_by, noise_pictures, write_reader

from fastsd_helpers.trocr import Reader
from fastsd_helpers.trocr.model.cuda_graph_engine import RecordedEngine
from fastsd_helpers.trocr.model.torch_engine import TorchEngine
from fastsd_helpers.trocr.reading.attention import find_attention

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
KINDS = ("base", "stage1", "small")
pytestmark = pytest.mark.numeric


class Replayed(RecordedEngine):
    """What a GPU does, without one: a recording computes the step it was made of again, into the same scores."""

    def __init__(self, model):
        super().__init__(model, device="cpu")
        self.recordings, self.replays = [], 0

    def _record(self, lines):
        engine, scores = self, self._step(lines, None).clone()
        self.recordings.append(lines)

        class Graph:
            def replay(self):
                engine.replays += 1
                scores.copy_(engine._step(lines, None))

        self._buffers.recorded[lines] = (Graph(), scores)


def readers(folder, beams, **settings):
    """A reader as it is, and one with an engine of fixed buffers."""
    settings = {"precision": "fp32", "max_new_tokens": 30, "loop_guard": False, "batch_size": 6} | settings
    return [Reader(folder, beams=beams, **settings) for _ in range(2)]


def check_same(found, plain, pictures):
    assert_same_lines(
        written(found),
        written(plain.read(pictures)),
        of_largest=STEPS,
        judge=judge_by(plain, pictures),
        beams=plain.settings.beams,
    )


@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_lines_are_read_as_without_recordings(tmp_path, kind, beams):
    write_reader(tmp_path, kind, seed=1, end=4.0)
    plain, other = readers(tmp_path, beams)
    other.engine = Replayed(other.checkpoint.model)
    pictures = noise_pictures(17, seed=3)
    found = other.read(pictures)
    assert len({len(line.tokens) for line in found}) > 2, "no line would leave the batch before the others"
    check_same(found, plain, pictures)
    # Buffers and recordings of the first batch serve all others, and whatever is read later.
    assert other.engine.recordings[0] == 6
    assert set(other.engine.recordings) <= {6, 3}
    count = len(other.engine.recordings)
    check_same(other.read(pictures[:5]), plain, pictures[:5])
    assert len(other.engine.recordings) == count == len(set(other.engine.recordings))
    assert other.engine.replays > 20


def test_a_longer_or_larger_search_gets_new_buffers(tmp_path):
    write_reader(tmp_path, "base", seed=2, end=1.0)
    checkpoint = readers(tmp_path, 1)[0].checkpoint
    plain, other = TorchEngine(checkpoint.model, device="cpu"), Replayed(checkpoint.model)
    chance = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        for lines, beams, steps in ((2, 1, 10), (4, 1, 10), (4, 3, 10), (3, 3, 70), (4, 3, 70)):
            pixels = torch.randn(lines, 3, checkpoint.pixels.height, checkpoint.pixels.width, generator=chance)
            states = [(engine, engine.begin(engine.encode(pixels), beams, steps)) for engine in (plain, other)]
            for step in range(steps):
                left = lines if step < 5 else 2
                if step == 5:
                    kept = torch.tensor([lines - 1, 0])
                    for engine, state in states:
                        engine.keep(state, kept)
                tokens = torch.randint(4, 50, (left, beams), generator=chance)
                one, two = (engine.step(state, tokens) for engine, state in states)
                assert_close_to(two, one, of_largest=STEPS, about=(lines, beams, step))
                came_from = torch.randint(0, beams, (left, beams), generator=chance)
                for engine, state in states:
                    engine.reorder(state, came_from)
        assert other.recordings == [2, 4, 2, 4, 2, 3, 4, 2]


def test_padding_that_a_model_writes_counts_as_without_recordings(tmp_path):
    write_reader(tmp_path, "stage1", seed=1)
    checkpoint = readers(tmp_path, 1)[0].checkpoint
    plain, other = TorchEngine(checkpoint.model, device="cpu"), Replayed(checkpoint.model)
    with torch.inference_mode():
        hidden = plain.encode(torch.randn(2, 3, checkpoint.pixels.height, checkpoint.pixels.width))
        states = [(engine, engine.begin(hidden, 1, 4)) for engine in (plain, other)]
        for tokens in ([[2], [2]], [[1], [5]], [[7], [1]]):
            one, two = (engine.step(state, torch.tensor(tokens)) for engine, state in states)
            assert_close_to(two, one, of_largest=STEPS)


def test_where_nothing_can_be_recorded_it_reads_all_the_same_and_says_so(tmp_path, caplog):
    """As on this computer, which has no GPU."""
    write_reader(tmp_path, "base", seed=1, end=4.0)
    plain, other = readers(tmp_path, 1)
    other.engine = RecordedEngine(other.checkpoint.model, device="cpu")
    pictures = noise_pictures(8, seed=3)
    with caplog.at_level("WARNING"):
        check_same(other.read(pictures), plain, pictures)
    assert [record.message[:32] for record in caplog.records].count("Reading without CUDA graphs, whi") == 1


@pytest.mark.parametrize("harm", ["other", "nan"])
def test_a_recording_that_gives_other_scores_is_not_taken(tmp_path, monkeypatch, caplog, harm):
    write_reader(tmp_path, "base", seed=1, end=4.0)
    plain, other = readers(tmp_path, 1)
    other.engine = RecordedEngine(other.checkpoint.model, device="cpu")
    real, calls = other.engine._step, []

    def step(lines, weights):
        calls.append(lines)
        scores = real(lines, weights)
        # The fourth call is the one that is recorded.
        return scores if len(calls) != 4 else scores * (1.1 if harm == "other" else float("nan"))

    stream = types.SimpleNamespace(wait_stream=lambda _other: None)
    fake = {
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda _stream: contextlib.nullcontext(),
        "graph": lambda _graph: contextlib.nullcontext(),
        "CUDAGraph": lambda: types.SimpleNamespace(replay=lambda: None),
    }
    for name, value in fake.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(other.engine, "_step", step)
    pictures = noise_pictures(6, seed=3)
    with caplog.at_level("WARNING"):
        found = other.read(pictures)
    assert "off by" in caplog.text
    assert not other.engine.record
    check_same(found, plain, pictures)


def test_attention_is_shown_with_fixed_buffers_too(tmp_path):
    write_reader(tmp_path, "base", seed=1, end=4.0)
    plain, other = readers(tmp_path, 1)
    other.engine = Replayed(other.checkpoint.model)
    picture = noise_pictures(1, seed=3)[0]
    assert_close_to(find_attention(other, picture).weights, find_attention(plain, picture).weights, of_largest=STEPS)
