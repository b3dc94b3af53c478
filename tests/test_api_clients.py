"""One login for a web UI and every link to it, and programs that use the link as docs/api-clients.md says."""

import base64
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bare_guard import in_code, use_bare_guard
from test_secrets import check_environ, children_of, environ_of
from test_tunnels import LT
from tunnel_doubles import free_port, make_program, serve, site_handler

from fastsd_helpers.errors import SettingsError
from fastsd_helpers.processes import Child, environment_for
from fastsd_helpers.tunnels import Login, TunnelConfig, open_gate
from fastsd_helpers.tunnels.services import kinds
from fastsd_helpers.webui import LaunchConfig, find_places, find_ui, launch, share_port, stop
from fastsd_helpers.webui.flags import Machine
from fastsd_helpers.webui.running.process import find_at_port

pytest.importorskip("aiohttp")
requests = pytest.importorskip("requests")

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "api-clients.md").read_text(encoding="utf-8")
A1111, CPU = find_ui("a1111"), Machine("a processor", 0, 16)
SIGNS = "!#$%&()*+-./;<=>?@[]^_`{|}~\\"
OWN = Login("owner", (SIGNS * 5)[:128])
LINK = TunnelConfig(kind="cloudflared")


@pytest.fixture(autouse=True)
def _no_password_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTSD_PASSWORD", raising=False)


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An installation whose program is a stub with a login of its own, and a service that leads to the gate."""

    def direct(port: int, config: TunnelConfig) -> Any:
        child = Child([sys.executable, "-c", "import time; time.sleep(600)"])
        return kinds.Running(f"http://127.0.0.1:{port}", child)

    monkeypatch.setitem(kinds.SERVICES, "cloudflared", direct)
    where = {"folder": str(tmp_path / "ui"), "store": str(tmp_path / "store")}
    found = find_places(A1111, **where)
    found.python.parent.mkdir(parents=True)
    found.python.symlink_to(sys.executable)
    found.code.mkdir(parents=True)
    shutil.copy(Path(__file__).with_name("stub_webui.py"), found.code / "launch.py")
    (found.code / "mood").write_text("good")
    guard = use_bare_guard(tmp_path, monkeypatch)
    yield type("Places", (), {"places": found, "where": where, "port": free_port(), "guard": guard})
    stop("a1111", **where)


def start(places: Any, login: Login = OWN, **settings: Any) -> Any:
    config = LaunchConfig(
        port=places.port, user=login.user, password=login.password, wait_s=60, **places.where, **settings
    )
    return launch(config, machine=CPU)


def options(url: str, login: Login | None) -> int:
    """The status of one question to the API, as A1111's clients ask: HTTP basic authentication with every request."""
    auth = (login.user, login.password) if login else None
    try:
        return requests.get(f"{url}/sdapi/v1/options", auth=auth, timeout=30).status_code
    except requests.ConnectionError:
        return 0  # nobody listens


def page(url: str, login: Login) -> int:
    """The status of the UI's own page for a visitor who has typed the login at the gate, and has its cookie alone."""
    with requests.Session() as browser:
        form = {"user": login.user, "password": login.password, "next": "/config"}
        return browser.post(f"{url}/.fastsd/login", data=form, headers={"Origin": url}, timeout=30).status_code


# -------------------------------------------------------------------------------------- one login, however shared


def test_a_tunnel_to_a_running_web_ui_keeps_its_login_and_opens_its_api(places: Any) -> None:
    with start(places) as running:
        assert options(running.url, OWN) == 200
        assert options(running.url, None) == 401
        flags = requests.get(f"{running.url}/sdapi/v1/cmd-flags", auth=(OWN.user, OWN.password), timeout=30)
        assert flags.json()["api_auth"] is None
        assert OWN.password not in flags.text
        with share_port(places.port, LINK) as link:
            assert link.login == OWN
            assert options(link.url, OWN) == 200
            assert page(link.url, OWN) == 200
            assert options(link.url, None) == 401
            assert options(link.url, Login("owner", "another-word-1")) == 401
            flags = requests.get(f"{link.url}/sdapi/v1/cmd-flags", auth=(OWN.user, OWN.password), timeout=30)
            assert flags.status_code == 403, "what administers is closed here as for any link"


