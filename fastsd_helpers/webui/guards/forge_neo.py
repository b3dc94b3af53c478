"""The guard of Forge Neo (Gradio 4.40): see frame.py for how it is started."""

import api_login
import gradio4
import pictures
import sd_webui
from frame import run

__all__: list[str] = []

_USED = (api_login, gradio4, pictures, sd_webui)

if __name__ == "__main__":
    run()
