"""From an image's vectors to token ids: greedy search, beam search and the guard against loops.

Both searches give the tokens of transformers' `generate` (4.50 and newer) for the same settings; lines that have
ended leave the batch at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

__all__ = ["Engine", "Found", "Language", "Limits", "beam_search", "find_loop", "greedy_search", "unlooped"]

# Half of the work of a step is reading the weights, which costs the same for fewer lines: the copy that drops
# finished lines pays when at least this part of them has gone.
_DROP_FROM = 0.25
_LONGEST_UNIT = 12  # tokens in the longest piece whose repetition counts as a loop
_CHECK_EVERY = 8
_JUDGED = 16  # the likeliest tokens of a step, which a language model is asked about; others are not written with one


class Engine(Protocol):
    """What a search needs of a model; see TorchEngine."""

    most_steps: int

    def begin(self, hidden: Any, beams: int, steps: int) -> Any:
        """Prepare the search over the lines of `hidden`."""

    def step(self, state: Any, tokens: "torch.Tensor") -> "torch.Tensor":
        """One token further: float32 scores before softmax, [lines, beams, vocabulary]."""

    def keep(self, state: Any, lines: "torch.Tensor") -> None:
        """Go on with these lines alone."""

    def reorder(self, state: Any, beams: "torch.Tensor") -> None:
        """Go on with other beams."""


class Language(Protocol):
    """What a search needs of a language model; see language.fusion.Fusion."""

    def begin(self) -> Any:
        """A line of which nothing is written."""

    def after(self, written: Any, token: int) -> Any:
        """The line with one token more."""

    def added(self, lines: list[Any], tokens: list[list[int]]) -> list[list[float]]:
        """What each of some tokens would add to the score of each line."""


@dataclass(frozen=True)
class Limits:
    """The ids that begin and end a line, and how long it may be (in tokens, the end counted)."""

    start: int
    eos: tuple[int, ...]
    min_new_tokens: int = 0
    max_new_tokens: int = 128


@dataclass
class Found:
    """One line as found: ids without the start, with the end if it came, and the reader's log-probability of each."""

    ids: list[int]
    log_probs: list[float]
    ended: bool
    looped: bool = False
    seen: "list[torch.Tensor] | None" = None  # for each token its attention over the image's places, where asked for
    others: "tuple[Found, ...]" = ()  # what else the line may be, the likelier first; of a beam search
    rivals: list[tuple[float, int]] | None = None  # where asked for: how much likelier each token is, than which one

    @property
    def mean_log_prob(self) -> float:
        """Mean log-probability per token, the end counted; 0 for an empty result."""
        return sum(self.log_probs) / max(1, len(self.log_probs))

    def add(self, token: int, log_prob: float, looked: "torch.Tensor | None", eos: tuple[int, ...]) -> None:
        """Write one token more, and where the model looked for it.

        Args:
            token: its id.
            log_prob: the reader's.
            looked: over the image's places, where that is kept.
            eos: the ids that end a line.
        """
        self.ids.append(token)
        self.log_probs.append(log_prob)
        if self.seen is not None and looked is not None:
            self.seen.append(looked)
        self.ended = token in eos


