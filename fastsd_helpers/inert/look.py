"""Walks through the files of a model and looks at each by its bytes; a file's name is believed in nothing."""

import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path

from fastsd_helpers.errors import ModelError, UnsafeModel
from fastsd_helpers.files import file_errors
from fastsd_helpers.inert import configs, descriptions, graphs, pickles, tensors

__all__ = ["require_inert"]

# What Python or the system would run if a library, or someone, took it for a part of the model.
_CODE = frozenset(
    [
        ".py", ".pyc", ".pyo", ".pyd", ".pyw", ".pyx", ".pyi", ".pyz", ".so", ".dll", ".dylib", ".exe", ".bat", ".cmd",
        ".ps1"
    ]
)  # fmt: skip
_TENSORS = frozenset((".safetensors", ".sft"))
_PICKLES = frozenset([".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".dill", ".tar"])
# Left behind by trainers; no loader of weights asks for a file of these names.
_LEFT_BY_TRAINING = re.compile(
    r"training_args\.bin|optimizer(_\d+)?\.(pt|bin)|scheduler(_\d+)?\.(pt|bin)|scaler\.pt|rng_state(_\d+)?\.pth"
    r"|random_states_\d+\.pkl"
)
# The weights of an OpenVINO graph are bare numbers; under a name that torch asks for they would be a pickle.
_NAMES_OF_TORCH = re.compile(
    r"(diffusion_pytorch_model|pytorch_model|model|adapter_model|pytorch_lora_weights|learned_embeds)\b.*"
)
_COPY_AGAIN = "Copy or download the complete model again."


def require_inert(paths: Path | str | Iterable[Path | str], *, name: str | None = None) -> None:
    """Look at the files and folders of a model; return only when nothing in them can run or lead elsewhere.

    Each is a plain file, or a link that ends at one: a link that leads nowhere or round in a circle would fail in the
    middle of the work; a pipe or a device would be waited for without end.

    Args:
        paths: one or several; folders are looked at to their last file.
        name: what a single file will be called, where it has another name until it is whole.

    Raises:
        UnsafeModel: something in it could run code or lead elsewhere; the sentence names the file and what was found.
        ModelError: a description cannot be read.
    """
    seen: set[Path] = set()
    for path in [paths] if isinstance(paths, (str, Path)) else paths:
        _look(Path(path), (), seen, name)


def _look(path: Path, above: tuple[Path, ...], seen: set[Path], name: str | None = None) -> None:
    """Look at one path; `above` are the real folders that lead to it, `seen` those that were looked at."""
    if not path.is_dir():
        _require_plain(path)
        with file_errors(path, "read"):
            _look_at_file(path, name or path.name, alone=not above)
        return
    real = path.resolve()
    if real in above:
        raise UnsafeModel(f"{path} is a link to a folder that holds it.", "Remove it: it is a circular link.")
    if real in seen:  # each once, by however many links it is reached
        return
    seen.add(real)
    with file_errors(path, "read"):
        inside = sorted(path.iterdir())
    _look_at_neighbours(path, {inner.name for inner in inside})
    for inner in inside:
        _look(inner, (*above, real), seen)


def _require_plain(path: Path) -> None:
    try:
        kind = os.stat(path).st_mode
    except OSError as err:
        what = "is a link that leads nowhere" if path.is_symlink() else "cannot be read"
        raise ModelError(f"{path} {what} ({os.strerror(err.errno or 0)}).", _COPY_AGAIN) from err
    if not stat.S_ISREG(kind):
        raise UnsafeModel(f"{path} is not a file but a pipe, socket or device.", "Use a model from a source you trust.")


def _look_at_neighbours(folder: Path, names: set[str]) -> None:
    """Refuse the description of an adapter where a whole model is loaded: transformers would load its base instead."""
    if "adapter_config.json" not in names:
        return
    if "config.json" in names or (folder.parent / "model_index.json").is_file():
        raise UnsafeModel(
            f"{folder / 'adapter_config.json'} is in the folder of a complete model: transformers would load another "
            "model instead, which that file names and which was not checked.",
            "Remove it if the model is complete without it; else merge the adapter into its base model and save that.",
        )


def _look_at_file(path: Path, name: str, *, alone: bool) -> None:
    ending = Path(name).suffix.lower()
    if ending in _CODE:
        raise UnsafeModel(
            f"{path} is program code, which a library could run when it opens the model.",
            "A model is data alone: move it out of the model's folder, or use a model from a source you trust.",
        )
    if ending == ".json":
        configs.look_at_config(path, name, lenient=True)
        return
    if ending in (".yaml", ".yml"):
        if alone:
            descriptions.look_at_description(path)
        return
    with path.open("rb") as file:
        head = file.read(16)
    of_a_graph = name.endswith(".bin") and path.with_suffix(".xml").is_file() and not _NAMES_OF_TORCH.fullmatch(name)
    left = _LEFT_BY_TRAINING.fullmatch(name) or of_a_graph
    if not head or (left and not alone):
        return
    packed = pickles.is_pickle(head) or pickles.is_archive(head)
    if ending == ".xml":
        graphs.look_at_graph(path)
    elif ending == ".onnx":
        if alone:  # in a folder, nothing of ours opens it
            graphs.look_at_onnx(path)
    elif ending in _PICKLES and alone and tensors.is_safetensors(head) and not packed:
        # Readers of ours go by the first bytes; others go by the name, and would run it as a pickle.
        tensors.look_at_header(path)
        pickles.look_at_unknown(path, safetensors=True)
    elif ending in _PICKLES:
        (pickles.look_at_pickle if packed else pickles.look_at_unknown)(path)
    elif tensors.is_safetensors(head) or (ending in _TENSORS and not packed):
        tensors.look_at_header(path)  # its length may look like another kind's mark
    elif packed and ending in (*_TENSORS, ".gguf"):
        if pickles.is_archive(head) and not pickles.has_pickle(path):
            raise UnsafeModel(
                f"{path} is called {ending} and is a zip archive, not a model.", "Unpack it, or choose another."
            )
        raise UnsafeModel(
            f"{path} is called {ending} and is a pickle, which can run code when it is opened.",
            "Nothing in it was run. Use a model from a source you trust.",
        )
    elif pickles.is_pickle(head) or (packed and alone):  # a zip file beside a model is opened by nobody
        pickles.look_at_pickle(path)
