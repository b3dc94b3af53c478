"""ComfyUI's guard over small modules of its names that check nothing: what a prompt and a request may name."""

import json
import os
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tunnel_doubles import free_port

from fastsd_helpers.webui import LaunchConfig, find_ui, plan

GUARD = Path(plan.__code__.co_filename).parents[1] / "guards" / "comfyui.py"

# The functions the guard replaces, as open as they were in ComfyUI before it had checks of its own.
FOLDER_PATHS = """
import os
base = os.environ["DATA"]
folder_names_and_paths = {"checkpoints": ([os.path.join(base, "models")], {".safetensors"})}
def get_input_directory(): return os.path.join(base, "input")
def get_output_directory(): return os.path.join(base, "output")
def get_temp_directory(): return os.path.join(base, "temp")
def get_user_directory(): return os.path.join(base, "user")
def get_directory_by_type(kind): return os.path.join(base, kind) if kind in ("input", "output", "temp") else None
def annotated_filepath(name):
    for kind in ("input", "output", "temp"):
        if name.endswith(f" [{kind}]"):
            return name.removesuffix(f" [{kind}]"), get_directory_by_type(kind)
    return name, None
def get_annotated_filepath(name, default_dir=None):
    name, folder = annotated_filepath(name)
    return os.path.join(folder or default_dir or get_input_directory(), name)
def exists_annotated_filepath(name):
    return os.path.exists(os.path.join(get_input_directory(), name))
def get_full_path(folder_name, filename):
    path = os.path.join(folder_names_and_paths[folder_name][0][0], filename)
    return path if os.path.isfile(path) else None
def get_folder_paths(folder_name): return folder_names_and_paths[folder_name][0]
def get_filename_list(folder_name): return sorted(os.listdir(get_folder_paths(folder_name)[0]))
def get_save_image_path(filename_prefix, output_dir, image_width=0, image_height=0):
    folder = os.path.join(output_dir, os.path.dirname(filename_prefix))
    return folder, os.path.basename(filename_prefix), 1, os.path.dirname(filename_prefix), filename_prefix
"""
NODES = """
class Plain: CATEGORY = "image"
class Asks: CATEGORY = "image"; API_NODE = True
class Partner: CATEGORY = "api node/image"
class Trains: CATEGORY = "model/training"
NODE_CLASS_MAPPINGS = {"Plain": Plain, "Asks": Asks, "Partner": Partner, "Trains": Trains, "CheckpointSave": Plain}
"""
EXECUTION = """
import folder_paths
async def validate_prompt(prompt_id, prompt, partial_execution_list):
    value = prompt["1"].get("inputs", {}).get("ckpt_name")
    if value is None or value in folder_paths.get_filename_list("checkpoints"):
        return (True, None, list(prompt), {})
    error = {"type": "value_not_in_list", "message": "Value not in list", "details": f"{value!r} not in [...]"}
    return (False, {"type": "x"}, [], {"1": {"errors": [error | {"extra_info": {"received_value": value}}]}})
class PromptExecutor:
    def handle_execution_error(self, prompt_id, prompt, current_outputs, executed, error, ex):
        return error["exception_message"]
    def execute(self, prompt, prompt_id, extra_data={}, execute_outputs=[]):
        return prompt()
"""
USERS = """
import os, folder_paths
class UserManager:
    def get_request_user_filepath(self, request, file, type="userdata", create_dir=True):
        return os.path.join(folder_paths.get_user_directory(), "default", file or "")
"""
SERVER = """
from aiohttp import web
from app.user_manager import UserManager
async def answer(request):
    if request.path == "/settings":
        raise OSError(107, "Transport endpoint is not connected")
    return web.json_response({"passed": request.path})
class PromptServer:
    def __init__(self):
        self.app = web.Application()
    def add_routes(self):
        self.app.router.add_route("*", "/{tail:.*}", answer)
"""
MAIN = """
import asyncio, json, os, sys
import folder_paths, nodes, execution, server, comfy.utils, safetensors.torch, torch, av, PIL.Image
kind = sys.argv[1]
if kind == "serve":
    from aiohttp import web
    made = server.PromptServer()
    made.add_routes()
    web.run_app(made.app, host="127.0.0.1", port=int(sys.argv[2]), print=lambda text: print("ready", flush=True))
    sys.exit()
def tried(work):
    try:
        return work()
    except Exception as err:
        return f"{type(err).__name__}: {err}"
def in_prompt(work):
    return execution.PromptExecutor().execute(lambda: tried(work), "id")
def read(path):
    with open(path) as file:
        return file.read()
def write(path):
    with open(path, "w") as file:
        file.write("written")
    return "written"
users = server.UserManager()
acts = {
    "annotated": folder_paths.get_annotated_filepath,
    "exists": folder_paths.exists_annotated_filepath,
    "model": lambda name: folder_paths.get_full_path("checkpoints", name),
    "save to": lambda name: folder_paths.get_save_image_path(name, folder_paths.get_output_directory())[0],
    "user": lambda name: users.get_request_user_filepath(None, name),
    "node": lambda name: asyncio.run(execution.validate_prompt("id", {"1": {"class_type": name}}, None))[0],
    "models": folder_paths.get_filename_list,
    "choose": lambda name: asyncio.run(
        execution.validate_prompt("id", {"1": {"class_type": "Plain", "inputs": {"ckpt_name": name}}}, None)
    )[3],
    "fail": lambda name: execution.PromptExecutor().handle_execution_error(
        "id", {}, {}, [], {"exception_message": name}, OSError(107, name)
    ),
    "read": read, "write": write, "list": os.listdir, "remove": os.remove,
    "move": lambda name: os.rename(os.path.join(folder_paths.get_input_directory(), "a.png"), name),
    "save model": lambda name: comfy.utils.save_torch_file({}, name),
    "safetensors": lambda name: safetensors.torch.save_file({}, name),
    "torch": lambda name: torch.save({}, name),
    "film": lambda name: av.open(name)["container_options"]["format_whitelist"].split(","),
    "make film": lambda name: "container_options" in av.open(name, "w"),
    "image": lambda name: PIL.Image.open(name).format,
}
said = []
for act, name, prompt in json.loads(sys.argv[2]):
    said.append(in_prompt(lambda: acts[act](name)) if prompt else tried(lambda: acts[act](name)))
import socket
with socket.socket() as held:
    held.bind(("127.0.0.1", int(sys.argv[3])))
print(json.dumps(said))
"""
SAVES = "def {}:\n    return 'saved'\n"
FILES = {
    "folder_paths.py": FOLDER_PATHS,
    "nodes.py": NODES,
    "execution.py": EXECUTION,
    "app/__init__.py": "",
    "app/user_manager.py": USERS,
    "server.py": SERVER,
    "comfy/__init__.py": "",
    "comfy/utils.py": SAVES.format("save_torch_file(sd, ckpt, metadata=None)"),
    "safetensors/__init__.py": "",
    "safetensors/torch.py": SAVES.format("save_file(tensors, filename, metadata=None)"),
    "torch.py": SAVES.format("save(obj, f, *more)"),
    "av.py": "def open(file, mode=None, format=None, options=None, **named):\n    return named\n",
    "main.py": MAIN,
}


