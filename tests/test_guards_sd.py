"""What AUTOMATIC1111's guard closes, tried on a small web UI of the same functions."""

import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from fastsd_helpers.webui import plan

GUARDS = Path(plan.__code__.co_filename).parents[1] / "guards"

# The functions that the guard wants, with their parameters in v1.10.1; each says that it was reached.
MODULES = {
    "options": """
class OptionInfo:
    def __init__(self, default=None, component_args=None, section=("x", "X")):
        self.default, self.component_args, self.section = default, component_args, section
class Options:
    def __init__(self, data_labels):
        self.data_labels = data_labels
        self.data = {k: v.default for k, v in data_labels.items()}
    def __setattr__(self, key, value):
        if key in ("data_labels", "data"):
            return super().__setattr__(key, value)
        self.data[key] = value
    def set(self, key, value):
        try:
            setattr(self, key, value)
        except RuntimeError:
            return False
        return True
""",
    "shared": """
from modules.options import OptionInfo, Options
opts = Options({
    "outdir_samples": OptionInfo(""), "samples_format": OptionInfo("png"), "temp_dir": OptionInfo(""),
    "CLIP_stop_at_last_layers": OptionInfo(1), "live_previews_enable": OptionInfo(True),
    "show_progress_type": OptionInfo("A", {"choices": ["A", "B"]}),
    "hide_samplers": OptionInfo([], lambda: {"choices": ["Euler", ("DDIM", "ddim")]}),
    "sd_model_checkpoint": OptionInfo(None), "api_enable_requests": OptionInfo(True),
    "disabled_extensions": OptionInfo([], None, (None, "Hidden")),
    "gradio_theme": OptionInfo("D", {"choices": ["D", "E"]}),
})
""",
    "shared_cmd_options": "import argparse\ncmd_opts = argparse.Namespace(port=1)\n",
    "ui_extensions": """
def check_access():
    return "reached"
def install(url):
    check_access()
    return "reached"
def save_config_state(name):
    return "reached"
def refresh_available_extensions(url, *more):
    return "reached"
""",
    "ui_loadsave": "class UiLoadsave:\n    def ui_apply(self, *values):\n        return 'reached'\n",
    "restart": "def restart_program():\n    return 'reached'\ndef stop_program():\n    return 'reached'\n",
    "shared_state": "class State:\n    def request_restart(self):\n        return 'reached'\n",
    "config_states": "def restore_webui_config(config): ...\ndef restore_extension_config(config): ...\n",
    "extensions": "class Extension:\n    def fetch_and_reset_hard(self): ...\n    def check_updates(self): ...\n",
    "extras": "def run_modelmerger(id_task, custom_name, more=1):\n    return custom_name\n",
    "img2img": """
def process_batch(p, input, output_dir, inpaint_mask_dir, args, to_scale=False, scale_by=1.0, use_png_info=False,
                  png_info_props=None, png_info_dir=None):
    return "reached"
def img2img(id_task, img2img_batch_input_dir, img2img_batch_output_dir, img2img_batch_inpaint_mask_dir,
            img2img_batch_png_info_dir, *args):
    return "reached"
""",
    "postprocessing": """
def run_postprocessing(extras_mode, image, image_folder, input_dir, output_dir, show, *args, save_output=True):
    return "reached"
""",
    "util": """
import os
def listfiles(dirname):
    return sorted(os.listdir(dirname))
def walk_files(path, allowed_extensions=None):
    return "reached"
""",
    "images": """
def save_image(image, path, basename, seed=None, prompt=None, extension="png", forced_filename=None, suffix=""):
    return "reached"
def save_image_with_geninfo(image, geninfo, filename, extension=None):
    return "reached"
""",
    "ui_extra_networks": "def fetch_file(filename=''):\n    return 'reached'\n",
    "script_callbacks": "def app_started_callback(demo, app):\n    return None\n",
    "api/api": """
def decode_base64_to_image(encoding):
    return "reached"
def verify_url(url):
    return True
""",
}
ENTRY = """
import json, os, importlib
from modules import (config_states, extensions, extras, images, img2img, options, postprocessing, restart,
                     script_callbacks, shared, shared_state, ui_extensions, ui_extra_networks, ui_loadsave, util)
from modules.api import api
def tried(act):
    try:
        return act()
    except Exception as err:
        return f"{type(err).__name__}: {getattr(err, 'detail', None) or err}"
shared.opts.set("temp_dir", "set at the start")
script_callbacks.app_started_callback(None, None)
answers = {}
for line in open(os.environ["LINES"]):
    answers[line.strip()] = tried(lambda: eval(line))
print(json.dumps(answers))
"""


