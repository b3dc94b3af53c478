"""One way to share: what cannot work is refused before anything starts, what fails later leaves the page running."""

import base64
import importlib.util
import json
import os
import shutil
import signal
import sys
import time
import types
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("aiohttp")

from bare_guard import in_code, use_bare_guard
from tunnel_doubles import FORWARD, free_port, keep, make_program, processes_of

from fastsd_helpers.cli.parser import parse
from fastsd_helpers.errors import (
    DependencyMissing,
    FastSDError,
    SettingsError,
    TunnelError,
    TunnelServiceDown,
    TunnelTokenRefused,
    TunnelToolMissing,
)
from fastsd_helpers.playground import PlaygroundConfig, open_playground
from fastsd_helpers.processes import Child
from fastsd_helpers.trocr.reading.serve import ServeConfig, serve
from fastsd_helpers.tunnels import TunnelConfig, require_shareable
from fastsd_helpers.tunnels.services import kinds, node_packages
from fastsd_helpers.webui import find_places, find_ui

TOKEN = "2abcDEFghiJKL345mnoPQR_7stuVWXyz"
LT = FORWARD + "target = int(sys.argv[sys.argv.index('--port') + 1])\n"
LT_GOOD = LT + "say(f'your url is: http://127.0.0.1:{forward(target)}'); stay()"
LT_DEAD = LT + "say('Error: connection refused: localtunnel.me:1234 (check your firewall settings)'); sys.exit(1)"