class Comfy:
    """A small ComfyUI on disk; `ask` starts it guarded and gives what each act came to."""

    def __init__(self, root: Path) -> None:
        self.code, self.data, self.store = root / "code", root / "data", root / "store"
        self.store.mkdir()
        for name, text in FILES.items():
            (self.code / name).parent.mkdir(parents=True, exist_ok=True)
            (self.code / name).write_text(text)
        for folder in ("input/sub", "output", "temp", "user/default", "models"):
            (self.data / folder).mkdir(parents=True)
        picture = b"GIF89a\x01\x00\x01\x00\x00\x00\x00,\x00\x00\x00\x00\x01\x00\x01\x00\x00\x02\x02D\x01\x00;"
        for place in ("input/a.png", "input/sub/b.png", "output/c.png", "models/m.safetensors"):
            (self.data / place).write_bytes(picture)
        (self.data / "secret.txt").write_text("secret")
        (self.data / "film.mp4").write_text("film")
        (self.data / "input" / "link.png").symlink_to(self.data / "secret.txt")
        (self.data / "input" / "up").symlink_to(self.data)
        (self.data / "output" / "up").symlink_to(self.data)
        (root / "shelf.safetensors").write_text("weights of the owner")
        (self.data / "models" / "linked.safetensors").symlink_to(root / "shelf.safetensors")

    def start(self, *words: str, admin: bool = False) -> subprocess.Popen[str]:
        environment = {
            **os.environ,
            "DATA": str(self.data),
            "FASTSD_GUARD": json.dumps({"admin": admin, "store": str(self.store)}),
        }
        environment |= {"PYTHONDONTWRITEBYTECODE": "1", "TMPDIR": str(self.data / "temp")}
        # Not below the folder of temporary files, where a prompt may work.
        command = [sys.executable, "-u", str(GUARD), "main.py", *words]
        return subprocess.Popen(
            command, cwd=self.code, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def ask(self, *acts: tuple[str, str, bool], admin: bool = False) -> list[Any]:
        process = self.start("ask", json.dumps(acts), str(free_port()), admin=admin)
        said, problem = process.communicate(timeout=60)
        assert process.returncode == 0, problem
        return json.loads(said.splitlines()[-1])


@pytest.fixture
def comfy(tmp_path: Path) -> Comfy:
    return Comfy(tmp_path)


def test_names_in_a_prompt_stay_in_the_folders_for_them(comfy: Comfy) -> None:
    fine = ["a.png", "sub/b.png", "c.png [output]", "./a.png"]
    outside = ["../secret.txt", str(comfy.data / "secret.txt"), "/etc/passwd", "link.png", "up/secret.txt", "sub/../.."]
    outside += ["../secret.txt [output]", "up/secret.txt [output]", "../output/../secret.txt [temp]", "a\0.png"]
    said = comfy.ask(*[("annotated", name, False) for name in [*fine, *outside]])
    assert [Path(path).resolve().name for path in said[: len(fine)]] == ["a.png", "b.png", "c.png", "a.png"]
    for name, got in zip(outside, said[len(fine) :], strict=True):
        assert got.startswith(("Refused: fastsd guard:", "ValueError:")), (name, got)
    said = comfy.ask(*[("exists", name, False) for name in ["a.png", *outside]])
    assert said == [True] + [False] * len(outside)


def test_models_are_found_by_their_names_and_links_of_their_owner_stay(comfy: Comfy) -> None:
    names = [
        "m.safetensors",
        "linked.safetensors",
        "../secret.txt",
        str(comfy.data / "secret.txt"),
        "sub/../../secret.txt",
    ]
    said = comfy.ask(*[("model", name, False) for name in [*names, "..\\secret.txt", "%2e%2e/secret.txt"]])
    assert [got is not None for got in said] == [True, True, False, False, False, False, False]
    # Its content is read too, though it lies elsewhere; what lies beside it is not.
    linked, beside = comfy.data / "models" / "linked.safetensors", comfy.data / "models" / ".." / "secret.txt"
    said = comfy.ask(("read", str(linked), True), ("read", str(beside), True))
    assert said[0] == "weights of the owner"
    assert said[1].startswith("Refused")


def test_results_are_written_into_the_folder_for_them(comfy: Comfy) -> None:
    fine = ["x", "new/x", "%year%-%month%/x", "a..b"]
    outside = ["../x", "/tmp/x", "up/x", "new/../../x", str(comfy.data / "x")]
    said = comfy.ask(*[("save to", name, False) for name in [*fine, *outside]])
    assert all(not got.startswith("Refused") for got in said[: len(fine)])
    assert all(got.startswith("Refused") for got in said[len(fine) :]), said


def test_a_users_files_stay_below_the_folder_of_users(comfy: Comfy) -> None:
    (comfy.data / "user" / "default" / "up").symlink_to(comfy.data)
    names = [
        "workflows/a.json",
        "../../secret.txt",
        "%2e%2e/%2e%2e/secret.txt",
        "%252e%252e/x",
        "/etc/passwd",
        "up/secret.txt",
    ]
    said = comfy.ask(*[("user", name, False) for name in names])
    assert [got is not None and not got.startswith("Refused") for got in said] == [True] + [False] * 5


def test_no_model_is_written_trained_or_asked_of_another_service(comfy: Comfy) -> None:
    nodes = ["Plain", "Unknown", "Asks", "Partner", "Trains", "CheckpointSave"]
    assert comfy.ask(*[("node", name, False) for name in nodes]) == [True, True, False, False, False, False]
    assert comfy.ask(*[("node", name, False) for name in nodes], admin=True) == [True] * 6
    models = ["x.safetensors", "x.CKPT", "x.pt", "checkpoints/x.bin", "x.pkl"]
    acts = [(act, name, True) for act in ("save model", "safetensors", "torch") for name in models]
    assert all(got.startswith("Refused") for got in comfy.ask(*acts))
    assert comfy.ask(("save model", "x.latent", True), ("torch", "cache", True)) == ["saved", "saved"]
    assert comfy.ask(*acts, admin=True) == ["saved"] * len(acts)


def test_any_node_reads_and_writes_only_where_prompts_work(comfy: Comfy) -> None:
    secret, new = str(comfy.data / "secret.txt"), str(comfy.data / "new.txt")
    outside = [
        ("read", secret), ("read", "/etc/passwd"), ("read", "/proc/self/environ"),
        ("read", "/proc/self/root/etc/passwd"),
        ("read", "/proc/thread-self/environ"), ("read", str(comfy.data / "input" / "link.png")),
        ("read", str(comfy.data / "input" / ".." / "secret.txt")), ("write", new), ("remove", secret), ("move", new),
        ("write", str(comfy.data / "output" / "up" / "new.txt")), ("list", str(comfy.data)), ("list", "/root"),
        ("write", str(comfy.data / "models" / "x.py")), ("write", str(comfy.code / "nodes.py")),
        ("write", str(comfy.data / "user" / "x.so")),
    ]  # fmt: skip
    said = comfy.ask(*[(act, name, True) for act, name in outside])
    for row, got in zip(outside, said, strict=True):
        assert str(got).startswith("Refused: fastsd guard: a prompt"), (row, got)
    assert not Path(new).exists()
    assert Path(secret).exists()
    fine = [("write", str(comfy.data / "output" / "x.txt")), ("read", str(comfy.data / "output" / "x.txt"))]
    fine += [("write", str(comfy.data / "temp" / "y")), ("read", str(comfy.code / "nodes.py"))]
    assert not [got for got in comfy.ask(*[(*row, True) for row in fine]) if "Refused" in str(got)]
    # What is no prompt is the web UI's own business; with administration open, so is a prompt.
    assert comfy.ask(("read", secret, False)) == ["secret"]
    assert comfy.ask(("read", secret, True), admin=True) == ["secret"]


def test_a_film_is_a_file_that_names_no_other_and_a_picture_of_a_wanted_kind(comfy: Comfy, tmp_path: Path) -> None:
    film = comfy.data / "input" / "film.mp4"
    film.write_text("film")
    (allowed,) = comfy.ask(("film", str(film), True))
    assert {"mov", "matroska", "webm"} <= set(allowed)
    assert not {"hls", "dash", "concat", "image2", "sdp", "rtsp", "tee", "lavfi", "applehttp", "imf"} & set(allowed)
    bad = ["http://127.0.0.1:1/x.mp4", "concat:/etc/passwd", "subfile,,start,0,end,9,,:/etc/passwd", "/etc/passwd"]
    bad += [str(comfy.data / "film.mp4"), str(comfy.data / "input" / "up" / "film.mp4")]
    assert all(got.startswith("Refused") for got in comfy.ask(*[("film", name, True) for name in bad]))
    assert comfy.ask(("make film", str(comfy.data / "output" / "x.mp4"), True)) == [False]
    psd = comfy.data / "input" / "x.png"
    psd.write_bytes(
        b"8BPS\x00\x01" + bytes(6) + b"\x00\x03\x00\x00\x00\x01\x00\x00\x00\x01\x00\x08\x00\x03" + bytes(12)
    )
    said = comfy.ask(("image", str(comfy.data / "input" / "a.png"), True), ("image", str(psd), True))
    assert said[0] == "GIF"
    assert said[1].startswith("UnidentifiedImageError")


def test_a_model_that_is_gone_is_told_with_the_next_step(comfy: Comfy) -> None:
    (comfy.data.parent / "shelf.safetensors").unlink()
    said = comfy.ask(("model", "linked.safetensors", True), ("model", "never.safetensors", True))
    assert said[0].startswith("Lost: linked.safetensors is not where it was when it was placed. Put it back there")
    assert str(comfy.data.parent) not in said[0], "its owner's folders are nobody's business"
    assert said[1] is None, "what was never there is the web UI's own to tell"
    assert comfy.ask(("model", "linked.safetensors", False)) == [None], "a list of files is not a prompt"
    chosen, fine = comfy.ask(("choose", "gone.safetensors", False), ("choose", "m.safetensors", False))
    assert "fastsd webui place" in chosen["1"]["errors"][0]["details"]
    assert fine == {}
    assert "fastsd" not in comfy.ask(("choose", "euler_b", False))[0]["1"]["errors"][0]["details"]


def test_a_store_that_is_gone_is_told_wherever_it_is_missed(comfy: Comfy) -> None:
    models = comfy.data / "models"
    models.rename(comfy.store / "models")
    models.symlink_to(comfy.store / "models")
    acts = [("models", "checkpoints", False), ("model", "m.safetensors", True), ("fail", "it is not connected", False)]
    before = comfy.ask(*acts)
    assert "m.safetensors" in before[0]
    assert before[2] == "it is not connected", "an error that has nothing to do with it stays as it is"
    comfy.store.rename(comfy.data.parent / "away")  # a Drive that is unmounted leaves an empty folder
    comfy.store.mkdir()
    assert comfy.ask(acts[0])[0].startswith("FileNotFoundError"), "a store that answers is not said to be gone"
    comfy.store.rmdir()
    for act, said in zip(acts, comfy.ask(*acts), strict=True):
        assert "does not answer, as when the connection to Drive is lost. Bring it back" in said, act
    assert said.endswith("\nit is not connected")


@pytest.fixture
def served(comfy: Comfy) -> Iterator[tuple[Comfy, str]]:
    port = free_port()
    process = comfy.start("serve", str(port))
    assert "ready" in process.stdout.readline(), process.stderr.read()
    yield comfy, f"http://127.0.0.1:{port}"
    process.kill()
    process.communicate()


def asked(address: str, body: bytes | None = None, kind: str = "", method: str = "") -> int:
    request = urllib.request.Request(address, body, {"Content-Type": kind} if kind else {}, method=method or None)
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status
    except urllib.error.HTTPError as err:
        return err.code


def uploaded(address: str, name: str, **fields: str) -> int:
    mark = uuid.uuid4().hex
    parts = [
        f'--{mark}\r\nContent-Disposition: form-data; name="{key}"\r\n\r\n{value}\r\n' for key, value in fields.items()
    ]
    head = f'--{mark}\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\n\r\nxx\r\n--{mark}--\r\n'
    return asked(address, ("".join(parts) + head).encode(), f"multipart/form-data; boundary={mark}")


def test_a_request_that_misses_the_store_is_answered_in_words_and_the_web_ui_runs_on(
    served: tuple[Comfy, str],
) -> None:
    comfy, address = served
    assert asked(f"{address}/settings") == 500, "the web UI's own error"
    comfy.store.rename(comfy.store.with_name("away"))
    request = urllib.request.Request(f"{address}/settings")
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=20)
    assert caught.value.code == 503
    assert "Bring it back" in json.loads(caught.value.read())["error"]
    assert asked(f"{address}/object_info") == 200
    comfy.store.with_name("away").rename(comfy.store)
    assert asked(f"{address}/settings") == 500