@pytest.fixture
def webui(tmp_path: Path) -> Any:
    """Starts the small web UI and gives what each expression comes to, by the guard's leave."""
    pytest.importorskip("fastapi")
    code = tmp_path / "code"
    for name, text in MODULES.items():
        path = code / "modules" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "guard.py").write_text(
        f"import sys\nsys.path.insert(0, {str(GUARDS)!r})\nimport sd_webui\nfrom frame import run\nrun()\n"
    )
    (code / "launch.py").write_text(ENTRY)
    for folder in ("data/models/Lora", "data/outputs", "store", "outside"):
        (tmp_path / folder).mkdir(parents=True)

    def start(lines: list[str], *, admin: bool = False) -> dict[str, Any]:
        (tmp_path / "lines").write_text("\n".join(lines))
        given = {"LINES": str(tmp_path / "lines"), "R": str(tmp_path)}
        settings = {"admin": admin, "data": str(tmp_path / "data"), "store": str(tmp_path / "store")}
        done = subprocess.run(
            [sys.executable, "-u", str(tmp_path / "guard.py"), "launch.py"],
            cwd=code,
            env={**os.environ, "FASTSD_GUARD": json.dumps(settings), **given},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    start.root = tmp_path
    start.code = code
    return start


SETTINGS_TAKEN = [
    "('CLIP_stop_at_last_layers', 2)", "('live_previews_enable', False)", "('show_progress_type', 'B')",
    "('hide_samplers', ['Euler', 'ddim'])", "('sd_model_checkpoint', 'a.safetensors')", "('samples_format', 'webp')",
    "('outdir_samples', '')",
]  # fmt: skip
SETTINGS_REFUSED = [
    "('outdir_samples', '/tmp')", "('temp_dir', '/')", "('samples_format', '../x.png')", "('show_progress_type', 'C')",
    "('hide_samplers', ['/etc'])", "('api_enable_requests', False)", "('disabled_extensions', ['x'])",
    "('gradio_theme', 'E')", "('CLIP_stop_at_last_layers', '../x')", "('sd_model_checkpoint', ['x'])",
]  # fmt: skip


def test_a_visitor_changes_settings_of_taste_alone(webui: Any) -> None:
    taken = webui([f"shared.opts.set{row}" for row in SETTINGS_TAKEN])
    assert set(taken.values()) == {True}, taken
    refused = webui([f"shared.opts.set{row}" for row in SETTINGS_REFUSED])
    assert set(refused.values()) == {False}, refused
    assert webui(["shared.opts.data['temp_dir']"]) == {"shared.opts.data['temp_dir']": "set at the start"}
    assert set(webui([f"shared.opts.set{row}" for row in SETTINGS_REFUSED], admin=True).values()) == {True}


ADMINISTRATION = [
    "ui_extensions.check_access()", "ui_extensions.install('https://x/y')", "ui_extensions.save_config_state('x')",
    "ui_extensions.refresh_available_extensions('https://x/index.json')", "ui_loadsave.UiLoadsave().ui_apply(1, 2)",
    "restart.restart_program()", "restart.stop_program()", "shared_state.State().request_restart()",
    "extras.run_modelmerger('id', 'reached')",
    "img2img.img2img('id', '/etc', '', '', '')", "img2img.img2img('id', '', '', '', '/etc')",
    "img2img.process_batch(1, '/etc', '', '', [])", "img2img.process_batch(1, [], '/tmp/x', '', [])",
    "postprocessing.run_postprocessing(2, None, None, '/etc', '', True)", "util.walk_files('/etc')",
    "images.save_image(1, os.environ['R'] + '/outside', 'x')", "images.save_image(1, 'outputs/../..', 'x')",
    "images.save_image(1, os.environ['R'] + '/data/outputs', '../../x')",
    "images.save_image(1, os.environ['R'] + '/data/outputs', 'x', extension='py')",
    "images.save_image(1, os.environ['R'] + '/data/outputs', 'x', forced_filename='/tmp/x')",
    "images.save_image_with_geninfo(1, '', os.environ['R'] + '/data/models/Lora/x.safetensors')",
]  # fmt: skip
HONEST = [
    "img2img.img2img('id', '', '', '', '')", "img2img.process_batch(1, [], '', '', [])",
    "postprocessing.run_postprocessing(0, 'image', None, '', '', True)",
    "images.save_image(1, os.environ['R'] + '/data/outputs/txt2img', 'x')",
    "images.save_image_with_geninfo(1, '', os.environ['R'] + '/data/models/Lora/x.preview.png')",
    "util.walk_files(os.environ['R'] + '/data/models')", "api.decode_base64_to_image('data:image/png;base64,AAAA')",
    "api.decode_base64_to_image('iVBORw0KGgo=')",
    "ui_extra_networks.fetch_file(os.environ['R'] + '/data/models/a.png')",
]  # fmt: skip


def test_administration_and_folders_of_the_machine_are_closed_and_the_owner_opens_them(webui: Any) -> None:
    closed = webui(ADMINISTRATION)
    assert {answer.split(":")[0] for answer in closed.values()} == {"Refused"}, closed
    assert set(webui(ADMINISTRATION, admin=True).values()) == {"reached"}
    assert set(webui(HONEST).values()) == {"reached"}


def test_some_things_stay_closed_for_the_owner_too(webui: Any) -> None:
    lines = [
        "api.decode_base64_to_image('http://127.0.0.1/x')", "api.decode_base64_to_image('HTTPS://x/y')",
        "api.decode_base64_to_image('file:///etc/passwd')", "api.decode_base64_to_image('/etc/pass.wd')",
        "ui_extra_networks.fetch_file(os.environ['R'] + '/data/models/../../outside/x.png')",
        "ui_extra_networks.fetch_file('/etc/x.png')",
    ]  # fmt: skip
    for admin in (False, True):
        answers = webui([*lines, "api.verify_url('https://x')"], admin=admin)
        assert answers.pop("api.verify_url('https://x')") is False
        assert all(answer.startswith("HTTPException: ") for answer in answers.values()), answers
    name = "extras.run_modelmerger('id', '../../x/y')"
    assert webui([name], admin=True) == {name: "y"}
    index = "ui_extensions.refresh_available_extensions('file:///etc/passwd')"
    assert "https only" in webui([index], admin=True)[index]


def test_a_function_that_a_new_version_moved_keeps_it_from_starting(webui: Any) -> None:
    path = webui.code / "modules" / "extras.py"
    for text, said in (
        ("def merge(): ...\n", "run_modelmerger of modules.extras is not there"),
        ("def run_modelmerger(id_task, name): ...\n", "has no custom_name"),
    ):
        path.write_text(text)
        with pytest.raises(AssertionError, match=said):
            webui(["1"])


def test_a_pickle_with_a_zip_behind_it_is_told(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "good.pt", "w") as file:
        file.writestr("x/data.pkl", b"")
    (tmp_path / "old.pt").write_bytes(pickle.dumps({}))
    (tmp_path / "mixed.pt").write_bytes(pickle.dumps({}) + (tmp_path / "good.pt").read_bytes())
    code = (
        f"import sys; sys.path.insert(0, {str(GUARDS)!r})\nimport a1111, io\n"
        f"print([a1111._is_mixed(w(p)) for p in {[str(tmp_path / n) for n in ('good.pt', 'old.pt', 'mixed.pt')]!r}"
        " for w in (str, lambda p: open(p, 'rb'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.stdout.strip() == "[False, False, False, False, True, True]", done.stderr
