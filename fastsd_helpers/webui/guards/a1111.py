"""The guard of AUTOMATIC1111 v1.10.1 (Gradio 3.41.2): see frame.py for how it is started."""

import os
import zipfile
from typing import Any

import api_login
import gradio3
import pictures
import sd_webui
from frame import Refused, before, run, setting
from places import may_be_shown

__all__: list[str] = []

_USED = (api_login, gradio3, pictures)

for _row in (
    ("modules.textual_inversion.textual_inversion", "create_embedding", None, "creating embeddings"),
    ("modules.textual_inversion.textual_inversion", "train_embedding", None, "training"),
    ("modules.hypernetworks.hypernetwork", "create_hypernetwork", None, "creating hypernetworks"),
    ("modules.hypernetworks.hypernetwork", "train_hypernetwork", None, "training"),
):
    sd_webui.closed_unless_admin(*_row)


@before("modules.ui", "process_interrogate", "interrogation_function mode ii_input_dir ii_output_dir *ii_singles")
def _(_function: Any, mode: int, *_rest: Any) -> None:
    if mode == 5 and not setting("admin"):
        raise Refused("folders of this machine are not named through a link")


# ControlNet, where it is installed: a text that is the path of a file would be opened.
@before("internal_controlnet.args", "ControlNetUnit.parse_image", "cls image", optional=True)
def _(cls: Any, image: Any) -> None:
    named = isinstance(image, str) and len(image) < 4096 and os.path.exists(image)
    if named and not setting("admin") and not may_be_shown(image):
        raise Refused("an image is sent as base64; no file is named")


@before("modules.safe", "load_with_extra", "filename extra_handler= *args **kwargs")
def _(filename: Any, *_more: Any, **_named: Any) -> None:
    if _is_mixed(filename):
        # Its check reads the zip at the end, torch the pickle at the beginning.
        raise Refused("this file begins as a pickle and ends as a zip; it is not read")


def _is_mixed(file: Any) -> bool:
    if hasattr(file, "read") and hasattr(file, "seek"):
        place = file.tell()
        try:
            file.seek(0)
            return file.read(4) != b"PK\x03\x04" and zipfile.is_zipfile(file)
        finally:
            file.seek(place)
    with open(file, "rb") as opened:
        return opened.read(4) != b"PK\x03\x04" and zipfile.is_zipfile(opened)


if __name__ == "__main__":
    run()