def test_names_in_requests_stay_in_the_folders_for_them(served: tuple[Comfy, str]) -> None:
    comfy, address = served
    secret = urllib.parse.quote(str(comfy.data / "secret.txt"))
    fine = ["/view?filename=a.png&type=input", "/api/view?filename=b.png&type=input&subfolder=sub"]
    fine += ["/view?filename=c.png", "/view?filename=c.png%20[output]", "/object_info", "/userdata/workflows%2Fa.json"]
    assert [asked(address + path) for path in fine] == [200] * len(fine)
    bad = [
        "filename=../secret.txt&type=input",
        f"filename={secret}",
        "filename=link.png&type=input",
        "filename=x&type=all",
    ]
    bad += ["filename=secret.txt&type=input&subfolder=up", "filename=secret.txt&type=input&subfolder=..", "filename="]
    bad += [
        "filename=%252e%252e/secret.txt",
        "filename=..%5Csecret.txt",
        "filename=link.png%20[input]",
        "filename=a%00.png",
    ]
    bad += ["filename=other/link.png&type=input"]
    for prefix in ("/view?", "/api/view?", "/%76iew?"):
        assert {query: asked(address + prefix + query) for query in bad} == dict.fromkeys(bad, 403)
    # Nodes that a user added have doors of their own: what is named there by path stays inside too.
    for path in (f"/vhs/viewvideo?filename={secret}", f"/some/list?path={secret}", "/some/get?file=../../secret.txt"):
        assert asked(address + path) == 403, path
    assert asked(address + f"/some/get?path={urllib.parse.quote(str(comfy.data / 'output' / 'c.png'))}") == 200


