"""Gradio 3.41: files named by path, addresses fetched, and the routes that serve files."""

from typing import Any

from frame import Refused, before, patch
from places import uploaded
from visitors import close_paths, look, no_fetch

__all__: list[str] = []


def _of_component(self: Any, x: Any) -> None:
    _only_uploads(x)


def _only_uploads(value: Any) -> None:
    if isinstance(value, dict) and value.get("is_file") and not uploaded(value.get("name")):
        raise Refused("only uploaded files can be named")
    for inner in value if isinstance(value, (list, tuple)) else ():
        _only_uploads(inner)


@before("gradio.blocks", "Blocks.preprocess_data", "self fn_index inputs state")
def _(self: Any, fn_index: int, inputs: list[Any], state: Any) -> None:
    look(inputs)


for _module, _name in (
    ("file", "File"),
    ("upload_button", "UploadButton"),
    ("audio", "Audio"),
    ("video", "Video"),
    ("model3d", "Model3D"),
    ("timeseries", "Timeseries"),
):
    before(f"gradio.components.{_module}", f"{_name}.preprocess", "self x")(_of_component)


before("gradio.components.base", "IOComponent.download_temp_copy_if_needed", "self url")(no_fetch)
before("gradio.components.base", "IOComponent.hash_url", "url chunk_num_blocks=")(no_fetch)


@patch("gradio.utils", "validate_url", "possible_url")
def _(original: Any) -> Any:
    # It asks the address itself, from this machine; a page needs no redirect to one.
    return lambda possible_url: False


patch("gradio.routes", "App.create_app", "blocks app_kwargs=")(close_paths)
