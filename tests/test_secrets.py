"""Secrets stay where they belong: what children get of the environment, and what can be read of a running one."""

import ast
import contextlib
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bare_guard import use_bare_guard
from test_tunnels import CLOUDFLARED_GOOD, FRPC, LT, NGROK_GOOD
from tunnel_doubles import free_port, make_program, serve, site_handler

from fastsd_helpers.dreambooth.running.child_process import start_training
from fastsd_helpers.dreambooth.settings import DreamBoothConfig
from fastsd_helpers.errors import TunnelToolMissing
from fastsd_helpers.model_lookup import tokens_for
from fastsd_helpers.processes import Child, environment, environment_for, looks_secret, with_this_package
from fastsd_helpers.runtime import remember_secret
from fastsd_helpers.sessions import Session
from fastsd_helpers.tunnels import TunnelConfig, open_tunnel
from fastsd_helpers.tunnels.services import kinds, node_packages
from fastsd_helpers.webui import LaunchConfig, find_places, find_ui, launch, plan, stop
from fastsd_helpers.webui.extensions import repositories
from fastsd_helpers.webui.flags import Machine
from fastsd_helpers.webui.running.command import environment_of
from fastsd_helpers.wheels import make_environment, own_environ, read_environment
from fastsd_helpers.wheels.proof import prove

PACKAGE = Path(__file__).resolve().parents[1] / "fastsd_helpers"
A1111, CPU = find_ui("a1111"), Machine("a processor", 0, 16)

# What stands in the environment of a notebook or a shell, by the services that put it there.
SECRETS = {
    "HF_TOKEN": "hf_tokenAAAAAAAAAAAAAAAAAAAAAAAA",
    "HUGGING_FACE_HUB_TOKEN": "secret-hub-old",
    "HUGGINGFACE_TOKEN": "secret-hub-other",
    "NGROK_AUTHTOKEN": "2secretngroktoken_A1b2C3d4E5",
    "NGROK_API_KEY": "secret-ngrok-api",
    "CIVITAI_TOKEN": "secret-civitai-1",
    "CIVITAI_API_KEY": "secret-civitai-2",
    "FASTSD_PASSWORD": "secret-password-77",
    "AWS_ACCESS_KEY_ID": "secret-aws-id",
    "AWS_SECRET_ACCESS_KEY": "secret-aws-key",
    "AWS_SESSION_TOKEN": "secret-aws-session",
    "AZURE_CLIENT_SECRET": "secret-azure",
    "GITHUB_TOKEN": "ghp_secretAAAAAAAAAAAAAAAAAAAAAAAAAA",
    "GH_TOKEN": "secret-gh",
    "GIT_CONFIG_COUNT": "1",
    "GIT_CONFIG_KEY_0": "http.extraheader",
    "GIT_CONFIG_VALUE_0": "Authorization: Basic secret-git-header",
    "GIT_ASKPASS": "/secret/askpass",
    "KAGGLE_KEY": "secret-kaggle-key",
    "KAGGLE_USERNAME": "secret-kaggle-user",
    "KAGGLE_USER_SECRETS_TOKEN": "secret-kaggle-token",
    "KAGGLE_DATA_PROXY_TOKEN": "secret-kaggle-proxy",
    "COLAB_JUPYTER_TOKEN": "secret-colab-jupyter",
    "TBE_CREDS_ADDR": "secret-colab-credentials:8008",
    "TBE_EPHEM_CREDS_ADDR": "secret-colab-credentials:8009",
    "GOOGLE_APPLICATION_CREDENTIALS": "/secret/google.json",
    "CLOUDSDK_CONFIG": "/secret/cloudsdk",
    "OPENAI_API_KEY": "sk-secret-openai",
    "ANTHROPIC_API_KEY": "sk-secret-anthropic",
    "NVIDIA_API_KEY": "nvapi-secret",
    "NGC_API_KEY": "secret-ngc",
    "WANDB_API_KEY": "secret-wandb",
    "REPLICATE_API_TOKEN": "r8_secret",
    "TUNNEL_TOKEN": "secret-cloudflare-tunnel",
    "CLOUDFLARE_API_TOKEN": "secret-cloudflare-api",
    "NPM_TOKEN": "secret-npm",
    "NPM_CONFIG__AUTH": "secret-npm-auth",
    "UV_PUBLISH_TOKEN": "pypi-secret",
    "TWINE_PASSWORD": "secret-twine",
    "DATABASE_URL": "postgres://me:secret-database@db/x",
    "PGPASSWORD": "secret-postgres",
    "SECRET_KEY": "secret-django",
    "JUPYTER_TOKEN": "secret-jupyter",
    "JPY_API_TOKEN": "secret-jupyterhub",
    "VAST_CONTAINERLABEL": "secret-vast",
    "RUNPOD_API_KEY": "secret-runpod",
    "DOCKER_AUTH_CONFIG": '{"auths": "secret-docker"}',
    "SLACK_WEBHOOK": "https://hooks.example/secret-slack",
    # No secrets, but what makes a program do something else than it was started for.
    "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1",
    "TORCH_FORCE_WEIGHTS_ONLY_LOAD": "0",
    "PYTHONSTARTUP": "/secret/startup.py",
    "PYTHONINSPECT": "",
    "PYTHONBREAKPOINT": "secret.module",
    "LD_AUDIT": "",
    "COMMANDLINE_ARGS": "--share --secret-arguments",
    "IGNORE_CMD_ARGS_ERRORS": "secret-1",
    "TUNNEL_URL": "http://secret-elsewhere",
    "HOST": "secret-host",
    "PORT": "9",
    "SUBDOMAIN": "secret-subdomain",
    "GRADIO_TEMP_DIR": "/secret/uploads",
    "GRADIO_ALLOWED_PATHS": "/",
    "GRADIO_SERVER_NAME": "secret-0.0.0.0",
    "FASTSD_GUARD": '{"admin": true, "secret": 1}',
    "NODE_OPTIONS": "--no-warnings --title=secret-node",
    # Allowed names with a secret in them.
    "HF_ENDPOINT": "https://me:secret-mirror@mirror.example",
    "TORCH_HOME": "hf_anotherAAAAAAAAAAAAAAAAAAAAAAA",
}
PLAIN = {
    "CUDA_VISIBLE_DEVICES": "",
    "LC_ALL": "C.UTF-8",
    "HTTPS_PROXY": "http://user:word@127.0.0.1:9",
    "NO_PROXY": "127.0.0.1,localhost",
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    "FASTSD_MODELS": "/models",
    "HF_HUB_OFFLINE": "1",
}


