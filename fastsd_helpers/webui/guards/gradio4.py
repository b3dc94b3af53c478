"""Gradio 4.40: addresses that it would fetch itself, files named by path, and the routes that serve files."""

from typing import Any

from frame import before, patch
from visitors import close_paths, look, no_fetch

__all__: list[str] = []


@patch("gradio.blocks", "Blocks.preprocess_data", "self block_fn inputs state explicit_call=")
def _(original: Any) -> Any:
    async def preprocess_data(self: Any, block_fn: Any, inputs: Any, state: Any, explicit_call: bool = False) -> Any:
        if not explicit_call:
            look(inputs)
        return await original(self, block_fn, inputs, state, explicit_call)

    return preprocess_data


before("gradio.processing_utils", "save_url_to_cache", "url cache_dir")(no_fetch)
before("gradio.processing_utils", "async_save_url_to_cache", "url cache_dir")(no_fetch)
before("gradio.processing_utils", "hash_url", "url")(no_fetch)


patch("gradio.routes", "App.create_app", "blocks app_kwargs= auth_dependency=")(close_paths)