@pytest.fixture(autouse=True)
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is the whole path, and no token and no password anywhere."""
    folder = tmp_path / "programs"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    for name in ("NGROK_AUTHTOKEN", "FASTSD_PASSWORD", "FASTSD_CLOUDFLARED", "PYNGROK_NGROK_PATH"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HTTPS_PROXY", "https_proxy"):  # behind this one nothing can be fetched
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    return folder


def without(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name in packages else real(name, *more)
    )


# -------------------------------------------------------------------------------------------- before anything starts


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ({"kind": "ngrok"}, TunnelTokenRefused, "ngrok needs an authtoken"),
        ({"kind": "ngrok", "ngrok_token": "ngrok config add-authtoken 2abc"}, TunnelTokenRefused, "no token has"),
        ({"kind": "ngrok", "ngrok_token": TOKEN}, TunnelToolMissing, "ngrok is not installed, and"),
        ({"kind": "gradio"}, TunnelToolMissing, "frpc is not installed, and frpc 0.3 could not be fetched"),
        ({"kind": "cloudflared"}, TunnelToolMissing, "cloudflared is not installed"),
        ({"kind": "localtunnel"}, TunnelToolMissing, "needs Node.js"),
        ({"kind": "colab"}, TunnelError, "exists only in a Colab notebook"),
        ({"kind": "gradio", "user": "a b"}, SettingsError, "user is 'a b'"),
        ({"kind": "gradio", "password": "short"}, SettingsError, "The password has 5 characters"),
        ({"kind": "auto", "password": "contains a space"}, SettingsError, "contains a space"),
    ],
)
def test_what_cannot_work_is_refused_with_what_to_do(
    settings: dict[str, str], error: type[FastSDError], said: str
) -> None:
    package = {"ngrok": "pyngrok", "gradio": "gradio"}.get(settings["kind"], "json")
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed (pip install {package})")
    with pytest.raises(error) as caught:
        require_shareable(TunnelConfig(**settings))
    assert said in caught.value.problem
    assert caught.value.hint
    assert TOKEN not in str(caught.value)


@pytest.mark.parametrize(("kind", "package"), [("ngrok", "pyngrok"), ("gradio", "gradio")])
def test_a_package_that_is_missing_is_named(kind: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, package)
    with pytest.raises(TunnelToolMissing, match=f"The package {package} is not installed"):
        require_shareable(TunnelConfig(kind=kind, ngrok_token=TOKEN))


def test_a_gate_that_cannot_be_built_is_said_before(monkeypatch: pytest.MonkeyPatch, programs: Path) -> None:
    make_program(programs, "lt", LT_GOOD)
    without(monkeypatch, "aiohttp")
    with pytest.raises(DependencyMissing, match="aiohttp"):
        require_shareable(TunnelConfig(kind="localtunnel"))


@pytest.mark.parametrize(("kind", "variable"), [("cloudflared", "FASTSD_CLOUDFLARED"), ("ngrok", "PYNGROK_NGROK_PATH")])
def test_a_program_that_is_named_and_not_there_is_said(
    kind: str, variable: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if kind == "ngrok" and importlib.util.find_spec("pyngrok") is None:
        pytest.skip("pyngrok is not installed (pip install pyngrok)")
    (tmp_path / "text").write_text("not a program")
    for named in (tmp_path / "nowhere", tmp_path / "text", tmp_path):
        monkeypatch.setenv(variable, str(named))
        with pytest.raises(TunnelToolMissing, match=f"{variable} names"):
            require_shareable(TunnelConfig(kind=kind, ngrok_token=TOKEN))


def test_a_password_from_the_environment_is_looked_at_too(monkeypatch: pytest.MonkeyPatch, programs: Path) -> None:
    make_program(programs, "lt", LT_GOOD)
    monkeypatch.setenv("FASTSD_PASSWORD", "short")
    with pytest.raises(SettingsError, match="FASTSD_PASSWORD"):
        require_shareable(TunnelConfig(kind="localtunnel"))


def test_what_is_there_is_taken_and_nothing_is_fetched(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cloudflared", "lt", "ngrok"):
        make_program(programs, name, "raise SystemExit('it is only looked for')")
    there = sorted(programs.rglob("*"))
    require_shareable(TunnelConfig(kind="cloudflared"))
    require_shareable(TunnelConfig(kind="localtunnel"))
    if importlib.util.find_spec("pyngrok") is not None:
        require_shareable(TunnelConfig(kind="ngrok", ngrok_token=TOKEN))
    if importlib.util.find_spec("gradio") is not None:
        keep(monkeypatch, "frpc", b"its bytes")
        require_shareable(TunnelConfig(kind="gradio"))
    assert sorted(programs.rglob("*")) == there


def test_auto_is_refused_only_where_nothing_can_work(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "gradio", "pyngrok")
    # As on a machine that none of them is made for.
    monkeypatch.setattr("fastsd_helpers.tunnels.services.programs.known_programs", list)
    with pytest.raises(TunnelError) as caught:
        require_shareable(TunnelConfig())
    for part in (
        "No service can open a tunnel here",
        "ngrok: ngrok needs",
        "gradio: ",
        "cloudflared: ",
        "localtunnel: ",
    ):
        assert part in caught.value.problem
    make_program(programs, "cloudflared", "pass")
    require_shareable(TunnelConfig())


def test_nodes_packages_are_fetched_before_the_start(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_program(programs, "node", "pass")
    make_program(programs, "npm", "raise SystemExit('npm error code EAI_AGAIN')")
    with pytest.raises(TunnelToolMissing, match="npm could not fetch localtunnel"):
        require_shareable(TunnelConfig(kind="localtunnel"))
    assert node_packages.node_missing() is None


# ------------------------------------------------------------------------------------------------ our own Gradio pages


@pytest.fixture
def gradio() -> Any:
    return pytest.importorskip("gradio")


def _reader() -> Any:
    return types.SimpleNamespace(checkpoint=types.SimpleNamespace(folder=Path("small-reader")))


def _artist() -> Any:
    return types.SimpleNamespace(
        title="a stand-in",
        smallest=64,
        largest=128,
        multiple=64,
        size=64,
        steering=None,
        habits=types.SimpleNamespace(steps=25, guidance=7.5, takes_negative=True),
        has_before=False,
        lora_strength=None,
    )


def _open(which: str, share: str, **more: Any) -> Any:
    if which == "reader":
        return serve(_reader(), ServeConfig(port=0, share=share), **more)
    return open_playground(config=PlaygroundConfig(share=share), artist=_artist(), **more)


def _status(url: str, login: Any = None) -> int:
    headers = {}
    if login is not None:
        headers["Authorization"] = "Basic " + base64.b64encode(f"{login.user}:{login.password}".encode()).decode()
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(urllib.request.Request(url, headers=headers), timeout=20) as answer:
            return answer.status
    except urllib.error.HTTPError as err:
        return err.code


@pytest.mark.parametrize("which", ["reader", "playground"])
def test_a_page_goes_through_the_gate_whatever_proxy_is_set(
    which: str, gradio: Any, programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_program(programs, "lt", LT_GOOD)
    monkeypatch.setattr(kinds, "ask", lambda url, **_: (0, "no network"))
    for name in ("ALL_PROXY", "all_proxy", "HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(name, f"socks5://127.0.0.1:{free_port()}")
    with _open(which, "localtunnel") as page:
        assert page.problem is None
        login = page.tunnel.login
        assert _status(f"{page.tunnel.url}/config") == 401
        assert _status(f"{page.tunnel.url}/config", login) == 200
        assert page.local_url.startswith("http://127.0.0.1:")
        assert f"Password:  {login.password}" in page.block()
        assert page.about()["kind"] == "localtunnel"
        assert _status(f"{page.tunnel.url}/monitoring/summary", login) == 403, "closed on a link to a page of Gradio"
        # The reader's page asks on this machine too, as it always has; the playground's is open there.
        assert _status(f"{page.local_url}config") == (401 if which == "reader" else 200)
    assert page.tunnel.closed
    assert os.environ["ALL_PROXY"].startswith("socks5://")
    assert "NO_PROXY" not in os.environ


@pytest.mark.parametrize("which", ["reader", "playground"])
def test_a_link_that_fails_leaves_the_page_open(
    which: str, gradio: Any, programs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_program(programs, "lt", LT_DEAD)
    with _open(which, "localtunnel") as page:
        assert isinstance(page.problem, TunnelServiceDown)
        assert page.tunnel is None
        assert _status(page.local_url) == 200
        assert "Not shared: localtunnel's server refuses connections." in page.block()
        assert "refuses connections" in page.about()["problem"]
        assert page.about()["url"] == page.local_url
    assert f"stays open at {page.local_url}" in caplog.text
    assert _gone_page(page.local_url)


def _gone_page(url: str) -> bool:
    try:
        _status(url)
    except OSError:
        return True
    return False


@pytest.mark.parametrize("which", ["reader", "playground"])
def test_a_link_that_cannot_work_starts_no_page(which: str, gradio: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradio.Blocks, "launch", lambda self, **_: pytest.fail("it was started"))
    with pytest.raises(TunnelTokenRefused):
        _open(which, "ngrok")


def test_a_taken_port_is_a_sentence(gradio: Any) -> None:
    with _open("reader", "no") as page, pytest.raises(SettingsError, match=f"Port {page.port} cannot be used"):
        open_playground(config=PlaygroundConfig(port=page.port), artist=_artist())


def test_a_bare_share_is_auto_and_a_kind_is_taken() -> None:
    for command in (["trocr", "serve"], ["playground"], ["webui", "launch"]):
        assert parse([*command, "--share"]).share == "auto"
        assert parse([*command, "--share", "cloudflared"]).share == "cloudflared"
        assert parse([*command, "--share", "--json"]).share == "auto"
        assert parse([*command, "--no-share"]).share == "no"
        assert not hasattr(parse(command), "share")
    # As it is saved in forms and notebooks of before.
    assert [ServeConfig(share=value).share for value in (True, False)] == ["auto", "no"]
    with pytest.raises(SettingsError, match="share"):
        ServeConfig(share="serveo")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trocr", "serve", "--share", "ngrok"], "ngrok needs an authtoken"),
        (["trocr", "serve", "--share", "serveo"], "serveo"),
        (["trocr", "serve", "--share", "colab"], "exists only in a Colab notebook"),
        (["trocr", "serve", "--share", "--user", "a b"], "user is 'a b'"),
        (["trocr", "serve", "--subdomain", "calm-fox"], "none was requested"),
        (["playground", "--share", "cloudflared"], "cloudflared is not installed"),
        (["playground", "--share", "serveo"], "serveo"),
        (["playground", "--share", "ngrok", "--ngrok-domain", "https://x"], "ngrok_domain"),
    ],
)
def test_the_commands_refuse_before_a_model_is_loaded(
    words: list[str], said: str, gradio: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastsd_helpers.cli import main

    monkeypatch.setattr("fastsd_helpers.playground.page.open_artist", lambda *_, **__: pytest.fail("it was loaded"))
    monkeypatch.setattr("fastsd_helpers.cli.trocr_commands.Reader", lambda *_, **__: pytest.fail("it was loaded"))
    assert main([*words, "--json"]) == 2
    assert said in json.loads(capsys.readouterr().out.splitlines()[-1])["error"]


# ------------------------------------------------------------------------------------------------------- a web UI


@pytest.fixture
def ui(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An installation of a stub, and its command lines."""
    guard = use_bare_guard(tmp_path, monkeypatch)
    code = f"{in_code(guard)}import sys; from fastsd_helpers.cli import main; sys.exit(main(sys.argv[1:]))"
    where = {"folder": str(tmp_path / "code"), "store": str(tmp_path / "store")}
    places = find_places(find_ui("a1111"), **where)
    places.python.parent.mkdir(parents=True)
    places.python.symlink_to(sys.executable)
    places.code.mkdir(parents=True)
    shutil.copy(Path(__file__).with_name("stub_webui.py"), places.code / "launch.py")
    (places.code / "mood").write_text("good")
    flags = ["--folder", where["folder"], "--store", where["store"]]
    started: list[Child] = []

    def start(*words: str) -> Child:
        command = [sys.executable, "-c", code, "webui", "launch", *flags, "--port", str(free_port())]
        files = {name: tmp_path / f"{len(started)}.{name}" for name in ("log", "out")}
        started.append(Child([*command, *words], env=dict(os.environ), **files))
        return started[-1]

    yield types.SimpleNamespace(places=places, flags=flags, start=start, where=where)
    from fastsd_helpers.webui import stop

    stop("a1111", **where)
    for child in started:
        child.close()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--share", "ngrok"], "ngrok needs an authtoken"),
        (["--share", "cloudflared"], "cloudflared is not installed"),
        (["--share", "localtunnel"], "needs Node.js"),
        (["--share", "colab"], "exists only in a Colab notebook"),
        (["--share", "zrok"], "zrok"),
        (["--share", "zrok", "--dry-run"], "zrok"),
        (["--share", "--user", "a b"], "user is 'a b'"),
        (["--share", "ngrok", "--background"], "ngrok needs an authtoken"),
        (["--ngrok-domain", "x.ngrok-free.app"], "none was requested"),
    ],
)
def test_no_web_ui_is_started_for_a_link_that_cannot_work(
    words: list[str], said: str, ui: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    from fastsd_helpers.cli import main

    assert main(["webui", "launch", *ui.flags, "--port", str(free_port()), *words]) == 2
    assert said in capsys.readouterr().err
    assert not (ui.places.run / "state.json").exists(), "nothing was started"


@pytest.mark.parametrize("admin", [False, True], ids=["as it is", "allow_admin"])
def test_administration_passes_only_where_it_was_asked_for(
    admin: bool, ui: Any, programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastsd_helpers.webui import LaunchConfig, launch, share, share_port

    make_program(programs, "lt", LT_GOOD)
    monkeypatch.setattr(kinds, "ask", lambda url, **_: (0, "no network"))
    config = LaunchConfig(port=free_port(), wait_s=60, allow_admin=admin, **ui.where)
    link = TunnelConfig(kind="localtunnel", wait_s=20)
    with launch(config) as running, share(running, link) as one, share_port(running.port, link) as other:
        for tunnel in (one, other):
            assert tunnel.login == running.login
            assert _status(f"{tunnel.url}/sdapi/v1/cmd-flags", tunnel.login) == (200 if admin else 403)
            assert _status(f"{tunnel.url}/proxy=http://127.0.0.1:9/", tunnel.login) == 403, "closed to everybody"


def _wait_for(child: Child, out: Path, words: str, within_s: float = 60) -> str:
    ends = time.monotonic() + within_s
    while words not in (text := out.read_text() if out.exists() else ""):
        assert child.alive(), child.last_lines()
        assert time.monotonic() < ends, text
        time.sleep(0.05)
    return text


def test_a_web_ui_runs_on_when_its_link_fails(ui: Any, programs: Path, tmp_path: Path) -> None:
    from fastsd_helpers.webui import status

    make_program(programs, "lt", LT_DEAD)
    child = ui.start("--share", "localtunnel", "--json")
    told = json.loads(_wait_for(child, tmp_path / "0.out", "}\n").splitlines()[0])
    assert told["kind"] is None
    assert "refuses connections" in told["problem"]
    assert told["password"]
    assert _status(f"{told['url']}/internal/ping") == 200
    assert status("a1111", **ui.where)[1]
    time.sleep(0.3)
    assert child.alive()
    os.kill(_inner(child), signal.SIGINT)
    assert child.wait(60) == 130
    assert not status("a1111", **ui.where)[1]


def _inner(child: Child) -> int:
    """The command itself: what this process started is the guard around it."""
    (pid,) = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
    return int(pid)


def test_a_background_web_ui_has_a_link_with_its_login_until_it_is_stopped(
    ui: Any, programs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from fastsd_helpers.cli import main

    make_program(programs, "lt", LT_GOOD)
    child = ui.start("--share", "localtunnel", "--background", "--json")
    assert child.wait(60) == 0, child.last_lines()
    told = json.loads((tmp_path / "0.out").read_text().splitlines()[0])
    login = types.SimpleNamespace(user=told["user"], password=told["password"])
    assert (ui.places.run / "login").read_text() == f"{login.user}:{login.password}", "one login for both"
    assert _status(told["url"] + "/sdapi/v1/options") == 401
    assert _status(told["url"] + "/sdapi/v1/options", login) == 200
    assert _status(told["url"] + "/sdapi/v1/cmd-flags", login) == 403, "closed on a link to this web UI"
    for path in (ui.places.run / "link.json", ui.places.run / "link.log"):
        assert login.password not in path.read_text()
    assert ui.places.run.stat().st_mode & 0o077 == 0
    assert processes_of(login.password) == []
    assert main(["webui", "status", *ui.flags, "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["link"] == told["url"]
    assert main(["webui", "stop", *ui.flags]) == 0
    assert _gone_page(told["url"])
    assert not (ui.places.run / "link.json").exists()


@pytest.mark.slow
def test_a_background_link_ends_with_its_web_ui(ui: Any, programs: Path, tmp_path: Path) -> None:
    from fastsd_helpers.webui.running.process import end_process, read_run

    make_program(programs, "lt", LT_GOOD)
    child = ui.start("--share", "localtunnel", "--background", "--json")
    assert child.wait(60) == 0, child.last_lines()
    url = json.loads((tmp_path / "0.out").read_text().splitlines()[0])["url"]
    assert _status(url) in (401, 303)
    end_process(read_run(ui.places.run))  # as if it had crashed: nobody stops the link
    ends = time.monotonic() + 30
    while not _gone_page(url) and time.monotonic() < ends:
        time.sleep(0.2)
    assert _gone_page(url)


@pytest.mark.slow
def test_a_background_link_that_fails_leaves_the_web_ui_and_says_so(ui: Any, programs: Path, tmp_path: Path) -> None:
    from fastsd_helpers.webui import status

    make_program(programs, "lt", LT_DEAD)
    child = ui.start("--share", "localtunnel", "--background", "--json")
    assert child.wait(60) == 2
    assert "it is not shared: localtunnel's server refuses connections" in (tmp_path / "0.out").read_text()
    assert status("a1111", **ui.where)[1]