@pytest.fixture
def full_of_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (SECRETS | PLAIN).items():
        monkeypatch.setenv(name, value)


def environ_of(pid: int) -> dict[str, str]:
    """The environment a running process was started with."""
    while not (whole := (Path("/proc") / str(pid) / "environ").read_bytes()):
        time.sleep(0.01)  # it is starting: the new program has no environment yet
    pairs = whole.split(b"\0")
    return dict(pair.decode(errors="replace").partition("=")[::2] for pair in pairs if pair)


def group_of(leader: int) -> dict[int, str]:
    """Every process of a group, and the command line of each."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if os.getpgid(int(entry.name)) == leader:
                    found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
    return found


def children_of(parent: int) -> dict[int, str]:
    """Every process that another one started, however far down, and the command line of each."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                state = (entry / "stat").read_text().rpartition(")")[2].split()
                parents[int(entry.name)] = int(state[1])
    found: set[int] = set()
    while more := {pid for pid, above in parents.items() if above in {parent, *found}} - found:
        found |= more
    lines = {}
    for pid in found:
        with contextlib.suppress(OSError):
            lines[pid] = (Path("/proc") / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode()
    return lines


ALLOWED = {kind: {name for group in groups for name in group.split()} for kind, groups in environment.ALLOWED.items()}
THIS_PYTHON = set(environment.THIS_PYTHON.split())
SET_FOR_A_UI = {*plan(LaunchConfig()).environment, "PWD", "OLDPWD", "SHLVL", "_"}


def check_environ(found: dict[str, str], kind: str, *given: str) -> None:
    """Print the names a child got, and compare them with its row of the table and what it was given beside."""
    sys.stdout.write(f"{kind}: {' '.join(sorted(found))}\n")
    assert found.get("PATH"), "a child without a path finds nothing"
    installers = {name for name in found if kind == "install" and name.startswith(("PIP_", "UV_"))}
    assert set(found) <= ALLOWED[kind] | THIS_PYTHON | installers | set(given)
    told = [name for name, value in SECRETS.items() if name not in given and len(value) > 5 and value in found.values()]
    assert not told, f"{kind} was told {told}"
    assert not [value for value in found.values() if "secret-" in value and value not in map(SECRETS.get, given)]


# ---------------------------------------------------------------------------------------------------- the table


def test_no_name_in_the_table_is_that_of_a_secret() -> None:
    names = set().union(*ALLOWED.values(), THIS_PYTHON)
    odd = {name for name in names if looks_secret(name)}
    # A socket of the ssh agent, for git alone; a switch that turns a token off; the proxy's way of asking.
    assert odd <= {"SSH_AUTH_SOCK", "HF_HUB_DISABLE_IMPLICIT_TOKEN"}
    assert {kind for kind, row in ALLOWED.items() if "SSH_AUTH_SOCK" in row} == {"git"}
    assert not names & (set(SECRETS) - {"HF_ENDPOINT", "TORCH_HOME"})


@pytest.mark.parametrize("kind", sorted(ALLOWED))
@pytest.mark.parametrize("this_python", [False, True])
def test_each_kind_of_child_gets_its_row_and_no_more(kind: Any, this_python: bool, full_of_secrets: None) -> None:
    check_environ(
        environment_for(kind, this_python=this_python), kind, *(["HF_ENDPOINT"] if kind == "training" else [])
    )


def test_what_a_child_needs_is_there(full_of_secrets: None) -> None:
    training, ui = environment_for("training", this_python=True), environment_for("web UI")
    for name in ("PATH", "HOME", "HTTPS_PROXY", "CUDA_VISIBLE_DEVICES", "PYTORCH_CUDA_ALLOC_CONF", "HF_HUB_OFFLINE"):
        assert training[name] == ui[name] == os.environ[name], name
    assert training["FASTSD_MODELS"] == "/models"
    assert training["PYTHONPATH"] == os.environ["PYTHONPATH"]
    assert "PYTHONPATH" not in ui
    assert training["HF_ENDPOINT"] == SECRETS["HF_ENDPOINT"], "the mirror that this run fetches from"
    assert "HF_ENDPOINT" not in ui


def test_a_child_finds_this_library_but_no_backport_before_pythons_own_modules(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    home = Path(environment.__file__).resolve().parents[2]
    assert with_this_package({"PYTHONPATH": "/more"})["PYTHONPATH"] == f"{home}{os.pathsep}/more"
    assert with_this_package({}) == {"PYTHONPATH": str(home)}
    # As installed from a wheel: the folder of all packages, where one may be named like a module of Python's own.
    monkeypatch.setattr(environment.sysconfig, "get_path", lambda name: str(home))
    assert with_this_package({"PATH": "/bin"}) == {"PATH": "/bin"}
    assert with_this_package({"PYTHONPATH": "/more"}) == {"PYTHONPATH": "/more"}
    monkeypatch.undo()
    monkeypatch.setattr(environment.site, "getsitepackages", lambda: [str(home)])
    assert with_this_package({}) == {}


def test_a_secret_under_an_allowed_name_stays_here(monkeypatch: pytest.MonkeyPatch) -> None:
    remember_secret("a-token-handed-out")
    monkeypatch.setenv("TORCH_HOME", "a-token-handed-out")
    monkeypatch.setenv("XDG_DATA_HOME", "ghp_" + "A" * 36)
    monkeypatch.setenv("HF_HOME", "https://me:word@host/x")
    monkeypatch.setenv("CUDA_CACHE_PATH", "/a-token-handed-out/with/more")  # a path that has the word in it, no secret
    found = environment_for("web UI")
    assert not {"TORCH_HOME", "XDG_DATA_HOME", "HF_HOME"} & set(found)
    assert found["CUDA_CACHE_PATH"]


def test_installers_keep_the_users_index_and_nobody_else_gets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    index = "https://me:index-word@index.example/simple"
    for name in ("PIP_INDEX_URL", "UV_INDEX_URL", "UV_INDEX_MINE_PASSWORD", "UV_CONSTRAINT", "UV_PUBLISH_PASSWORD"):
        monkeypatch.setenv(name, index)
    own, other = environment_for("install", this_python=True), own_environ()
    for name in ("PIP_INDEX_URL", "UV_INDEX_URL", "UV_INDEX_MINE_PASSWORD"):
        assert own[name] == other[name] == index
    assert "UV_CONSTRAINT" in own
    assert "UV_CONSTRAINT" not in other
    assert "UV_PUBLISH_PASSWORD" not in {**own, **other}
    for kind in sorted(set(ALLOWED) - {"install"}):
        assert index not in environment_for(kind, this_python=True).values()


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        ("MY_SERVICE_TOKEN", True),
        ("my_password", True),
        ("DB_PASSWD", True),
        ("OPENAI_API_KEY", True),
        ("AWS_ACCESS_KEY_ID", True),
        ("GOOGLE_APPLICATION_CREDENTIALS", True),
        ("SENTRY_DSN", True),
        ("SESSION_COOKIE", True),
        ("TOKENIZERS_PARALLELISM", False),
        ("XFORMERS_MORE_DETAILS", False),
        ("KEYBOARD", False),
        ("CUDA_PATH", False),
    ],
)
def test_names_of_secrets_are_known_by_their_spelling(name: str, secret: bool) -> None:
    assert looks_secret(name) is secret


