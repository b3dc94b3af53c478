"""The lines of a fine-tuning: those that can be learned, as its trainer takes them."""

from typing import TYPE_CHECKING, Any

from fastsd_helpers.errors import DatasetError
from fastsd_helpers.runtime import logger
from fastsd_helpers.trocr.model.checkpoint import Checkpoint
from fastsd_helpers.trocr.model.vocabulary import comes_back
from fastsd_helpers.trocr.pages.inputs import gather
from fastsd_helpers.trocr.reading.dataset import LabelledLine, LineSet
from fastsd_helpers.trocr.teaching.augment import change_line

if TYPE_CHECKING:
    from fastsd_helpers.trocr.teaching.schedule import FineTuneConfig

__all__ = ["TrainingLines", "drop_unfitting", "drop_unreadable", "label_ids"]


def label_ids(tokenizer: Any, text: str, end: int, longest: int) -> list[int]:
    """A line's tokens as TrOCR was trained on them: no start token, the end at the end."""
    return [*tokenizer.encode(text, add_special_tokens=False)[: longest - 1], end]


class TrainingLines:
    """The lines as the trainer takes them; what is changed in one is a function of (seed, epoch, line)."""

    def __init__(
        self,
        lines: LineSet,
        checkpoint: Checkpoint,
        tokenizer: Any,
        start: int,
        end: int,
        longest: int,
        config: "FineTuneConfig | None",
    ) -> None:
        self.start, self.pad = start, tokenizer.pad_token_id
        self.pixels, self.epoch, self.config = checkpoint.pixels, 0, config
        self.lines: list[LabelledLine] = []
        self.labels = []
        for line in lines.lines:
            if config is None or line.text:
                self.lines.append(line)
                self.labels.append(label_ids(tokenizer, line.text, end, longest))
        self._tokens = sorted({token for labels in self.labels for token in labels} - {end})
        if not self.lines:
            raise DatasetError("No line is left to train on.", "Give more lines with their text.")

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, place: int) -> dict[str, Any]:
        import numpy as np

        item = next(iter(gather([self.lines[place].picture])))
        if item.picture is None:
            raise DatasetError(f"{self.lines[place].name}: {item.problem}", "Leave this line out of the table.")
        picture = item.picture
        if self.config is not None and self.config.augment:
            picture = change_line(picture, np.random.default_rng((self.config.seed, self.epoch, place)))
        return {"pixels": self.pixels.resize(picture), "labels": self.labels[place], "before": self._before(place)}

    def _before(self, place: int) -> list[int]:
        """What was "written before" each token of a line, some of it exchanged for other tokens of these lines.

        Few lines are soon known by heart, and then nothing is looked up in the image any more. Source: word dropout,
        Bowman et al. 2016 (arXiv 1511.06349), with other words in the place of an unknown one.
        """
        import numpy as np

        before = [self.start, *self.labels[place][:-1]]
        if self.config is not None and self.config.token_noise and self._tokens:
            chance = np.random.default_rng((self.config.seed, self.epoch, place, 1))
            for at in np.flatnonzero(chance.random(len(before)) < self.config.token_noise):
                if at:
                    before[at] = self._tokens[int(chance.integers(len(self._tokens)))]
        return before

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Put rows into one batch: labels are as long as the longest of them, -100 where there is none."""
        import torch

        longest = max(len(row["labels"]) for row in rows)
        labels = torch.tensor([row["labels"] + [-100] * (longest - len(row["labels"])) for row in rows])
        before = torch.tensor([row["before"] + [self.pad] * (longest - len(row["before"])) for row in rows])
        pixels = self.pixels.batch([row["pixels"] for row in rows])
        return {"pixel_values": pixels, "decoder_input_ids": before, "labels": labels}

    def batch(self, places: list[int]) -> dict[str, Any]:
        """The batch of the lines at these places."""
        return self.collate([self[place] for place in places])

    def name_batch(self, places: list[int]) -> dict[str, Any]:
        """A batch of which no image is opened yet: where its lines are, and the tokens that are learned from it."""
        import torch

        labels = torch.tensor([token for place in places for token in self.labels[place]])
        return {"places": torch.tensor(places), "labels": labels}


def drop_unfitting(lines: LineSet, tokenizer: Any, longest: int, config: "FineTuneConfig") -> LineSet:
    """Leave out lines whose text the model cannot write: longer than it can, or other characters than it has.

    Cut to its length, a text would teach that lines end in their middle.
    """
    kept, too_long, changed = [], [], []
    for line in lines.lines:
        tokens = len(tokenizer.encode(line.text, add_special_tokens=False)) + 1
        if tokens > longest:
            too_long.append(line)
            logger.warning("%s is left out: its text takes %d tokens, and this model writes %d at most.",
                           line.name, tokens, longest)  # fmt: skip
        elif config.vocabulary != "keep" and not comes_back(tokenizer, line.text):
            changed.append(line)
            logger.warning("%s is left out: its text has characters that this vocabulary gives back as others: %r.",
                           line.name, line.text)  # fmt: skip
        else:
            kept.append(line)
    if too_long:
        logger.warning("%d of %d lines are too long for this model: cut them into shorter lines, or set "
                       "--vocabulary replace where most characters take several tokens.",
                       len(too_long), len(lines.lines))  # fmt: skip
    if not kept:
        raise DatasetError(
            f"None of the {len(lines.lines)} lines can be learned: {len(too_long)} are too long, {len(changed)} have "
            "characters that do not come back.",
            "Cut the lines, or use --vocabulary replace.",
        )
    return LineSet(kept, lines.problems, lines.source)


def drop_unreadable(lines: LineSet) -> LineSet:
    """Leave out lines whose image cannot be opened, with a warning each; learning would stop at the first."""
    kept = []
    for line in lines.lines:
        item = next(iter(gather([line.picture])))
        if item.picture is None:
            logger.warning("%s is left out: %s", line.name, item.problem)
        else:
            kept.append(line)
    return LineSet(kept, lines.problems, lines.source)