def greedy_search(
    engine: Engine,
    hidden: Any,
    limits: Limits,
    *,
    stop_loops: bool = False,
    ban_loops: bool = False,
    banned: "torch.Tensor | None" = None,
    language: Language | None = None,
    watch: bool = False,
    compare: bool = False,
    begun: Sequence[Sequence[int]] = (),
) -> list[Found]:
    """Take the likeliest token until the line ends.

    Args:
        hidden: the images' vectors, [lines, places, width].
        stop_loops: end a line (as `looped`) once its tail repeats itself, instead of going on to the limit.
        ban_loops: never write a piece a third time in a row.
        banned: ids of tokens that are never written; probabilities are among the others.
        language: adds to the scores by which tokens are chosen.
        watch: keep where each step looked; only TorchEngine can.
        compare: keep the likeliest rival of every token.
        begun: the ids that each line begins with, whatever their likelihood.
    """
    import torch

    steps = min(limits.max_new_tokens, engine.most_steps)
    state = engine.begin(hidden, 1, steps)
    found = [
        Found([], [], False, seen=[] if watch else None, rivals=[] if compare else None) for _ in range(len(hidden))
    ]
    running = list(range(len(found)))  # rows of the engine's state -> places in `found`; -1 when ended
    written = [language.begin() if language else None for _ in found]
    tokens = torch.full((len(running), 1), limits.start)
    for step in range(steps):
        scores, places = _watched(engine, state, tokens) if watch else (engine.step(state, tokens), None)
        scores = _without(banned, scores[:, 0])
        if step < limits.min_new_tokens:
            scores[:, list(limits.eos)] = float("-inf")
        for row, place in enumerate(running if ban_loops else []):
            if place >= 0:
                scores[row, _would_loop(found[place].ids)] = float("-inf")
        best = _likeliest(scores, language, [written[place] for place in running], limits.eos)
        for row, place in enumerate(running if begun else []):
            if step < len(begun[place]):
                best[row] = begun[place][step]
        rivals = _rivals(scores, best) if compare else []
        logs = (scores.gather(1, best[:, None])[:, 0] - scores.logsumexp(dim=-1)).tolist()
        for row, (place, token) in enumerate(zip(running, best.tolist(), strict=True)):
            if place < 0:
                continue
            line = found[place]
            line.add(token, logs[row], places[row] if places is not None else None, limits.eos)
            if line.rivals is not None:
                line.rivals.append(rivals[row])
            if language is not None:
                written[place] = language.after(written[place], token)
            if stop_loops and not line.ended and ((step + 1) % _CHECK_EVERY == 0 or step + 1 == steps):
                line.looped = find_loop(line.ids) is not None
            if line.ended or line.looped:
                running[row] = -1
        alive = [row for row, place in enumerate(running) if place >= 0]
        if not alive:
            break
        tokens = best[:, None].to("cpu")
        if len(running) - len(alive) >= _DROP_FROM * len(running):
            index = torch.tensor(alive)
            engine.keep(state, index)
            tokens = tokens[index]
            running = [running[row] for row in alive]
    return found


def _watched(engine: Any, state: Any, tokens: "torch.Tensor") -> "tuple[torch.Tensor, torch.Tensor]":
    """A step's scores, and where it looked: [lines, places], the mean of layers and heads."""
    import torch

    looked: list[torch.Tensor] = []
    scores = engine.step(state, tokens, looked)
    return scores, torch.stack([layer.float().mean(dim=(1, 2)) for layer in looked]).mean(0).cpu()


def _rivals(scores: "torch.Tensor", tokens: "torch.Tensor") -> list[tuple[float, int]]:
    """The likeliest other token of each line, and how much likelier than it the line's token is (natural logarithm)."""
    taken = tokens[:, None]
    values, others = scores.scatter(1, taken, float("-inf")).max(dim=-1)
    return list(zip((scores.gather(1, taken)[:, 0] - values).tolist(), others.tolist(), strict=True))


def _without(banned: "torch.Tensor | None", scores: "torch.Tensor") -> "torch.Tensor":
    """The scores, [..., vocabulary], with those tokens impossible."""
    return scores if banned is None else scores.index_fill(-1, banned.to(scores.device), float("-inf"))


def _likeliest(
    scores: "torch.Tensor", language: Language | None, written: list[Any], eos: tuple[int, ...]
) -> "torch.Tensor":
    """The token of each line that is the likeliest, with what language adds."""
    if language is None:
        return scores.argmax(dim=-1)
    fused = _with_language(language, [written], scores.log_softmax(dim=-1).to("cpu")[None], eos, _JUDGED)
    return fused[0].argmax(dim=-1).to(scores.device)


