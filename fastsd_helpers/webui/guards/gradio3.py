"""Gradio 3.41: files named by path, addresses fetched, and the routes that serve files."""

from typing import Any

from frame import Refused, patch
from places import uploaded
from visitors import ClosedPaths, look

__all__: list[str] = []


def _only_uploads(value: Any) -> None:
    if isinstance(value, dict) and value.get("is_file") and not uploaded(value.get("name")):
        raise Refused("only uploaded files can be named")
    for inner in value if isinstance(value, (list, tuple)) else ():
        _only_uploads(inner)


@patch("gradio.blocks", "Blocks.preprocess_data", "self fn_index inputs state")
def _(original: Any) -> Any:
    def preprocess_data(self: Any, fn_index: int, inputs: list[Any], state: Any) -> Any:
        look(inputs)
        return original(self, fn_index, inputs, state)

    return preprocess_data


def _guard_component(module: str, name: str) -> None:
    @patch(f"gradio.components.{module}", f"{name}.preprocess", "self x")
    def _(original: Any) -> Any:
        def preprocess(self: Any, x: Any) -> Any:
            _only_uploads(x)
            return original(self, x)

        return preprocess


for _module, _name in (
    ("file", "File"),
    ("upload_button", "UploadButton"),
    ("audio", "Audio"),
    ("video", "Video"),
    ("model3d", "Model3D"),
    ("timeseries", "Timeseries"),
):
    _guard_component(_module, _name)


@patch("gradio.components.base", "IOComponent.download_temp_copy_if_needed", "self url")
def _(original: Any) -> Any:
    def download_temp_copy_if_needed(self: Any, url: str) -> str:
        raise Refused("no address is fetched")

    return download_temp_copy_if_needed


@patch("gradio.components.base", "IOComponent.hash_url", "url chunk_num_blocks=")
def _(original: Any) -> Any:
    def hash_url(url: str, chunk_num_blocks: int = 128) -> str:
        raise Refused("no address is fetched")

    return hash_url


@patch("gradio.utils", "validate_url", "possible_url")
def _(original: Any) -> Any:
    # It asks the address itself, from this machine; a page needs no redirect to one.
    return lambda possible_url: False


@patch("gradio.routes", "App.create_app", "blocks app_kwargs=")
def _(original: Any) -> Any:
    def create_app(blocks: Any, app_kwargs: Any = None) -> Any:
        app = original(blocks, app_kwargs)
        app.add_middleware(ClosedPaths)
        return app

    return create_app
