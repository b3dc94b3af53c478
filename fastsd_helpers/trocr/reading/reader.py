"""Reader: any number of lines in, their text and how sure it is out, in order, with bounded memory."""

import copy
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from fastsd_helpers.errors import SettingsError
from fastsd_helpers.model_lookup import LANGUAGE
from fastsd_helpers.runtime import logger
from fastsd_helpers.trocr.language.allowed_characters import banned_tokens
from fastsd_helpers.trocr.language.fusion import Fusion, pieces_of
from fastsd_helpers.trocr.language.ngram import CharacterModel, open_language
from fastsd_helpers.trocr.model.alternatives import alternatives_search
from fastsd_helpers.trocr.model.checkpoint import Checkpoint, open_checkpoint
from fastsd_helpers.trocr.model.cuda_graph_engine import RecordedEngine
from fastsd_helpers.trocr.model.line import Alternative, Line, Token
from fastsd_helpers.trocr.model.search import Found, beam_search, find_loop, greedy_search, unlooped
from fastsd_helpers.trocr.model.torch_engine import TorchEngine
from fastsd_helpers.trocr.pages.inputs import Item, gather
from fastsd_helpers.trocr.reading.settings import ReadConfig

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Reader"]

_WINDOW = 8  # batches that are opened together, so that lines of like length can be put into one batch
_BATCH_ON_CPU = 8
_BATCH_ON_GPU = 64
_OPENERS = 4  # threads that open and resize images; PIL lets go of the interpreter's lock for both


class _Taken(NamedTuple):
    """An image on its way: the line that says what is wrong with it, or its length in heights, and it made small."""

    name: str
    refused: Line | None = None
    length: float = 0.0
    small: "Future[Any] | None" = None

    def picture(self) -> Any:
        """The small image of one that was not refused, once it is made."""
        assert self.small is not None
        return self.small.result()