@pytest.mark.parametrize("way", ["setting", "environment"])
def test_another_password_for_the_link_is_the_links_and_the_uis_own_is_entered(
    way: str, places: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with start(places):
        if way == "environment":
            monkeypatch.setenv("FASTSD_PASSWORD", "for-the-link-only")
        config = TunnelConfig(kind="cloudflared", password="for-the-link-only" if way == "setting" else None)
        with share_port(places.port, config) as link:
            assert link.login == Login("owner", "for-the-link-only")
            assert options(link.url, link.login) == 200
            assert page(link.url, link.login) == 200
            assert options(link.url, OWN) == 401
        guest = TunnelConfig(kind="cloudflared", user="guest", password="for-the-link-only")
        with share_port(places.port, guest) as link:
            assert link.login == Login("guest", "for-the-link-only")
            assert options(link.url, link.login) == 200


def test_strangers_do_not_get_the_uis_login_entered(places: Any) -> None:
    with start(places), share_port(places.port, TunnelConfig(kind="cloudflared", access="anyone")) as link:
        assert link.login is None
        assert options(link.url, None) == 401
        assert options(link.url, OWN) == 200


def test_what_is_no_web_ui_of_ours_gets_a_login_of_its_own(places: Any) -> None:
    with serve(site_handler) as port:
        assert find_at_port(port) is None
        with share_port(port, LINK) as link:
            assert (link.login.user, len(link.login.password)) == ("fastsd", 19)
            assert requests.get(link.url, auth=(link.login.user, link.login.password), timeout=30).status_code == 200


def test_it_goes_on_after_the_ui_was_started_again_by_itself(places: Any) -> None:
    with start(places, restart=True) as running, share_port(places.port, LINK) as link:
        assert page(link.url, OWN) == 200
        first = running.state.pid
        os.kill(first, signal.SIGKILL)
        until = time.monotonic() + 60
        while running.state.pid == first or not running.alive() or options(running.url, OWN) != 200:
            assert time.monotonic() < until
            time.sleep(0.1)
        found = find_at_port(places.port)
        assert (found[0].pid, found[1]) == (running.state.pid, OWN)
        assert options(link.url, OWN) == 200
        assert page(link.url, OWN) == 200, "the new UI knows no cookie of the old one"


def test_one_in_the_background_of_another_process_is_found_with_its_login(places: Any, tmp_path: Path) -> None:
    words = ["webui", "launch", "--background", "--user", "owner", "--password-file", "-", "--port", str(places.port)]
    words += ["--folder", places.where["folder"], "--store", places.where["store"]]
    code = f"{in_code(places.guard)}import sys; from fastsd_helpers.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, *words]
    done = subprocess.run(
        command,
        input=OWN.password,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env=environment_for("training", this_python=True),
    )
    assert done.returncode == 0, done.stderr
    assert f"Password:  {OWN.password}" in done.stdout
    with share_port(places.port, LINK) as link:
        assert link.login == OWN
        assert options(link.url, OWN) == 200
    assert stop("a1111", **places.where)
    assert find_at_port(places.port) is None


def test_a_login_that_others_could_have_written_or_read_is_not_used(
    places: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with start(places):
        login = places.places.run / "login"
        assert find_at_port(places.port)[1] == OWN
        login.chmod(0o644)
        assert find_at_port(places.port)[1] is None
        assert "is not this user's alone" in caplog.text
        assert OWN.password not in caplog.text
        login.chmod(0o600)
        login.write_text("no colon here")
        assert find_at_port(places.port)[1] is None


def test_a_note_that_is_damaged_leads_nowhere(places: Any) -> None:
    with start(places):
        (note,) = Path(os.environ["XDG_CACHE_HOME"]).glob("fastsd/ports/*.json")
        right = note.read_bytes()
        assert OWN.password.encode() not in right
        assert note.stat().st_mode & 0o777 == 0o600
        values = json.loads(right)
        odd = [{"run": 3}, {"run": "/nowhere"}, {"run": None}, {"pid": "x"}, {"start": "1"}, {"boot": "other"}]
        for content in (b"", b"{", b"[]", b"\xff", *(json.dumps(values | change).encode() for change in odd)):
            note.write_bytes(content)
            assert find_at_port(places.port) is None, content
        note.write_bytes(right)
        note.chmod(0o622)
        assert find_at_port(places.port) is None, "another user could have written it"
        note.chmod(0o600)
        note.write_bytes(right)
        assert find_at_port(places.port)[1] == OWN


def test_the_note_of_a_ui_that_has_ended_is_not_believed(places: Any) -> None:
    with start(places) as running:
        os.kill(running.state.pid, signal.SIGKILL)
        running.wait(10)
        assert find_at_port(places.port) is None


@pytest.mark.parametrize(("setting", "password"), [(None, "from-the-environment"), ("typed-in-the-field", None)])
def test_the_environments_password_is_the_web_uis_unless_another_was_given(
    setting: str | None, password: str | None, places: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTSD_PASSWORD", "from-the-environment")
    config = LaunchConfig(port=places.port, password=setting, wait_s=60, **places.where)
    with launch(config, machine=CPU) as running:
        assert running.login == Login("fastsd", setting or password)
        assert (places.places.run / "login").read_text() == f"fastsd:{setting or password}"
        assert options(running.url, running.login) == 200
        assert "from-the-environment" not in str((Path("/proc") / str(running.state.pid) / "environ").read_bytes())


def test_an_api_that_takes_no_umlauts_is_said_before_the_start(places: Any) -> None:
    with pytest.raises(SettingsError, match="only ASCII characters in user and password"):
        start(places, Login("owner", "wörter-und-so"))
    assert find_at_port(places.port) is None
    with start(places, Login("owner", "wörter-und-so"), api=False) as running:
        form = {"username": "owner", "password": "wörter-und-so"}
        assert requests.post(f"{running.url}/login", data=form, timeout=30).status_code == 200


def test_a_tunnel_to_a_page_of_ours_keeps_its_login_too(
    places: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gradio = pytest.importorskip("gradio")
    # With these Gradio starts Node.js, to which it gives the whole environment.
    node = make_program(tmp_path / "programs", "node", "open(__file__ + '.ran', 'w')\nprint('v24.1.0')")
    monkeypatch.setenv("GRADIO_SSR_MODE", "True")
    monkeypatch.setenv("GRADIO_NODE_PATH", str(node))
    from fastsd_helpers.tunnels.local_page import LocalPage
    from fastsd_helpers.tunnels.ports import read_port

    with gradio.Blocks() as blocks:
        gradio.Interface(lambda text: text[::-1], "text", "text", api_name="turn")
    with LocalPage(blocks, login=OWN) as mine:
        assert requests.get(f"{mine.local_url}config", timeout=30).status_code == 401
        with share_port(mine.port, LINK) as link:
            assert link.login == OWN
            assert page(link.url, OWN) == 200
            assert requests.get(f"{link.url}/config", auth=(OWN.user, OWN.password), timeout=30).status_code == 200
    assert not Path(f"{node}.ran").exists()
    assert read_port(mine.port) is None
    assert not list(Path(os.environ["XDG_CACHE_HOME"]).glob("fastsd/ports/*.json"))


def test_notes_that_killed_processes_left_are_taken_away() -> None:
    from fastsd_helpers.processes import LocalProcess, boot_id
    from fastsd_helpers.tunnels.ports import PortNote, forget_port, note_port, read_port

    dead = subprocess.Popen([sys.executable, "-c", ""])
    who = LocalProcess.of(dead.pid)
    dead.wait()
    note_port(7001, PortNote(LocalProcess(who.pid, who.start or "1"), OWN))
    folder = Path(os.environ["XDG_CACHE_HOME"]) / "fastsd" / "ports"
    for port, boot, age_s in ((7002, "another machine", 60), (7003, "another machine", 8 * 86400)):
        (folder / f"{port}.json").write_text(json.dumps({"pid": 1, "start": "1", "boot": boot}))
        os.utime(folder / f"{port}.json", (time.time() - age_s,) * 2)
    (folder / "7004.json").write_text("no note")
    assert read_port(7001) is None
    note_port(7000, PortNote(LocalProcess.me(), OWN))
    assert sorted(path.stem for path in folder.iterdir()) == ["7000", "7002", "7004"]
    assert read_port(7000) == PortNote(LocalProcess.me(), OWN)
    assert json.loads((folder / "7000.json").read_text())["boot"] == boot_id()
    forget_port(7000)
    forget_port(7002)
    assert sorted(path.stem for path in folder.iterdir()) == ["7002", "7004"], "only one's own is taken away"


# ------------------------------------------------------------------------------------------- programs, as described

PAGE_WITH_LOGIN = """
import sys, gradio
with gradio.Blocks() as blocks:
    gradio.Interface(lambda text: text[::-1], "text", "text", api_name="turn")
auth = tuple(sys.argv[2:]) or None
blocks.launch(server_name="127.0.0.1", server_port=int(sys.argv[1]), auth=auth, quiet=True)
"""


@contextlib.contextmanager
def gradio_page(*login: str) -> Iterator[int]:
    """A real Gradio page in a process of its own."""
    pytest.importorskip("gradio")
    port = free_port()
    environment = environment_for("web UI") | {"GRADIO_ANALYTICS_ENABLED": "False"}
    child = Child([sys.executable, "-c", PAGE_WITH_LOGIN, str(port), *login], env=environment)
    try:
        until = time.monotonic() + 120
        while True:
            assert time.monotonic() < until, child.last_lines()
            assert child.alive(), child.last_lines()
            with contextlib.suppress(requests.RequestException):
                requests.get(f"http://127.0.0.1:{port}/config", timeout=5)
                break
            time.sleep(0.1)
        yield port
    finally:
        child.close()


def snippet(heading: str, language: str) -> str:
    """The block of code below a heading of the page."""
    below = PAGE.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    (found,) = re.findall(rf"```{language}\n(.*?)```", below, re.DOTALL)
    return found


def test_every_block_of_the_page_is_run_here() -> None:
    assert len(re.findall("```[a-z]", PAGE)) == 3


def run(code: str, url: str, password: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "https://YOUR-LINK" in code
    monkeypatch.setenv("FASTSD_PASSWORD", password)
    exec(compile(code.replace("https://YOUR-LINK", url), "docs/api-clients.md", "exec"), {})


def test_requests_draws_through_the_link_as_described(places: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with start(places, Login("fastsd", OWN.password)), share_port(places.port, LINK) as link:
        code = snippet("AUTOMATIC1111 and Forge, with requests", "python")
        run(code, link.url, OWN.password, monkeypatch)
        assert Path("fox.png").read_bytes() == b"a picture"
        with pytest.raises(requests.HTTPError, match="401"):
            run(code, link.url, "another-word-1", monkeypatch)


def test_a_session_that_asks_often_is_never_refused(places: Any) -> None:
    with start(places), share_port(places.port, LINK) as link, requests.Session() as session:
        session.auth = (OWN.user, OWN.password)
        for number in range(60):
            answer = session.post(f"{link.url}/sdapi/v1/txt2img", json={"seed": number}, timeout=30)
            assert answer.json()["parameters"] == {"seed": number}


def test_curl_asks_through_the_link_as_described(places: Any) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed (apt install curl)")
    with start(places, Login("fastsd", "plain-word-77")), share_port(places.port, LINK) as link:
        code = snippet("AUTOMATIC1111 and Forge, with curl", "sh").replace("https://YOUR-LINK", link.url)
        environment = environment_for("program") | {"FASTSD_PASSWORD": "plain-word-77", "NO_PROXY": "*"}
        done = subprocess.run(
            ["sh", "-c", code], capture_output=True, text=True, env=environment, check=False, timeout=60
        )
        assert json.loads(done.stdout) == {"sd_model_checkpoint": "small.safetensors"}, done.stderr


@pytest.mark.parametrize("own", [(), ("someone", "else-entirely-7")], ids=["page without login", "page with its own"])
def test_gradio_client_uses_the_link_as_described(
    own: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    client = pytest.importorskip("gradio_client")
    login = Login("fastsd", OWN.password)
    with (
        gradio_page(*own) as port,
        open_gate(port, login, upstream_login=Login(*own) if own else None) as gate,
    ):
        run(snippet("Playground, handwriting page and other Gradio pages, with gradio_client", "python"), gate.url,
            OWN.password, monkeypatch)  # fmt: skip
        assert capsys.readouterr().out.strip() == "cba"
        basic = base64.b64encode(f"fastsd:{OWN.password}".encode()).decode()
        by_header = client.Client(gate.url, headers={"Authorization": f"Basic {basic}"}, verbose=False)
        assert by_header.predict("xyz", api_name="/turn") == "zyx"
        for wrong in (("fastsd", "another-word-1"), ("other", OWN.password)):
            with pytest.raises(Exception, match=r"[Cc]redentials|[Ll]ogin"):
                client.Client(gate.url, auth=wrong, verbose=False)


# ------------------------------------------------------------------------------------------ a link in the background


def test_who_holds_a_link_in_the_background_has_no_secret_that_others_can_read(
    places: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastsd_helpers.webui import share_in_background

    body = LT + "say(f'your url is: http://127.0.0.1:{forward(target)}'); stay()"
    make_program(tmp_path / "programs", "lt", body)
    monkeypatch.setenv("PATH", f"{tmp_path / 'programs'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("NGROK_AUTHTOKEN", "2secretngroktoken_A1b2C3d4E5")
    with start(places) as running:
        config = TunnelConfig(kind="localtunnel", localtunnel_server="http://127.0.0.1:9", wait_s=30)
        link = share_in_background(running, config)
        assert link.login == OWN, "one login for the web UI and its link"
        assert options(link.url, OWN) == 200
        holders = {link.pid: "", **children_of(link.pid)}
        assert len(holders) >= 3, "the holder, the guard of its program, and the program"
        for pid, line in holders.items():
            check_environ(environ_of(pid), "tunnel")
            assert OWN.password not in line + str(environ_of(pid))
            assert "2secretngrok" not in line + str(environ_of(pid))
        for path in places.places.run.iterdir():
            assert path.name == "login" or OWN.password.encode() not in path.read_bytes()
