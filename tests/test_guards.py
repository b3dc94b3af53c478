"""The guards of web UIs: patched before anything uses it, no start without every patch, what a visitor may not do."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastsd_helpers.errors import SettingsError
from fastsd_helpers.webui import LaunchConfig, find_ui, plan, uis
from fastsd_helpers.webui.arguments import refused_arguments
from fastsd_helpers.webui.running.crash import explain_crash
from fastsd_helpers.webui.settings import read_extensions

GUARDS = Path(plan.__code__.co_filename).parents[1] / "guards"

# ------------------------------------------------------------------------------------------------------ the frame

GUARD = """
import sys
sys.path.insert(0, {guards!r})
from frame import Refused, patch, run, setting, when_loaded

@patch("shop.tools", "Box.read", "self path size=")
def _(original):
    def read(self, path, size=1):
        if path.startswith("/") and not setting("admin"):
            raise Refused("only uploaded files can be named")
        return original(self, path, size)
    return read

@patch("shop.tools", "Box.make", "name")
def _(original):
    return lambda name: "made " + name

@patch("shop.late", "act", "", late=True)
def _(original):
    return lambda: "closed"

@patch("shop.never", "act", "", optional=True)
def _(original):
    return original

@when_loaded("shop.tools")
def _(module):
    module.added = True

run()
"""
TOOLS = """
class Box:
    def read(self, path, size=1):
        return "content of " + path
    @staticmethod
    def make(name):
        return name
"""
ENTRY = """
import sys, os, json
from shop.tools import Box
import shop.tools
said = {"argv": sys.argv, "path": sys.path[0], "name": __name__, "added": shop.tools.added, "cwd": os.getcwd()}
said["environment"] = sorted(name for name in os.environ if name.startswith(("FASTSD_GUARD", "TORCH_FORCE")))
said["frame"] = "frame" in sys.modules
said["make"] = Box.make("x")
for path in ("/etc/passwd", "note"):
    try:
        said[path] = Box().read(path)
    except PermissionError as err:
        said[path] = str(err)
EXTRA
import socket
with socket.socket() as server:
    server.bind(("127.0.0.1", 0))
    port = server.getsockname()[1]
