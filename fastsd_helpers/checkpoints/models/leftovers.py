"""Harmless leftovers of training in a weights file: wrappers around names, training state, older spellings.

They say nothing about the model, so they are taken off or left out before anything looks at it, and every one is told.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from fastsd_helpers.checkpoints.formats.safetensors_file import TensorFact
from fastsd_helpers.checkpoints.formats.sources import Renamed, Source
from fastsd_helpers.errors import CheckpointError

__all__ = ["TidySource", "tidy", "tidy_facts"]

# What a whole model's names begin with; a wrapper is something in front of one of these.
_KNOWN = (
    r"(?:model\.diffusion_model|model_ema|first_stage_model|cond_stage_model|conditioner|text_encoders|text_model|"
    r"double_blocks|single_blocks|joint_blocks|input_blocks|down_blocks|mid_block|encoder\.(?:down|mid|layers|block)|"
    r"decoder\.(?:up|mid)|vae\.(?:encoder|decoder))\."
)
_WRAPPER = re.compile(rf"(?P<wrapper>(?:[A-Za-z_][A-Za-z0-9_]*\.){{1,3}}?)(?P<rest>{_KNOWN}.*)", re.DOTALL)
_WRAPPERS = tuple(
    ["model", "state_dict", "model_state_dict", "net", "network", "pipeline", "diffusion", "generator", "student"]
)
_MOST = 8  # different wrappers; more of them come from no training
_AVERAGED = ("ema", "ema_model", "ema_state_dict", "state_dict_ema", "model_state_dict_ema", "teacher", "target")
_STATE = re.compile(
    r"(optimizer(_states?)?|optim|opt|lr_schedulers?|scheduler|callbacks|loops|scaler|grad_scaler|amp|rng_state)(\.|$).*"
    r"|(global_step|step|steps|epoch|iteration|n_averaged|pytorch-lightning_version)",
    re.DOTALL,
)
# A VAE's attention under its names in Diffusers and in trainers of old.
_ATTENTION = re.compile(
    r"(?P<start>(?:.*\.)?mid\.attn_1\.)(?P<leaf>to_q|to_k|to_v|to_out\.0|query|key|value|proj_attn)\."
)
_LEAVES = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_LEAVES |= {"query": "q", "key": "k", "value": "v", "proj_attn": "proj_out"}
_T5 = "encoder.block.0.layer.0.SelfAttention.q.weight"
# What the parts have that are converted alone; the longer of two names first.
_MARKERS = (
    *("double_blocks.0.img_attn.qkv.weight", _T5, "text_model.embeddings.token_embedding.weight"),
    *("embeddings.token_embedding.weight", "token_embedding.weight"),
)
_CONVOLUTION = re.compile(r"(.*\.)?mid\.attn_1\.(q|k|v|proj_out)\.weight")


def tidy_facts(tensors: Mapping[str, TensorFact]) -> dict[str, TensorFact]:
    """The tensors under their names without leftovers; a file that has one twice keeps the first of them."""
    names, _notes = _tidied(tensors, strict=False)
    return {name: _fact(name, tensors[theirs]) for name, theirs in names.items()}


class TidySource(Renamed):
    """A source without leftovers; `notes` has a sentence for each kind that was there."""

    def __init__(self, source: Source, names: Mapping[str, str], notes: tuple[str, ...]) -> None:
        super().__init__({name: (source, theirs) for name, theirs in names.items()}, [source])
        self.tensors = {name: _fact(name, fact) for name, fact in self.tensors.items()}
        self.metadata, self.notes = source.metadata, notes


def tidy(source: Source) -> TidySource:
    """Take the leftovers off a source; closing the result closes the source.

    Raises:
        CheckpointError: without its wrapper a tensor would have the name of another one.
    """
    return TidySource(source, *_tidied(source.tensors, strict=True))


def _fact(name: str, fact: TensorFact) -> TensorFact:
    # The same numbers, saved as a matrix: every original has a convolution of one pixel there.
    if len(fact.shape) == 2 and _CONVOLUTION.fullmatch(name):
        return TensorFact(fact.dtype, (*fact.shape, 1, 1))
    return fact


def _tidied(given: Iterable[str], *, strict: bool) -> tuple[dict[str, str], tuple[str, ...]]:
    """(name as it is now -> as the file has it, a sentence for each kind of leftover)."""
    notes: list[str] = []
    names = {name: name for name in given}
    whole = any(re.match(rf"(?:.*\.)?{_KNOWN}", name) for name in names)
    state = {name for name in names if whole and _STATE.fullmatch(name)}
    if state:
        notes.append(f"{len(state)} training state tensors were left out, such as {min(state)!r}.")
    names = {name: name for name in names if name not in state}
    names = _renamed(names, _without_segments, "the wrapper of torch.compile or of several GPUs", notes, strict)
    names = _unwrapped(names, notes, strict)
    names = _alone(names, notes)
    names = _renamed(names, _respelled, "with other names for the VAE's attention", notes, strict)
    return names, tuple(notes)


def _renamed(names: Mapping[str, str], rename: Any, what: str, notes: list[str], strict: bool) -> dict[str, str]:
    found: dict[str, str] = {}
    changed = []
    for name, theirs in names.items():
        new = rename(name)
        if new != name:
            changed.append(theirs)
        if new in found and strict:
            raise _twice(found[new], theirs)
        found.setdefault(new, theirs)
    if changed:
        verb = "are" if what.startswith("in ") else "had"
        notes.append(f"{len(changed)} names {verb} {what}, such as {changed[0]!r}; the tensors are the same.")
    return found


def _without_segments(name: str) -> str:
    if "_orig_mod." not in name and "module." not in name:
        return name
    return ".".join(segment for segment in name.split(".") if segment not in ("_orig_mod", "module"))


def _respelled(name: str) -> str:
    match = _ATTENTION.match(name)
    if match is None:
        return name
    return f"{match['start']}{_LEAVES[match['leaf']]}.{name[match.end() :]}"


def _unwrapped(names: Mapping[str, str], notes: list[str], strict: bool) -> dict[str, str]:
    """Take one wrapper off, such as `model.` in front of all; a second, averaged copy under another one is left out."""
    bare = {name: theirs for name, theirs in names.items() if re.match(_KNOWN, name)}
    rest = {name: theirs for name, theirs in names.items() if name not in bare}
    counts = Counter(match["wrapper"] for name in rest if (match := _WRAPPER.match(name)))
    known = (*_WRAPPERS, *_AVERAGED)
    wrappers = sorted(
        (wrapper for wrapper, _count in counts.most_common(_MOST) if wrapper.split(".")[0] in known), key=len
    )
    plain = dict(bare)
    wrapped: dict[str, dict[str, str]] = {wrapper: {} for wrapper in wrappers}
    for name, theirs in rest.items():
        wrapper = next((wrapper for wrapper in reversed(wrappers) if name.startswith(wrapper)), "")
        (wrapped[wrapper] if wrapper else plain)[name.removeprefix(wrapper)] = theirs
    for wrapper in sorted(wrapped, key=lambda wrapper: (wrapper.split(".")[0] in _AVERAGED, wrapper)):
        inside = wrapped[wrapper]
        averaged = wrapper.split(".")[0] in _AVERAGED
        if averaged and inside.keys() & plain.keys():
            notes.append(f"{len(inside)} weights of a second copy (EMA) ({wrapper}...) were left out.")
            continue
        for name, theirs in inside.items():
            if name in plain and strict:
                raise _twice(plain[name], theirs)
            plain.setdefault(name, theirs)
        notes.append(f"{len(inside)} names had the prefix {wrapper!r}, which was removed.")
    return plain


def _alone(names: Mapping[str, str], notes: list[str]) -> dict[str, str]:
    """Take off what a part alone, cut out of a whole model, has in front of every name."""
    marker = next((marker for marker in _MARKERS if any(name.endswith(marker) for name in names)), "")
    found = next((name for name in names if marker and name.endswith(marker)), "")
    prefix = found.removesuffix(marker)
    if prefix and prefix != "model.diffusion_model." and all(name.startswith(prefix) for name in names):
        notes.append(f"{len(names)} names had the prefix {prefix!r}, which was removed.")
        names = {name.removeprefix(prefix): theirs for name, theirs in names.items()}
    return {_shared(name, names): theirs for name, theirs in names.items()}


def _shared(name: str, names: Mapping[str, str]) -> str:
    """T5's table of words has two names, and some writers keep the second alone."""
    start = name.removesuffix("encoder.embed_tokens.weight")
    alone = start != name and f"{start}{_T5}" in names and f"{start}shared.weight" not in names
    return f"{start}shared.weight" if alone else name


def _twice(one: str, other: str) -> CheckpointError:
    return CheckpointError(
        f"The file uses two naming schemes for its tensors: {one!r} and {other!r} would be the same.",
        "Give the model itself, not a wrapper or a merge that contains it twice.",
    )