def test_uploads_are_pictures_and_films_for_the_input_folder(served: tuple[Comfy, str]) -> None:
    _, address = served
    for door in ("/upload/image", "/api/upload/image", "/upload/mask"):
        assert uploaded(address + door, "x.png", subfolder="sub") == 200
        assert uploaded(address + door, "x.mp4", type="temp") == 200
        for name, fields in (
            ("x.png", {"type": "output"}), ("x.png", {"subfolder": ".."}), ("x.png", {"subfolder": "up"}),
            ("../x.png", {}), ("link.png", {"overwrite": "true"}), ("x.py", {}), ("x.CKPT", {}),
            ("x.safetensors", {"type": "temp"}), ("x.png", {"type": "models"}),
        ):  # fmt: skip
            assert uploaded(address + door, name, **fields) == 403, (door, name, fields)
    for ref in ({"filename": "../secret.txt"}, {"filename": "secret.txt", "subfolder": ".."}, {"x": 1}, []):
        assert uploaded(address + "/upload/mask", "x.png", original_ref=json.dumps(ref)) == 403, ref
    assert asked(address + "/api/assets", b"{}", "application/json") == 403
    assert asked(address + "/api/assets") == 200


@pytest.mark.parametrize(
    ("file", "old", "new", "name"),
    [
        ("folder_paths.py", "def get_annotated_filepath(", "def get_annotated_file(", "get_annotated_filepath"),
        ("folder_paths.py", "filename_prefix, output_dir, image_width", "prefix, output_dir, image_width", "get_save"),
        ("execution.py", "class PromptExecutor", "class Executor", "PromptExecutor.execute"),
        ("execution.py", "def validate_prompt(prompt_id,", "def validate_prompt(", "validate_prompt"),
        ("server.py", "def add_routes", "def register", "PromptServer.add_routes"),
        ("app/user_manager.py", "get_request_user_filepath", "user_filepath", "get_request_user_filepath"),
        ("comfy/utils.py", "save_torch_file", "save_weights", "save_torch_file"),
        ("av.py", "def open", "def read", "open of av"),
    ],
)
def test_a_function_that_is_not_there_or_takes_something_else_is_no_start(
    comfy: Comfy, file: str, old: str, new: str, name: str
) -> None:
    text = (comfy.code / file).read_text()
    assert old in text
    (comfy.code / file).write_text(text.replace(old, new))
    process = comfy.start("ask", "[]", str(free_port()))
    said, problem = process.communicate(timeout=60)
    assert (process.returncode, said) == (3, "")
    assert name in problem
    assert "not started without it" in problem


def test_it_is_started_guarded_without_nodes_that_ask_other_services(tmp_path: Path) -> None:
    where = {"folder": str(tmp_path), "store": str(tmp_path / "store")}
    made = plan(LaunchConfig(ui="comfyui", **where))
    assert Path(made.command[2]) == GUARD
    assert "--disable-api-nodes" in made.command
    assert "--disable-api-nodes" not in plan(LaunchConfig(ui="comfyui", allow_admin=True, **where)).command
    assert find_ui("comfyui").guard == GUARD.name