def _with_language(
    language: Language, written: list[list[Any]], log_probs: "torch.Tensor", eos: tuple[int, ...], most: int
) -> "torch.Tensor":
    """Log-probabilities, [lines, beams, vocabulary], of the likeliest tokens and the ends, with what language adds."""
    import torch

    rows, beams, vocabulary = log_probs.shape
    likely = log_probs.topk(min(most, vocabulary), dim=-1).indices
    asked = torch.cat((likely, torch.tensor(eos).expand(rows, beams, -1)), dim=-1)
    added = language.added([line for row in written for line in row], asked.view(rows * beams, -1).tolist())
    fused = torch.full_like(log_probs, float("-inf"))
    return fused.scatter_(-1, asked, log_probs.gather(-1, asked) + torch.tensor(added).view(asked.shape))


def beam_search(
    engine: Engine,
    hidden: Any,
    limits: Limits,
    beams: int,
    *,
    banned: "torch.Tensor | None" = None,
    language: Language | None = None,
) -> list[Found]:
    """Keep the `beams` likeliest beginnings of every line; the best by mean log-probability wins.

    Stopping and ranking follow transformers' default (length_penalty 1, early_stopping False); with a language it is
    the best sum, in which its bonus for length stands for the mean (length_penalty 0). `others`: what else finished.
    Source: transformers, generation/utils.py `_beam_search`; here finished lines leave the batch.
    """
    import torch

    steps = min(limits.max_new_tokens, engine.most_steps)
    state = engine.begin(hidden, beams, steps)
    count = len(hidden)
    most = max(2, 1 + len(limits.eos)) * beams
    places = torch.arange(count)  # rows of the state -> lines
    running, running_logs = torch.zeros(count, beams, 0, dtype=torch.long), torch.zeros(count, beams, 0)
    # All beams are the same at first: only one may put forward candidates.
    scores = torch.tensor([0.0] + [-1e9] * (beams - 1)).repeat(count, 1)
    finished: list[list[tuple[float, Found]]] = [[] for _ in range(count)]
    tokens = torch.full((count, beams), limits.start)
    written = [[language.begin() for _ in range(beams)] for _ in range(count)] if language else []
    for step in range(steps):
        length = 1 if language else step + 1
        log_probs = _without(banned, engine.step(state, tokens)).log_softmax(dim=-1).to("cpu")
        if step < limits.min_new_tokens:
            log_probs[..., list(limits.eos)] = float("-inf")
        judged = _with_language(language, written, log_probs, limits.eos, max(_JUDGED, most)) if language else log_probs
        sums, parent, token, own_log = _best_pairs(log_probs, judged + scores[:, :, None], most)
        stops, last = torch.isin(token, torch.tensor(limits.eos)), step + 1 == steps
        ends = stops | last
        history = torch.cat((_pick(running, parent), token[:, :, None]), dim=2)
        history_logs = torch.cat((_pick(running_logs, parent), own_log[:, :, None]), dim=2)
        ranked = [finished[line] for line in places.tolist()]
        _rank_ended(ranked, ends[:, :beams], stops, sums, length, history, history_logs)
        if last:
            break
        scores, chosen = (sums + ends * -1.0e9).topk(beams)
        running, running_logs = _pick(history, chosen), _pick(history_logs, chosen)
        came_from = parent.gather(1, chosen)
        alive = [row for row, of_line in enumerate(ranked) if not _is_settled(of_line, scores[row], length)]
        if not alive:
            break
        if len(alive) < len(ranked):
            # A settled line cannot change any more; going on with it would only cost time.
            index = torch.tensor(alive)
            engine.keep(state, index)
            rows = (places, running, running_logs, scores, came_from)
            places, running, running_logs, scores, came_from = (part[index] for part in rows)
            written = [written[row] for row in alive] if language else []
        engine.reorder(state, came_from)
        tokens = running[:, :, -1]
        written = _follow(language, written, came_from, tokens) if language else []
    return [replace(best, others=tuple(line for _mean, line in rest)) for (_best_mean, best), *rest in finished]