def test_a_user_can_give_the_ui_more_and_is_told_what_it_means(
    full_of_secrets: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = {"folder": str(tmp_path / "programs"), "store": str(tmp_path / "store")}
    monkeypatch.setenv("MY_OWN_SWITCH", "on")
    made = plan(LaunchConfig(pass_env="MY_OWN_SWITCH HF_TOKEN COMMANDLINE_ARGS NOT_SET", **where), machine=CPU)
    found = environment_of(made)
    check_environ(found, "web UI", "HF_TOKEN", "MY_OWN_SWITCH", *SET_FOR_A_UI)
    assert (found["MY_OWN_SWITCH"], found["HF_TOKEN"], found["COMMANDLINE_ARGS"]) == ("on", SECRETS["HF_TOKEN"], "")
    said = "\n".join(made.lines())
    assert "HF_TOKEN is passed on: it looks like a secret" in said
    assert "MY_OWN_SWITCH is passed on\n" in said
    assert SECRETS["HF_TOKEN"] not in said
    from fastsd_helpers.errors import SettingsError

    with pytest.raises(SettingsError, match="takes only names") as caught:
        LaunchConfig(pass_env="HF_TOKEN=hf_typed_here")
    assert "hf_typed_here" not in str(caught.value)


@pytest.mark.parametrize(
    ("ref", "tokens"),
    [
        ("demo", ()),
        ("sd15", ("HF_TOKEN",)),
        ("owner/name", ("HF_TOKEN",)),
        ("https://huggingface.co/owner/name", ("HF_TOKEN",)),
        ("https://huggingface.co/owner/name/resolve/main/a.safetensors", ("HF_TOKEN",)),
        ("https://civitai.com/models/5", ("CIVITAI_TOKEN", "HF_TOKEN")),
        ("https://www.civitai.com/api/download/models/5", ("CIVITAI_TOKEN", "HF_TOKEN")),
        ("https://notcivitai.com/models/5", ("HF_TOKEN",)),
        ("https://[broken", ("HF_TOKEN",)),
        ("FOLDER", ()),
        ("FILE", ("HF_TOKEN",)),
        ("no such thing", ()),
    ],
)
def test_only_a_model_that_must_be_fetched_needs_a_token(ref: str, tokens: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model.safetensors").write_bytes(b"x")
    named = {"FOLDER": str(tmp_path / "model"), "FILE": str(tmp_path / "model.safetensors")}.get(ref, ref)
    assert tokens_for(named) == tokens


# ------------------------------------------------------------------------------------- every start in the library

STARTERS = {
    "subprocess": {"Popen", "call", "check_call", "check_output", "getoutput", "getstatusoutput", "run"},
    "os": {
        *("execl", "execle", "execlp", "execlpe", "execv", "execve", "execvp", "execvpe", "fork", "forkpty", "popen"),
        *("posix_spawn", "posix_spawnp", "spawnl", "spawnle", "spawnlp", "spawnv", "spawnve", "spawnvp", "system"),
        *("spawnlpe", "spawnvpe", "startfile"),
    },
    "asyncio": {"create_subprocess_exec", "create_subprocess_shell"},
    "pty": {"fork", "spawn"},
    "multiprocessing": {"Pool", "Process", "get_context"},
    "concurrent.futures": {"ProcessPoolExecutor"},
}
# `guard` is given its child's environment and hands it on; benchmarks measure this very code in a fresh process, which
# runs nothing else.
EXCEPTIONS = {
    "processes/guard.py": {"subprocess.Popen"},
    "bench/dreambooth.py": {"multiprocessing.get_context"},
    "bench/trocr.py": {"multiprocessing.get_context"},
}


def unguarded_starts(source: str) -> Iterator[str]:
    """Starts of processes that do not say which environment they give, and uses of the environment as a whole."""
    tree = ast.parse(source)
    modules, names = {}, {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.asname or alias.name: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: (node.module, alias.name) for alias in node.names}
    above = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            said = ast.unparse(node.func)
            module, _, name = said.rpartition(".")
            module, name = (modules.get(module, module), name) if module else names.get(name, ("", name))
            if name in STARTERS.get(str(module), ()):
                given = next((item.value for item in node.keywords if item.arg == "env"), None)
                if module != "subprocess" or given is None or isinstance(given, ast.Constant):
                    yield f"{module}.{name}"
        whole = isinstance(node, ast.Attribute) and node.attr in ("environ", "environb")
        if whole or (isinstance(node, ast.Name) and names.get(node.id) in (("os", "environ"), ("os", "environb"))):
            parent = above.get(node)
            single = (
                (isinstance(parent, ast.Subscript) and parent.value is node)
                or (isinstance(parent, ast.Attribute) and parent.attr in ("get", "pop", "setdefault", "update"))
                or (isinstance(parent, ast.Compare) and node in parent.comparators)
                or (isinstance(parent, ast.AugAssign) and parent.target is node)
            )
            if not single:
                yield "the whole environment"


FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("file", [file for file in FILES if file != "processes/environment.py"])
def test_every_start_of_a_process_says_what_it_gives_of_the_environment(file: str) -> None:
    found = set(unguarded_starts((PACKAGE / file).read_text(encoding="utf-8")))
    assert found == EXCEPTIONS.get(file, set())


@pytest.mark.parametrize(
    "source",
    [
        "import subprocess\nsubprocess.run(['x'])",
        "import subprocess as s\ns.Popen(['x'], env=None)",
        "from subprocess import check_output as look\nlook(['x'])",
        "import os\nos.execv('/x', ['x'])",
        "import os\nos.system('x')",
        "import multiprocessing\nmultiprocessing.get_context('spawn')",
        "import subprocess, os\nsubprocess.run(['x'], env={**os.environ, 'A': '1'})",
        "import os\nenvironment = dict(os.environ)",
        "import os\nenvironment = os.environ.copy()",
        "from os import environ\nenvironment = environ | {}",
        "import os\nchosen = {name: value for name, value in os.environ.items()}",
    ],
)
def test_the_rule_notices_a_start_that_gives_everything(source: str) -> None:
    assert list(unguarded_starts(source))


# ------------------------------------------------------------------------------------------- the real children


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is the whole path."""
    folder = tmp_path / "programs"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


TELL = """
import json, os, sys
with open(__file__ + ".told", "a") as file:
    file.write(json.dumps(dict(os.environ)) + "\\n")
"""


def told(program: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in Path(f"{program}.told").read_text().splitlines()]


def test_a_child_without_a_wish_and_the_filter_of_its_log(full_of_secrets: None, tmp_path: Path) -> None:
    child = Child(
        [sys.executable, "-c", "import time; print('my-own-hidden-word', flush=True); time.sleep(600)"],
        log=tmp_path / "log",
        hidden=["my-own-hidden-word", "surrogate \udcff"],
        outlives=True,
    )
    try:
        check_environ(environ_of(child.pid), "program")
        check_environ(environ_of(child._filter.pid), "filter")
        command = (Path("/proc") / str(child._filter.pid) / "cmdline").read_bytes()
        assert b"my-own-hidden-word" not in command
        child.wait_for(lambda line: line == "•••" or None, time.monotonic() + 60)
    finally:
        child.close()
    assert "my-own-hidden-word" not in (tmp_path / "log").read_text()


def test_a_child_is_told_a_secret_on_its_standard_input(full_of_secrets: None, tmp_path: Path) -> None:
    words = [sys.executable, "-c", "import sys, time; print(len(sys.stdin.read()), flush=True); time.sleep(600)"]
    child = Child(words, log=tmp_path / "log", outlives=True, told="the-word-\udcff")
    try:
        child.wait_for(lambda line: "10" in line or None, time.monotonic() + 60)
        check_environ(environ_of(child.pid), "program")
        assert b"the-word" not in (Path("/proc") / str(child.pid) / "cmdline").read_bytes()
    finally:
        child.close()
    with pytest.raises(OSError, match=r"pipe|unavailable"):
        Child(words, log=tmp_path / "log", outlives=True, told="x" * 2**20)
    with pytest.raises(ValueError, match="told nothing"):
        Child(words, told="the-word")


@pytest.mark.parametrize(
    ("model", "given"),
    [
        ("demo", []),
        ("FOLDER", []),
        ("owner/name", ["HF_TOKEN"]),
        ("https://civitai.com/models/5", ["HF_TOKEN", "CIVITAI_TOKEN"]),
    ],
)
def test_a_training(model: str, given: list[str], full_of_secrets: None, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("FASTSD_SCRATCH", str(tmp_path / "scratch"))
    session = Session.create("rex", root=tmp_path / "sessions")
    (tmp_path / "model").mkdir()
    training = start_training(DreamBoothConfig(base_model=model.replace("FOLDER", str(tmp_path / "model"))), session)
    try:
        found = environ_of(training.process.pid)
    finally:
        training.process  # noqa: B018 - the real command: it ends by itself, since there are no pictures
        training._child.close(0)
    check_environ(found, "training", "HF_ENDPOINT", *given)
    assert {name: found.get(name) for name in given} == {name: SECRETS[name] for name in given}


def test_a_training_finds_the_older_ways_to_a_token_when_it_needs_one(
    full_of_secrets: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastsd_helpers.background import environment_of_ours

    assert "HUGGING_FACE_HUB_TOKEN" not in environment_of_ours("sd15"), "the newer name is enough"
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setenv("HF_TOKEN_PATH", "/somewhere/token")
    assert environment_of_ours("sd15")["HUGGING_FACE_HUB_TOKEN"] == SECRETS["HUGGING_FACE_HUB_TOKEN"]
    assert environment_of_ours("sd15")["HF_TOKEN_PATH"] == "/somewhere/token"
    assert not {"HF_TOKEN_PATH", "HUGGING_FACE_HUB_TOKEN"} & set(environment_of_ours("demo"))


@pytest.mark.parametrize(
    "place", ["https://me:my-word@host/a.git", "https://my-word@host/a", "http://host/a?token=my-word"]
)
@pytest.mark.parametrize("name", ["stable-diffusion-webui", "no-such-name", ""])
def test_a_mirror_with_a_password_is_refused_and_not_shown(place: str, name: str) -> None:
    from fastsd_helpers.errors import SettingsError

    with pytest.raises(SettingsError) as caught:
        repositories.read_mirrors(f"{name}={place}", ["stable-diffusion-webui"])
    assert "my-word" not in str(caught.value)
    with pytest.raises(SettingsError) as caught:
        repositories.read_mirrors(place, ["stable-diffusion-webui"])
    assert "my-word" not in str(caught.value)
    plain = "https://host/a.git"
    assert repositories.read_mirrors(f"code={plain}, b=git@host:a", ["code", "b"]) == {"code": plain, "b": "git@host:a"}


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    use_bare_guard(tmp_path, monkeypatch)
    where = {"folder": str(tmp_path / "ui"), "store": str(tmp_path / "store")}
    places = find_places(A1111, **where)
    places.python.parent.mkdir(parents=True)
    places.python.symlink_to(sys.executable)
    places.code.mkdir(parents=True)
    shutil.copy(Path(__file__).with_name("stub_webui.py"), places.code / "launch.py")
    (places.code / "mood").write_text("good")
    yield type("Stub", (), {"where": where, "places": places})
    stop("a1111", **where)


def test_a_web_ui_and_all_that_its_start_started(full_of_secrets: None, stub: Any) -> None:
    pytest.importorskip("aiohttp")
    before = children_of(os.getpid())
    config = LaunchConfig(port=free_port(), user="owner", password="the-owners-word-1", wait_s=60, **stub.where)
    with launch(config, machine=CPU) as running:
        check_environ(environ_of(running.state.pid), "web UI", *SET_FOR_A_UI)
        started = {pid: line for pid, line in children_of(os.getpid()).items() if pid not in before}
        assert running.state.pid in started
        for pid, line in started.items():
            whole = line + str(environ_of(pid))
            for value in ("the-owners-word-1", *filter(lambda value: len(value) > 5, SECRETS.values())):
                assert value not in whole, (line, value)
        kept = [path for path in stub.places.root.rglob("*") if path.is_file() and path.stat().st_size < 1_000_000]
        assert running.log in kept
        with_password = [path for path in kept if b"the-owners-word-1" in path.read_bytes()]
        assert with_password == [stub.places.run / "login"]
        assert stat.S_IMODE(with_password[0].stat().st_mode) == 0o600
        assert stat.S_IMODE(stub.places.run.stat().st_mode) == 0o700
        for path in kept:
            assert not re.search(rb"secret-|hf_token", path.read_bytes()), path
    assert not (stub.places.run / "login").exists()


@pytest.fixture
def site() -> Iterator[int]:
    pytest.importorskip("aiohttp")
    with serve(site_handler) as port:
        yield port


def _cloudflared(programs: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (programs.parent / "names").mkdir()
    make_program(programs, "cloudflared", CLOUDFLARED_GOOD)
    return "cloudflared"


def _localtunnel(programs: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    make_program(programs, "lt", LT + "say(f'your url is: http://127.0.0.1:{forward(target)}'); stay()")
    return "localtunnel"


def _fetched_localtunnel(programs: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    client = make_program(programs, "client", LT + "say(f'your url is: http://127.0.0.1:{forward(target)}'); stay()")
    monkeypatch.setattr(kinds, "bring_client", lambda folder, **_words: [sys.executable, str(client)])
    return "localtunnel"


def _ngrok(programs: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    pytest.importorskip("pyngrok")
    make_program(programs, "ngrok", NGROK_GOOD)
    return "ngrok"


def _gradio(programs: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    pytest.importorskip("gradio")
    body = "say(f'start proxy success: http://127.0.0.1:{forward(target)}'); stay()"
    frpc = make_program(programs, "frpc", FRPC + body)
    monkeypatch.setattr(kinds, "bring_program", lambda name, folder, **_words: frpc)
    return "gradio"


@pytest.mark.parametrize("prepare", [_cloudflared, _localtunnel, _fetched_localtunnel, _ngrok, _gradio])
def test_a_tunnels_programs(
    prepare: Any, full_of_secrets: None, site: int, programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = prepare(programs, monkeypatch)
    monkeypatch.setattr(
        "fastsd_helpers.tunnels.tunnel.wait_for_nonce", lambda *_words: ""
    )  # no public side is required
    config = TunnelConfig(wait_s=60, password="the-owners-word-1", share_server="127.0.0.1:7000")
    with open_tunnel(site, kind, config=config, watch_every_s=0) as link:
        processes = group_of(link._running.child.pid)
        assert len(processes) >= 2, "the guard and the program"
        for pid, line in processes.items():
            agent = kind == "ngrok" and str(programs) in line.split(" ")[1]
            # The token is for ngrok's holder, which gives its agent a file; the guard has what its child has.
            given = ["NGROK_AUTHTOKEN"] if kind == "ngrok" and not agent else []
            check_environ(environ_of(pid), "tunnel", *given, "GRADIO_ANALYTICS_ENABLED")
            assert not re.search(r"secret-|the-owners-word|2secretngrok", line)


def test_git_and_uv_and_the_proof_of_an_installation(
    full_of_secrets: None, programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "https://index.example/simple")
    git = make_program(programs, "git", TELL)
    repositories._git(["status"], tmp_path)
    uv = make_program(programs, "uv", TELL)
    make_environment(tmp_path / "made")
    npm = make_program(programs, "npm", TELL)
    with pytest.raises(TunnelToolMissing):
        node_packages._fetch(60)
    check_environ(told(npm)[0], "tunnel")
    description = {
        "version": "3.11.9",
        "prefix": "/p",
        "site": "/s",
        "platform": "x",
        "managed": False,
        "installed": {},
    }
    answers = [json.dumps(answer) for answer in (description, {"modules": [], "problems": []})]
    python = make_program(tmp_path / "other", "python", f"{TELL}\nprint({answers!r}['-I' not in sys.argv])")
    prove(read_environment(python), ["pillow"])
    check_environ(told(git)[0], "git", "GIT_TERMINAL_PROMPT", "GIT_ASKPASS")
    assert told(git)[0]["GIT_ASKPASS"] == "true"
    check_environ(told(uv)[0], "install", "PIP_INDEX_URL")
    assert told(uv)[0]["PIP_INDEX_URL"]
    assert len(told(python)) == 2
    for found in told(python):
        check_environ(found, "proof")
        assert not THIS_PYTHON & set(found)


def test_this_python_proves_itself_without_secrets(full_of_secrets: None, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def run(*words: Any, **settings: Any) -> Any:
        seen.append(settings["env"])
        return subprocess.CompletedProcess(words, 0, '{"modules": [], "problems": []}', "")

    monkeypatch.setattr(subprocess, "run", run)
    prove(read_environment(), ["pillow"])
    check_environ(seen[0], "proof")
    assert seen[0]["PYTHONPATH"] == os.environ["PYTHONPATH"]


# ------------------------------------------------------------------------------------- records, errors and the log


def test_no_record_shows_a_secret_in_its_repr() -> None:
    import dataclasses
    import importlib
    import pkgutil

    import fastsd_helpers

    shown, seen = [], 0
    for item in pkgutil.walk_packages(fastsd_helpers.__path__, "fastsd_helpers."):
        if item.name.endswith("__main__") or ".guards." in item.name:  # run in a web UI's process
            continue
        for kind in vars(importlib.import_module(item.name)).values():
            if isinstance(kind, type) and dataclasses.is_dataclass(kind) and kind.__module__ == item.name:
                for field in dataclasses.fields(kind):
                    named = looks_secret(field.name) and field.name not in ("key", "pass_env")
                    secret = field.metadata.get("secret") or (named and "str" in str(field.type))
                    seen += bool(secret)
                    if secret and field.repr:
                        shown.append(f"{item.name}.{kind.__name__}.{field.name}")
    # localtunnel's page asks every visitor for this machine's address, which is known to all.
    assert not [name for name in shown if not name.endswith(".visitor_password")]
    assert seen >= 8


@pytest.mark.parametrize("settings", [LaunchConfig, TunnelConfig])
def test_settings_show_no_secret_in_repr_or_error(settings: Any) -> None:
    from fastsd_helpers.errors import SettingsError

    assert "a-word-of-mine" not in repr(settings(password="a-word-of-mine"))
    with pytest.raises(SettingsError, match="password must be text") as caught:
        settings(password=1234567890)
    assert "1234567890" not in str(caught.value)
    assert "--password" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:my-word@host/simple failed", "https://me:•••@host/simple failed"),
        ("http://:my-word@host", "http://:•••@host"),
        ("git+https://x-access-token:ghs_abc@github.com/a/b", "git+https://x-access-token:•••@github.com/a/b"),
        ("GET https://host/f?token=my-word&x=1", "GET https://host/f?token=•••&x=1"),
        ("https://host/f?x=1&API_KEY=my-word'", "https://host/f?x=1&API_KEY=•••'"),
        ("https://s3/f?X-Amz-Signature=abc123", "https://s3/f?X-Amz-Signature=•••"),
        ("http://127.0.0.1:7860/?next=/config", "http://127.0.0.1:7860/?next=/config"),
        ("at 12:30 write to me@host", "at 12:30 write to me@host"),
        ("https://host/monkey=1?resourcekey=2", "https://host/monkey=1?resourcekey=2"),
    ],
)
def test_the_log_and_the_command_line_hide_what_an_address_holds(text: str, shown: str) -> None:
    from fastsd_helpers.runtime import redact

    assert redact(text) == shown
    assert redact(shown) == shown


def test_an_installers_complaint_does_not_repeat_the_indexs_password(
    programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fastsd_helpers.cli import main

    say = 'import sys; sys.exit("error: could not reach https://me:index-word@index.example/simple?token=index-key")'
    make_program(programs, "uv", f"{say}\n")
    make_program(programs, "git", "")
    assert main(["webui", "install", "--folder", str(tmp_path / "ui"), "--store", str(tmp_path / "store")]) != 0
    out, err = capsys.readouterr()
    assert "could not" in err
    assert "index-word" not in out + err
    assert "index-key" not in out + err