server = socket.socket()
server.bind(("127.0.0.1", port))
import shop.late
said["late"] = shop.late.act()
print(json.dumps(said), flush=True)
"""


@pytest.fixture
def shop(tmp_path: Path) -> Any:
    """A small web UI of real modules on disk, with a guard; gives a function that starts it with one file changed."""
    code = tmp_path / "code"
    (code / "shop").mkdir(parents=True)
    (code / "shop" / "__init__.py").touch()
    (code / "shop" / "tools.py").write_text(TOOLS)
    (code / "shop" / "late.py").write_text("def act():\n    return 'open'\n")
    (tmp_path / "guard.py").write_text(GUARD.format(guards=str(GUARDS)))

    def start(*, extra: str = "", admin: bool = False, **files: str) -> subprocess.CompletedProcess[str]:
        for name, text in files.items():
            (code / "shop" / f"{name}.py").write_text(text)
        (code / "launch.py").write_text(ENTRY.replace("EXTRA", extra))
        return subprocess.run(
            [sys.executable, "-u", str(tmp_path / "guard.py"), "launch.py", "--port", "1"],
            cwd=code,
            env={
                **os.environ,
                "FASTSD_GUARD": json.dumps({"admin": admin}),
                "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1",
                "PYTHONDONTWRITEBYTECODE": "1",
            },
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    start.code = code
    return start


def start_again(shop: Any) -> Any:
    """Start what `shop` has written, with another launcher."""
    command = [sys.executable, "-u", str(shop.code.parent / "guard.py"), "launch.py"]
    return subprocess.run(command, cwd=shop.code, capture_output=True, text=True, timeout=60, check=False)


def test_the_launcher_runs_as_if_it_had_been_started_itself_with_everything_patched(shop: Any) -> None:
    done = shop()
    said = json.loads(done.stdout)
    assert said["argv"] == ["launch.py", "--port", "1"]
    assert (said["path"], said["cwd"], said["name"]) == (str(shop.code), str(shop.code), "__main__")
    assert said["/etc/passwd"] == "fastsd guard: only uploaded files can be named"
    assert (said["note"], said["make"], said["late"]) == ("content of note", "made x", "closed")
    assert said["added"] is True
    assert said["environment"] == [], "neither the settings nor torch's switch reach the web UI"
    assert said["frame"] is False, "its own modules may have that name"


def test_admin_mode_is_what_the_patch_makes_of_it(shop: Any) -> None:
    assert json.loads(shop(admin=True).stdout)["/etc/passwd"] == "content of /etc/passwd"


@pytest.mark.parametrize(
    ("files", "extra", "said"),
    [
        ({"tools": "class Box:\n    def make(name): ...\n"}, "", "Box.read of shop.tools is not there"),
        ({"tools": "Box = None\n"}, "", "Box.read of shop.tools is not there"),
        ({"tools": TOOLS.replace("size=1", "size=1, trust=False")}, "", "takes (self path size= trust=)"),
        ({"tools": TOOLS.replace("path, size=1", "path, *rest")}, "", "takes (self path *rest)"),
        ({"tools": TOOLS.replace("path, size=1", "path, size")}, "", "takes (self path size)"),
        (
            {"tools": f"class Base:\n{TOOLS[TOOLS.index('    def read') :]}\nclass Box(Base):\n    pass\n"},
            "",
            "Box.read of shop.tools is not there",
        ),
        ({"late": "def other():\n    return 'open'\n"}, "", "act of shop.late is not there"),
        ({}, "Box.read = lambda self, path, size=1: open(path).read()", "Box.read of shop.tools was replaced"),
        ({}, "shop.tools.Box = type('Box', (), {'read': print, 'make': print})", "was replaced by something else"),
        ({}, "del Box.read", "Box.read of shop.tools is not there"),
        ({"late": "act = 5\n"}, "", "act of shop.late takes (no function)"),
    ],
)
def test_without_every_function_nothing_is_started(shop: Any, files: dict[str, str], extra: str, said: str) -> None:
    # An updated web UI, an updated Gradio, an extension that puts its own function there.
    done = shop(extra=extra, **files)
    assert done.returncode == 3
    assert said in done.stderr
    assert not done.stdout
    error = explain_crash("AUTOMATIC1111", 3, done.stderr.splitlines())
    assert "its guard does not fit" in error.problem
    assert "webui install" in error.hint


def test_a_module_that_was_never_loaded_is_missed_when_a_port_is_opened(shop: Any) -> None:
    shop()
    launch = shop.code / "launch.py"
    launch.write_text(
        "import socket\nsocket.socket().bind(('127.0.0.1', 0))\nprint('not yet')\n"
        "socket.socket().bind(('127.0.0.1', 45871))\nprint('open')\n"
    )
    done = start_again(shop)
    assert (done.returncode, done.stdout) == (3, "not yet\n")
    assert "was never loaded" in done.stderr


def test_an_error_that_the_web_ui_swallows_does_not_keep_it_alive(shop: Any) -> None:
    done = shop(tools="class Box: pass\n", extra="")
    (shop.code / "launch.py").write_text("try:\n    import shop.tools\nexcept BaseException:\n    pass\nprint('on')\n")
    done = start_again(shop)
    assert (done.returncode, done.stdout) == (3, "")


def test_a_wrapper_that_calls_the_guarded_function_is_taken(shop: Any) -> None:
    extra = (
        "import functools\nkept = Box.read\n"
        "Box.read = functools.wraps(kept)(lambda self, path, size=1: kept(self, path, size))"
    )
    assert shop(extra=extra).returncode == 0


# ------------------------------------------------------------------------------------------- paths and addresses


def ask(code: str, tmp_path: Path, **environment: str) -> Any:
    """Run a piece of code as a guard's own would run, and give what it prints as JSON."""
    text = f"import sys\nsys.path.insert(0, {str(GUARDS)!r})\nimport json, os\n{code}"
    settings = json.dumps({"data": str(tmp_path / "data"), "store": str(tmp_path / "store")})
    done = subprocess.run(
        [sys.executable, "-c", text],
        cwd=tmp_path / "code",
        env={**os.environ, "FASTSD_GUARD": settings, "TMPDIR": str(tmp_path), **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """Folders as an installation has them, with files that a visitor may and may not see."""
    for name in (
        "code/script.js", "code/webui.py", "code/config.json", "code/.git/x.png", "code/html/card.png",
        "code/cache.sqlite", "store/outputs/a/picture.png",
        "store/outputs/.hidden/x.png", "store/config.json", "run/login", "logs/run.log",
        "data/extensions/e/style.css",
        "data/extensions/e/key.env", "store/models/m.safetensors", "outside/secret.png",
    ):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "data" / "outputs").symlink_to(tmp_path / "store" / "outputs")
    (tmp_path / "store" / "outputs" / "link.png").symlink_to(tmp_path / "outside" / "secret.png")
    return tmp_path


def test_the_page_gets_its_own_files_and_pictures_and_nothing_else(machine: Path) -> None:
    good = ["script.js", "html/card.png", "../data/extensions/e/style.css", "../data/outputs/a/picture.png"]
    bad = [
        "webui.py", "config.json", ".git/x.png", "cache.sqlite", "../data/outputs/.hidden/x.png", "../run/login",
        "../store/config.json", "../logs/run.log", "../data/extensions/e/key.env", "../store/models/m.safetensors",
        "../outside/secret.png", "../data/outputs/link.png", "/etc/passwd", "/proc/self/environ", "", ".", "..", "/",
        "http://127.0.0.1:1/x.png", "HTTP://x/y.js", "file:///etc/passwd", "script.js/../../outside/secret.png",
    ]  # fmt: skip
    code = "from visitors import allowed\nprint(json.dumps({p: allowed('/file=' + p) for p in %r}))"
    assert ask(code % good, machine) == dict.fromkeys(good, True)
    assert ask(code % bad, machine) == dict.fromkeys(bad, False)
    assert ask((code % bad).replace("/file=", "/file/"), machine) == dict.fromkeys(bad, False)


def test_a_path_is_read_as_the_last_decoder_would(machine: Path) -> None:
    from urllib.parse import quote

    text = "../outside/secret.png"
    layers = [text]
    for _ in range(12):
        layers.append(quote(layers[-1], safe="").replace(".", "%2e"))
    code = f"from visitors import allowed\nprint(json.dumps([allowed('/file=' + p) for p in {layers!r}]))"
    assert ask(code, machine) == [False] * len(layers)


def test_what_shows_passwords_stays_closed_and_the_rest_opens_for_the_owner(machine: Path) -> None:
    always = [
        "/proxy=http://x",
        "/sdapi/v1/cmd-flags",
        "/sdapi/v1/cmd-flags/",
        "/%73dapi/v1/cmd-flags",
        "/internal/sysinfo",
    ]
    owner = ["/sdapi/v1/server-stop", "/sdapi/v1/train/embedding", "/sdapi/v1/create/hypernetwork", "/docs"]
    honest = ["/", "/sdapi/v1/txt2img", "/internal/ping", "/run/predict", "/queue/join", "/sdapi/v1/options", "/upload"]
    code = "from visitors import allowed\nprint(json.dumps([[allowed(p) for p in row] for row in %r]))" % [
        always,
        owner,
        honest,
    ]
    assert [set(row) for row in ask(code, machine)] == [{False}, {False}, {True}]
    admin = json.dumps({"admin": True, "data": str(machine)})
    assert [set(row) for row in ask(code, machine, FASTSD_GUARD=admin)] == [{False}, {True}, {True}]


def test_a_payload_names_only_uploads_and_pictures_made_here(machine: Path) -> None:
    code = """
from visitors import look
from places import UPLOADS
good = os.path.join(UPLOADS, "ab", "x.txt"); os.makedirs(os.path.dirname(good)); open(good, "w").close()
os.symlink("/etc/passwd", os.path.join(UPLOADS, "link.png"))
def tried(name):
    answers = []
    for payload in (
        {"name": name, "data": None, "is_file": True}, [[{"is_file": 1, "name": name}]], {"path": name},
        {"a": {"b": [{"path": name, "is_file": False}]}},
    ):
        try:
            look(payload); answers.append(True)
        except PermissionError:
            answers.append(False)
    return answers
names = ["PICTURE", "PICTURE?17.5", good] + %r + [os.path.join(UPLOADS, "link.png"), UPLOADS + "-x/y", UPLOADS, ""]
names = [n.replace("PICTURE", os.path.join(os.environ["M"], "data/outputs/a/picture.png")) for n in names]
print(json.dumps([tried(n) for n in names]))
"""
    bad = ["/etc/passwd", "/proc/self/environ", str(machine / "outside/secret.png"),
           str(machine / "data/outputs/link.png"),
           "../outside/secret.png", str(machine / "store/config.json"),
           "http://127.0.0.1:1/x.png", "/etc/passwd?x.png"]  # fmt: skip
    answers = ask(code % bad, machine, M=str(machine))
    assert answers[:3] == [[True] * 4] * 3
    assert answers[3:] == [[False] * 4] * (len(bad) + 4)


def test_each_start_has_a_folder_of_uploads_of_its_own_and_old_ones_go(machine: Path) -> None:
    code = "import places\nprint(json.dumps([places.UPLOADS, os.environ['GRADIO_TEMP_DIR'], os.getpid()]))"
    first, told, pid = ask(code, machine)
    assert first == told
    assert f"-{pid}-" in first
    assert os.stat(first).st_mode & 0o777 == 0o700
    second, _, _ = ask(code, machine)
    assert second != first
    assert not Path(first).exists(), "that process has ended"


def test_after_the_start_no_port_of_this_machine_is_reached_but_its_own(machine: Path) -> None:
    code = """
import socket
from frame import only_near
servers = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
ports = [s.getsockname()[1] for s in servers]
os.environ["http_proxy"] = "http://127.0.0.2:%d" % ports[2]
only_near(lambda: ports[0])
def reach(host, port, family=socket.AF_INET):
    with socket.socket(family) as s:
        s.settimeout(0.2)
        try:
            s.connect((host, port))
        except PermissionError:
            return "refused"
        except OSError:
            return "other"
        return "reached"
print(json.dumps([reach("127.0.0.1", ports[0])] + [reach(h, ports[1]) for h in (
    "127.0.0.1", "localhost", "0.0.0.0", "10.0.0.1", "169.254.169.254", "192.168.1.1", "127.1.2.3")]
    + [reach(h, ports[1], socket.AF_INET6) for h in ("::1", "::ffff:127.0.0.1", "fe80::1", "::")]))
"""
    assert ask(code, machine) == ["reached"] + ["refused"] * 11


# --------------------------------------------------------------------------------------------------------- pictures


def test_only_the_wanted_picture_formats_are_opened_and_old_names_are_there(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    (tmp_path / "code").mkdir()
    code = """
import io, sys, frame
sys.meta_path.insert(0, frame._Finder())
import pictures
from PIL import Image, ImageDraw, ImageFont
answers = {}
for kind in ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "EPS", "PCX", "TGA", "SGI", "PPM", "ICO"):
    data = io.BytesIO(); Image.new("RGB", (32, 32), "red").save(data, kind); data.seek(0)
    try:
        answers[kind] = Image.open(data).size == (32, 32)
    except Exception:
        answers[kind] = False
draw = ImageDraw.Draw(Image.new("RGB", (200, 50)))
text = draw.textsize("word"); lines = draw.multiline_textsize("a word\\nand one more")
answers["sizes"] = text[0] > 10 and lines[0] > text[0] and lines[1] > text[1]
answers["names"] = [Image.LINEAR == 2, Image.ANTIALIAS == 1, hasattr(ImageFont.FreeTypeFont, "getsize")]
try:
    Image.open(io.BytesIO(b"8BPS"), formats=["PSD"]); answers["asked"] = True
except ValueError:
    answers["asked"] = False
print(json.dumps(answers))
"""
    said = ask(code, tmp_path)
    assert said.pop("names") == [True, True, True]
    assert said.pop("sizes") is True
    assert said.pop("asked") is False
    assert {kind for kind, opened in said.items() if opened} == {"PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "ICO"}


# -------------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("ui", "words"),
    [
        ("a1111", "--disable-safe-unpickle"), ("a1111", "--disable-safe"), ("a1111", "--enable-insec"),
        ("a1111", "--allow-c"),
        ("a1111", "'--allow-code'"), ("a1111", "--cors-allow-origins=*"), ("a1111", "--cors-allow-origins-regex .*"),
        ("a1111", "--gradio-allowed-path /"), ("a1111", "--gradio-al=/"), ("a1111", "--api-server-stop"),
        ("a1111", "--api-s"), ("a1111", "--add-stop-route"), ("a1111", "--xformers --update-all"),
        ("a1111", '"--disable-saf"'),
        ("forge-neo", "--disable-safe-unpickle"), ("forge-neo", "--enable-insecure-extension-acc"),
        ("comfyui", "--enable-cors-header"), ("comfyui", "--enable-cors"), ("comfyui", "--front-end-root=/x"),
        ("comfyui", "--front-end-v a/b@1"), ("comfyui", "--extra-model-paths-config x"), ("comfyui", "--multi-u"),
        ("comfyui", "--enable-manager"), ("comfyui", "--allow-remote-nodes"), ("a1111", "--my-extension-unsafe"),
    ],
)  # fmt: skip
def test_arguments_that_open_it_are_refused_however_they_are_written(ui: str, words: str) -> None:
    with pytest.raises(SettingsError, match="allow_admin"):
        LaunchConfig(ui=ui, extra_args=words)
    LaunchConfig(ui=ui, extra_args=words, allow_admin=True)


@pytest.mark.parametrize(
    ("ui", "words"),
    [
        ("a1111", "--lis"), ("a1111", "--shar"), ("a1111", "--ngrok=x"), ("a1111", "--server-n 0.0.0.0"),
        ("a1111", "--gradio-auth-p /x"), ("a1111", "--api-au a:b"), ("a1111", "--data-d=/x"), ("a1111", "--nowebui"),
        ("a1111", "--freeze-specific-settings x"), ("a1111", "--tls-k x"), ("a1111", "--ui-settings-file /x"),
        ("forge-neo", "--sub x"), ("comfyui", "--listen 0.0.0.0"), ("comfyui", "--lis=0.0.0.0"), ("comfyui", "--po 1"),
        ("comfyui", "--base-d /"), ("comfyui", "--tls-keyfile x"), ("comfyui", "--input-directory /"),
    ],
)  # fmt: skip
def test_arguments_that_are_set_elsewhere_are_never_taken(ui: str, words: str) -> None:
    for admin in (False, True):
        with pytest.raises(SettingsError, match="set elsewhere here"):
            LaunchConfig(ui=ui, extra_args=words, allow_admin=admin)


def test_honest_arguments_are_taken() -> None:
    for ui, words in (
        ("a1111", "--xformers --medvram --api --opt-channelslast --vae-path '/a b.safetensors' --freeze-settings"),
        ("a1111", "--theme dark --upcast-sampling --no-half --disable-nan-check --use-cpu all --lora-dir /x"),
        ("comfyui", "--cpu --lowvram --fp16-vae --preview-method auto --disable-auto-launch --fast"),
        ("forge-neo", "--sage --xformers --controlnet-dir /x"),
    ):
        assert LaunchConfig(ui=ui, extra_args=words).extra_args == words
        assert not any(refused_arguments(ui, shlex.split(words)))


def test_argparse_itself_takes_no_beginning_that_passes() -> None:
    # Every beginning of every refused name, as argparse would take it for the whole.
    import argparse

    from fastsd_helpers.webui import arguments

    for ui, (ours, opening) in arguments.REFUSED.items():
        parser = argparse.ArgumentParser()
        for name in (*ours, *opening, "--api"):
            if name not in parser._option_string_actions:
                parser.add_argument(name, nargs="?", const="given")
        for name in (*ours, *opening):
            for length in range(3, len(name) + 1):
                word = name[:length]
                taken, closed = refused_arguments(ui, [word])
                if not taken and not closed:
                    assert word in arguments.TAKEN_WHOLE, word


def test_without_allow_admin_the_uis_own_locks_are_set_too(tmp_path: Path) -> None:
    where = {"folder": str(tmp_path / "a"), "store": str(tmp_path / "b")}
    for ui in uis():
        made = plan(LaunchConfig(ui=ui.key, **where))
        assert made.command[:2] == [made.command[0], "-u"]
        assert Path(made.command[2]) == GUARDS / ui.guard
        assert Path(made.command[2]).is_file()
        assert made.command[3] == ui.entry
        assert json.loads(made.environment["FASTSD_GUARD"])["admin"] is False
        opened = plan(LaunchConfig(ui=ui.key, allow_admin=True, **where))
        assert json.loads(opened.environment["FASTSD_GUARD"])["admin"] is True
        if ui.key != "comfyui":
            assert made.command[made.command.index("--server-name") + 1] == "127.0.0.1"
            assert "--hide-ui-dir-config" in made.command
            assert "--server-name" not in opened.command


# ------------------------------------------------------------------------------------------------------- extensions


def test_extensions_are_https_addresses_or_folders_each_with_a_commit_if_wanted(tmp_path: Path) -> None:
    (tmp_path / "mine" / ".git").mkdir(parents=True)
    text = f"https://github.com/a/one.git@abc123, https://host:8443/b/two/, {tmp_path / 'mine'}"
    found = [(item.name, item.urls[0], item.revision) for item in read_extensions(text)]
    assert found == [
        ("one", "https://github.com/a/one.git", "abc123"),
        ("two", "https://host:8443/b/two/", "HEAD"),
        ("mine", str(tmp_path / "mine"), "HEAD"),
    ]
    assert read_extensions(" , ") == []


@pytest.mark.parametrize(
    "text",
    [
        "http://host/a/b", "git://host/a", "ssh://host/a", "git@host:a/b.git", "ext::sh -c touch", "file:///tmp/x",
        "https://user:word@host/a/b", "https://host/a/b@--upload-pack=x", "https://host/a/..", "https://host/a/.git",
        "https://host/a/b, https://other/c/b", "--upload-pack=x", "nothing-here", "https://host/a b", "/tmp",
    ],
)  # fmt: skip
def test_what_is_no_extension_is_named(text: str) -> None:
    with pytest.raises(SettingsError, match="https"):
        read_extensions(text)


def test_every_web_ui_has_its_guard() -> None:
    assert {find_ui(key).guard for key in ("a1111", "forge-neo", "comfyui")} == {
        "a1111.py",
        "forge_neo.py",
        "comfyui.py",
    }