def _follow(
    language: Language, written: list[list[Any]], came_from: "torch.Tensor", tokens: "torch.Tensor"
) -> list[list[Any]]:
    """What is written in each beam of each line after these tokens, [lines, beams]."""
    return [
        [language.after(row[parent], token) for parent, token in zip(*moved, strict=True)]
        for row, *moved in zip(written, came_from.tolist(), tokens.tolist(), strict=True)
    ]


def _best_pairs(log_probs: "torch.Tensor", sums: "torch.Tensor", count: int) -> "tuple[torch.Tensor, ...]":
    """The best sums of each line, [lines, count], with the beam, the token and the reader's log-probability of each."""
    best, flat = sums.flatten(1).topk(count)
    return best, flat // sums.shape[-1], flat % sums.shape[-1], log_probs.flatten(1).gather(1, flat)


def _pick(values: "torch.Tensor", which: "torch.Tensor") -> "torch.Tensor":
    """Rows `which` [lines, m] of [lines, beams, length] -> [lines, m, length]."""
    return values.gather(1, which[:, :, None].expand(-1, -1, values.shape[2]))


def _rank_ended(
    ranked: list[list[tuple[float, Found]]],
    ends: "torch.Tensor",
    stops: "torch.Tensor",
    sums: "torch.Tensor",
    length: int,
    history: "torch.Tensor",
    logs: "torch.Tensor",
) -> None:
    """Among the first candidates, as many as there are beams, those that end are finished lines; the others go on."""
    for row, candidate in ends.nonzero().tolist():
        ids, log_probs = history[row, candidate].tolist(), logs[row, candidate].tolist()
        ranked[row].append((float(sums[row, candidate]) / length, Found(ids, log_probs, bool(stops[row, candidate]))))
        ranked[row].sort(key=lambda item: -item[0])  # stable: what was found first stays first among equals
        del ranked[row][ends.shape[1] :]


def _is_settled(ranked: list[tuple[float, Found]], scores: "torch.Tensor", length: int) -> bool:
    """Whether no running beam can beat a full list of finished ones, by transformers' default rule."""
    return len(ranked) == len(scores) and float(scores[0]) / length <= ranked[-1][0]


# ------------------------------------------------------------------------------------------------------ loops


def find_loop(ids: list[int]) -> tuple[int, int] | None:
    """Find a tail that is one piece over and over: (where the loop starts, the piece's length), else None.

    It takes 4 repetitions and 16 tokens, or 32 tokens for pieces of one or two kinds: "11 11 11", dotted lines and
    rows of dashes are legal text. A line that has ended by itself is never looked at.
    """
    for unit in range(1, _LONGEST_UNIT + 1):
        length = unit
        while length < len(ids) and ids[-1 - length] == ids[-1 - length + unit]:
            length += 1
        if length >= (32 if len(set(ids[-unit:])) <= 2 else max(16, 4 * unit)):
            return len(ids) - length, unit
    return None


def _would_loop(ids: list[int]) -> list[int]:
    """The tokens that would write some piece of up to _LONGEST_UNIT tokens, longer than one, a third time."""
    banned = []
    for unit in range(1, _LONGEST_UNIT + 1):
        needed = 3 * unit - 1 if unit > 1 else 4
        tail = ids[-needed:]
        if len(tail) == needed and all(a == b for a, b in zip(tail, tail[unit:], strict=False)):
            banned.append(tail[-unit])
    return banned


def unlooped(first: Found, second: Found) -> Found:
    """What to keep of a line that looped: the second reading when it came to an end, else the text before the loop.

    Args:
        first: as read at first; it looped.
        second: the same line read again with `ban_loops`.
    """
    if second.ended:
        return Found(second.ids, second.log_probs, True, looped=True)
    start, unit = find_loop(first.ids) or (len(first.ids), 0)
    keep = start + unit
    return Found(first.ids[:keep], first.log_probs[:keep], False, looped=True)