class Reader:
    """A handwriting reader: open a checkpoint once, read as many lines as you like.

    Args:
        model: a key (`trocr-base-handwritten`), a folder, or a Hub id.
        beams: see ReadConfig.
        precision: see ReadConfig.
        min_new_tokens: see ReadConfig.
        max_new_tokens: see ReadConfig.
        loop_guard: see ReadConfig.
        device: see ReadConfig.
        batch_size: see ReadConfig.
        allowed_characters: see ReadConfig.
        n_best: see ReadConfig.
        language: see ReadConfig; or an opened CharacterModel.

    Raises:
        SettingsError: a setting out of range.
        ModelError: the model cannot be opened.
    """

    def __init__(
        self,
        model: str | Path,
        beams: int = 1,
        precision: str = "auto",
        min_new_tokens: int | None = None,
        max_new_tokens: int | None = None,
        loop_guard: bool = True,
        device: str = "auto",
        *,
        batch_size: int | None = None,
        allowed_characters: str = "",
        n_best: int = 1,
        language: str | Path | CharacterModel = "auto",
        cache_dir: Path | None = None,
    ) -> None:
        choices: dict[str, Any] = {"precision": precision, "device": device}  # looked at by the settings themselves
        self.settings = ReadConfig(
            beams=beams,
            min_new_tokens=min_new_tokens,
            max_new_tokens=max_new_tokens,
            loop_guard=loop_guard,
            batch_size=batch_size,
            allowed_characters=allowed_characters,
            n_best=n_best,
            language="file" if isinstance(language, CharacterModel) else str(language),
            **choices,
        )
        self.checkpoint = open_checkpoint(model, device=device, precision=precision, cache_dir=cache_dir)
        self.engine = _make_engine(self.checkpoint)
        # A shared page reads in several threads, and an engine may have one set of buffers.
        self.alone = threading.Lock()
        limits = self.checkpoint.limits
        self.limits = replace(
            limits,
            min_new_tokens=min_new_tokens or 0,
            max_new_tokens=min(max_new_tokens or limits.max_new_tokens, self.engine.most_steps),
        )
        if self.limits.min_new_tokens > self.limits.max_new_tokens:
            raise SettingsError(
                f"min_new_tokens is {min_new_tokens}, and this model writes {self.limits.max_new_tokens} at most.",
                "Lower it, or raise max_new_tokens too.",
            )
        self._banned = None
        if allowed_characters:
            size = self.checkpoint.config["decoder"].get("vocab_size", len(self.checkpoint.tokenizer))
            self._banned = banned_tokens(self.checkpoint.tokenizer, size, allowed_characters, self.limits.eos)
        # What lines are read with: nothing, or a language model; it helps to search, or to choose from what was found.
        self.language = open_language(language, own=self.checkpoint.folder / LANGUAGE)
        self._fusion = self._make_fusion()
        on_gpu = self.checkpoint.device == "cuda"
        self.batch_size = batch_size or (_BATCH_ON_GPU if on_gpu else _BATCH_ON_CPU)
        self._pieces: dict[int, str] = {}
        # Whether lines say where the reader looked, and greedy ones what else they may be; set by what needs to know.
        self.watches = self.compares = False
        logger.info("Reading with %s on %s", Path(model).name, self.checkpoint.reason)

    def with_search(self, beams: int, *, n_best: int = 1, language: str | Path | CharacterModel = "auto") -> "Reader":
        """The same opened model with another search.

        Args:
            beams: see ReadConfig.
            n_best: see ReadConfig.
            language: see ReadConfig; or an opened CharacterModel.

        Returns:
            Another Reader, which shares the engine of this one.
        """
        other = copy.copy(self)
        other.settings = replace(self.settings, beams=beams, n_best=n_best)
        other.language = open_language(language, own=self.checkpoint.folder / LANGUAGE)
        other._fusion = other._make_fusion()
        return other

    def _make_fusion(self) -> Fusion | None:
        """The language model beside the search; None where there is none, or where it does not help there."""
        if self.language is None:
            return None
        beams = self.settings.beam_width > 1
        weights = self.language.beams if beams else self.language.greedy
        if not weights[0]:
            if not self._ranking[0]:
                logger.info("The language model is not used: it does not help with %s.",
                            "a beam search" if beams else "greedy decoding; see --beams 4")  # fmt: skip
            return None
        tokenizer = self.checkpoint.tokenizer
        size = self.checkpoint.config["decoder"].get("vocab_size", len(tokenizer))
        return Fusion(self.language, pieces_of(tokenizer, size), self.limits.eos, weights)

    @property
    def _ranking(self) -> tuple[float, float]:
        """The language model's (weight, bonus) for ranking what a search found; (0, 0) where nothing is ranked."""
        way = "rescoring" if self.settings.beam_width > 1 else "alternatives"
        return self.language.weights[way] if self.language else (0.0, 0.0)

    # ------------------------------------------------------------------------------------------------ reading

    def read(self, images: Any, *, progress: Callable[[int], None] | None = None) -> list[Line]:
        """Read images of single lines.

        Args:
            images: one or many of: paths, folders, PDFs, links, PIL images, arrays; see `pictures.gather`.
            progress: called with the number of lines done, after every batch.

        Returns:
            One Line per image, in the order given; an image that cannot be used has `problem` set.
        """
        return list(self.stream(images, progress=progress))

    def stream(self, images: Any, *, progress: Callable[[int], None] | None = None) -> Iterator[Line]:
        """Read as `read` does, and give each line as soon as it and those before it are done.

        Memory stays bounded whatever the number of images, and their size: each is made small as soon as it is open,
        and 8 batches of small ones are held at a time.

        Args:
            images: as for `read`.
            progress: called with the number of lines done, after every batch.

        Yields:
            One Line per image, in the order given.
        """
        done = 0
        with ThreadPoolExecutor(_OPENERS, thread_name_prefix="fastsd-pictures") as pool:
            items = iter(gather(images))
            while window := [self._take(pool, item) for item in islice(items, self.batch_size * _WINDOW)]:
                results: list[Line | None] = [taken.refused for taken in window]
                places = [place for place, line in enumerate(results) if line is None]
                # Long lines first: lines of one batch then end at about the same step.
                places.sort(key=lambda place: -window[place].length)
                for first in range(0, len(places), self.batch_size):
                    batch = places[first : first + self.batch_size]
                    found = self._find([window[place].picture() for place in batch])
                    for place, line in zip(batch, found, strict=True):
                        results[place] = self._to_line(window[place].name, line)
                    done += len(batch)
                    if progress:
                        progress(done)
                yield from (line for line in results if line is not None)

    def _take(self, pool: ThreadPoolExecutor, item: Item) -> "_Taken":
        """What is needed of an image, with the large one held no longer than it takes to make it small."""
        if item.picture is None:
            logger.warning("%s", item.problem)
            return _Taken(item.name, refused=Line("", 0.0, name=item.name, problem=item.problem))
        small = pool.submit(self.checkpoint.pixels.resize, item.picture)
        return _Taken(item.name, length=item.picture.width / max(1, item.picture.height), small=small)

    def _find(self, resized: list[Any]) -> list[Found]:
        """Search one batch; on a GPU that is too small for it, in halves."""
        import torch

        try:
            with self.alone, torch.inference_mode():
                hidden = self.engine.encode(self.checkpoint.pixels.batch(resized))
                return self._search(hidden)
        except torch.cuda.OutOfMemoryError:
            if len(resized) == 1:
                raise
            self.batch_size = max(1, len(resized) // 2)
            torch.cuda.empty_cache()
            logger.warning(
                "The GPU's memory is too small for %d lines per batch: %d now.", len(resized), self.batch_size
            )
            half = len(resized) // 2
            return self._find(resized[:half]) + self._find(resized[half:])

    def _search(self, hidden: Any) -> list[Found]:
        guard = self.settings.loop_guard
        chosen: dict[str, Any] = {"banned": self._banned, "language": self._fusion}
        if self.settings.beam_width > 1:
            found = beam_search(self.engine, hidden, self.limits, self.settings.beam_width, **chosen)
        else:
            watch = self.watches and type(self.engine) is TorchEngine
            compare = self._fusion is None and (self.compares or self._ranking[0] > 0)
            search = alternatives_search if compare else greedy_search
            found = search(self.engine, hidden, self.limits, stop_loops=guard, watch=watch, **chosen)
        found = self._ranked(found)
        for line in found:
            line.looped |= guard and not line.ended and find_loop(line.ids) is not None
        looped = [place for place, line in enumerate(found) if line.looped]
        if looped:
            again = greedy_search(self.engine, hidden[looped], self.limits, ban_loops=True, **chosen)
            for place, second in zip(looped, again, strict=True):
                found[place] = replace(unlooped(found[place], second), others=found[place].others)
        return found

    def _to_line(self, name: str, found: Found) -> Line:
        import math

        ids = found.ids[:-1] if found.ended else found.ids
        tokens = tuple(
            Token(token, self._piece(token), math.exp(log)) for token, log in zip(ids, found.log_probs, strict=False)
        )
        notes = (("looped",) if found.looped else ()) + (() if found.ended else ("cut",))
        text = self._text(found)
        centres = tuple(self._centre(places) for places in found.seen[: len(ids)]) if found.seen else None
        others = self._alternatives(text, found) if self.settings.n_best > 1 or self.compares else ()
        return Line(
            text, math.exp(found.mean_log_prob), tokens, name=name, notes=notes, centres=centres, alternatives=others
        )

    def _ranked(self, found: list[Found]) -> list[Found]:
        """The likeliest of each line and its others, as reader and language model see them together."""
        language, (weight, bonus) = self.language, self._ranking
        if language is None or not weight:
            return found

        def judged(line: Found) -> float:
            text = self._text(line)
            return sum(line.log_probs) + weight * language.log_prob(text) + bonus * len(text)

        ranked = (sorted((line, *line.others), key=judged, reverse=True) for line in found)
        return [replace(best, others=tuple(others)) for best, *others in ranked]

    def _text(self, found: Found) -> str:
        ids = found.ids[:-1] if found.ended else found.ids
        text: str = self.checkpoint.tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def _alternatives(self, text: str, found: Found) -> tuple[Alternative, ...]:
        """The texts that were found, each once: several rows of tokens may write the same."""
        known = {text: sum(found.log_probs)}
        for other in found.others:
            known.setdefault(self._text(other), sum(other.log_probs))
        most = None if self.compares else self.settings.n_best
        return tuple(Alternative(*item) for item in list(known.items())[:most])

    def _centre(self, places: Any) -> float:
        """Where along a line a step looked most, 0 (left) to 1: the strongest column and those beside it."""
        rows, columns = self.grid
        across = places[-rows * columns :].unflatten(0, (rows, columns)).sum(0)
        best = int(across.argmax())
        near = range(max(0, best - 1), min(columns, best + 2))
        return sum(float(across[at]) * (at + 0.5) for at in near) / sum(float(across[at]) for at in near) / columns

    def _piece(self, token: int) -> str:
        if token not in self._pieces:
            self._pieces[token] = self.checkpoint.tokenizer.decode([token])
        return self._pieces[token]

    # --------------------------------------------------------------------------------------------- embeddings

    def embed(self, images: Any, pool: Literal["none", "mean", "columns"] = "mean") -> "np.ndarray":
        """What the encoder sees in each line, for search or grouping.

        Args:
            images: as for `read`.
            pool: none = every place (the extra tokens first, then the grid row by row); mean = one vector, the mean
                of the grid; columns = one vector per column of the grid, left to right along the line.

        Returns:
            float32 [n, tokens, width] with tokens = 577, 1 or 24 for the published models. An image that cannot be
            used gives a row of not-a-number and a warning; without any image, [0, 0, 0].

        The encoder's own `pooler_output` is not used: published TrOCR models never trained it.
        """
        import numpy as np

        rows = [values for _item, values in self.embed_stream(images, pool)]
        shape = next((row.shape for row in rows if row is not None), (0, 0))
        if not rows:
            return np.empty((0, 0, 0), np.float32)
        return np.stack([np.full(shape, np.nan, np.float32) if row is None else row for row in rows])

    def embed_stream(self, images: Any, pool: str = "mean") -> Iterator[tuple[Item, "np.ndarray | None"]]:
        """Give (item, float32 [tokens, width]) one by one; None for an image that cannot be used.

        Args:
            images: as for `read`.
            pool: as for `embed`.

        Yields:
            Each item with its vectors.

        Raises:
            SettingsError: a `pool` that does not exist.
        """
        import torch

        if pool not in ("none", "mean", "columns"):
            raise SettingsError(f"pool is {pool!r}; choose none, mean or columns.", "Change the value and run again.")
        items = iter(gather(images))
        while batch := list(islice(items, self.batch_size)):
            resized = [self.checkpoint.pixels.resize(item.picture) for item in batch if item.picture is not None]
            vectors: list[np.ndarray] = []
            if resized:
                with torch.inference_mode():
                    hidden = self.engine.encode(self.checkpoint.pixels.batch(resized))
                    vectors = list(_pool(self._places(hidden), self.grid, pool))
            for item in batch:
                if item.picture is None:
                    logger.warning("%s", item.problem)
                yield item, vectors.pop(0) if item.picture is not None else None

    @staticmethod
    def _places(hidden: Any) -> Any:
        return getattr(hidden, "hidden", hidden).float().cpu()

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the encoder's places."""
        encoder = self.checkpoint.config["encoder"]
        patch = encoder.get("patch_size", 16)
        down, across = patch if isinstance(patch, (list, tuple)) else (patch, patch)
        return self.checkpoint.pixels.height // down, self.checkpoint.pixels.width // across


def _make_engine(checkpoint: Checkpoint) -> Any:
    if checkpoint.has_graphs or checkpoint.precision == "int8":
        from fastsd_helpers.trocr.model.openvino_engine import int8_engine

        return int8_engine(checkpoint)
    if checkpoint.device == "cuda":
        return RecordedEngine(checkpoint.model, device="cuda")
    return TorchEngine(checkpoint.model, device=checkpoint.device)


def _pool(places: Any, grid: tuple[int, int], pool: str) -> "np.ndarray":
    """[n, places, width] -> [n, places | 1 | columns, width]."""
    if pool == "none":
        return places.numpy()
    rows, columns = grid
    # Whatever comes before the grid (CLS, for the small models a distillation token too) says nothing of a place.
    cells = places[:, -rows * columns :].unflatten(1, (rows, columns))
    return (cells.mean(dim=(1, 2))[:, None] if pool == "mean" else cells.mean(dim=1)).numpy()
