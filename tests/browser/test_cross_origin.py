"""In a real Chromium: whatever a page of another origin makes it send, only the link's own page acts.

The visitor is logged in at three links. Pages of a sibling on the same share service, of another site, of another port,
and of no origin (a sandbox, an address with the page in it) then try every way in which a browser sends something.
"""

import base64
import threading
import time
from typing import Any

import pytest
from tunnel_doubles import serve

from browser.origins import ATTACKERS, KINDS, Record, World, open_world
from fastsd_helpers.tunnels.closed import A1111_CLOSED, COMFYUI_CLOSED, GRADIO_CLOSED
from fastsd_helpers.tunnels.gate.login import Login
from fastsd_helpers.tunnels.gate.server import open_gate

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

LOGIN = Login("me", "a long password of 24 signs")

# What each server behind has for a post, an upload, a socket, a stream and a page.
SERVERS = {
    "gradio3": ("/run/predict", "/upload", "/queue/join", "/queue/status", "/config"),
    "gradio6": (
        *("/gradio_api/queue/join", "/gradio_api/upload", "/gradio_api/queue/join"),
        *("/gradio_api/queue/data", "/config"),
    ),
    "comfyui": ("/api/prompt", "/api/upload/image", "/ws", "/api/events", "/api/object_info"),
}


def double(record: Record) -> Any:
    """A server that does whatever it is asked, and lets every origin read it, as Gradio 3 does."""

    async def handle(request: Any) -> Any:
        from aiohttp import web

        origin = request.headers.get("Origin", "*")
        headers = {
            "Access-Control-Allow-Origin": origin,
            "Access-Control-Allow-Credentials": "true",
            "Access-Control-Allow-Methods": "GET, POST, PUT, DELETE",
            "Access-Control-Allow-Headers": "Content-Type",
        }
        if request.method == "OPTIONS":
            return web.Response(headers=headers)
        record.note(request.query_string)
        if "Upgrade" in request.headers:
            socket = web.WebSocketResponse()
            await socket.prepare(request)
            async for message in socket:
                await socket.send_str(f"secret {message.data}")
            return socket
        if request.path.endswith(("/status", "/events")):
            return web.Response(text="data: secret\n\n", headers=headers | {"Content-Type": "text/event-stream"})
        await request.read()
        return web.Response(text="<title>behind</title>secret", content_type="text/html", headers=headers)

    return handle


def run_gradio(record: Record) -> tuple[int, Any]:
    """The real Gradio, with one function; gives its port and its server."""
    gradio = pytest.importorskip("gradio")
    uvicorn = pytest.importorskip("uvicorn")
    from fastapi import FastAPI

    def shout(text: str) -> str:
        return text.upper()

    app = gradio.mount_gradio_app(FastAPI(), gradio.Interface(shout, "text", "text", title="behind"), path="/")

    async def recorder(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] in ("http", "websocket") and scope.get("method") != "OPTIONS":
            record.note(scope["query_string"].decode())
        await app(scope, receive, send)

    server = uvicorn.Server(uvicorn.Config(recorder, host="127.0.0.1", port=0, log_level="critical"))
    threading.Thread(target=server.run, daemon=True).start()
    end = time.monotonic() + 60
    while not server.started and time.monotonic() < end:
        time.sleep(0.05)
    return server.servers[0].sockets[0].getsockname()[1], server


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    record = Record()
    gradio_port, gradio_server = run_gradio(record)
    with (
        serve(double(record)) as behind,
        open_gate(behind, LOGIN, closed=A1111_CLOSED) as gate3,
        open_gate(gradio_port, LOGIN, closed=GRADIO_CLOSED) as gate6,
        open_gate(behind, LOGIN, closed=COMFYUI_CLOSED) as comfyui,
    ):
        gates = {"gradio3": gate3, "gradio6": gate6, "comfyui": comfyui}
        for name, gate in gates.items():
            gate.set_public_url(f"https://{name}.gradio.live")
        ports = {name: gate.port for name, gate in gates.items()} | {"open": behind}
        with open_world(tmp_path_factory.mktemp("front"), ports, record) as one:
            for name in SERVERS:
                one.log_in(name, LOGIN)
            yield one
    gradio_server.should_exit = True


def test_the_links_cookie_belongs_to_this_host_and_https_only(world):
    for server in SERVERS:
        cookies = [one for one in world.context.cookies(world.link(server)) if one["name"].startswith("__Host-")]
        assert len(cookies) == 1, server
        assert cookies[0]["secure"]
        assert cookies[0]["httpOnly"]
        assert cookies[0]["domain"] == f"{server}.gradio.live"


@pytest.mark.parametrize("server", SERVERS)
def test_the_links_own_page_acts_in_every_way(world, server):
    arrived, seen = world.attack("same origin", world.link(server), SERVERS[server], server)
    assert arrived == KINDS
    assert seen["fetch-get"].startswith("basic 200")
    if server != "gradio6":  # which has no sockets, and no stream for somebody without a session
        assert seen["socket"] == "read secret hello"
        assert seen["events"] == "read secret"


def test_a_page_of_gradio_works_by_hand_with_the_headers_it_gets(world):
    said = []
    world.page.on("console", lambda message: said.append(message.text))
    world.page.goto(f"{world.link('gradio6')}/")
    world.page.get_by_label("text").fill("quiet")
    world.page.get_by_role("button", name="Submit").click()
    world.page.wait_for_function("[...document.querySelectorAll('textarea')].some(one => one.value === 'QUIET')")
    assert not [text for text in said if "Content Security Policy" in text or "MIME type" in text]


@pytest.mark.parametrize("attacker", ATTACKERS)
def test_without_the_gate_every_page_would_act(world, attacker):
    # So what holds below is the gate's doing, and not that these pages send nothing.
    arrived, seen = world.attack(attacker, "https://open.gradio.live", SERVERS["gradio3"], "gradio3")
    assert arrived == KINDS
    assert seen["socket"] == "read secret hello"
    assert seen["events"] == "read secret"


@pytest.mark.parametrize("attacker", ATTACKERS)
@pytest.mark.parametrize("server", SERVERS)
def test_a_page_of_another_origin_does_nothing_and_reads_nothing(world, server, attacker):
    arrived, seen = world.attack(attacker, world.link(server), SERVERS[server], server)
    assert arrived == set()
    assert not [kind for kind, text in seen.items() if text.startswith(("read", "basic", "cors"))], seen
    assert seen["image"] == "refused"
    assert seen["script"] == "refused"
    assert world.logged_in(server)


FOLLOW = "address => { location.href = address; }"
LEAVE = """
([address, fields]) => {
  const form = document.createElement("form");
  Object.assign(form, {method: "POST", action: address});
  for (const [name, value] of fields)
    form.append(Object.assign(document.createElement("input"), {name, value}));
  document.body.append(form);
  form.submit();
}
"""


@pytest.mark.parametrize("attacker", ["sibling", "other site", "other port", "plain http", "data page"])
def test_a_link_that_is_followed_opens_the_page_and_a_form_that_leads_there_does_not(world, attacker):
    for server in SERVERS:
        page = world.attacker(attacker, server)
        with page.expect_navigation():
            page.evaluate(
                "address => { location.href = address; }", f"{world.link(server)}/?mark=follow&kind={attacker}"
            )
        page.wait_for_function("document.title.includes('behind')")
        assert attacker in world.record.of("follow")
        page = world.attacker(attacker, server)
        mark = f"top-{attacker}-{server}".replace(" ", "-")
        with page.expect_navigation() as moved:
            page.evaluate(LEAVE, [f"{world.link(server)}{SERVERS[server][0]}?mark={mark}&kind=top", [["data", "[]"]]])
        # Without the cookie (another site) the login page or a refusal; with it the refusal.
        assert moved.value.status in (303, 401, 403)
        assert world.record.of(mark) == set()


@pytest.mark.parametrize("attacker", ["sibling", "other site", "other port", "plain http", "data page"])
def test_nobody_is_logged_out_or_in_by_a_page_of_another_origin(world, attacker):
    page = world.attacker(attacker, "gradio3")
    with page.expect_navigation() as moved:
        page.evaluate(LEAVE, [f"{world.link('gradio3')}/.fastsd/logout", [["a", "b"]]])
    assert moved.value.status == 403
    page = world.attacker(attacker, "gradio3")
    with page.expect_navigation():
        page.evaluate(FOLLOW, f"{world.link('gradio3')}/.fastsd/logout")
    assert world.logged_in("gradio3")
    fields = [["user", LOGIN.user], ["password", LOGIN.password], ["next", "/"]]
    stranger = world.context.browser.new_context(ignore_https_errors=True)
    page = World(stranger, world.record, world.front).attacker(attacker, "gradio3")
    with page.expect_navigation() as moved:
        page.evaluate(LEAVE, [f"{world.link('gradio3')}/.fastsd/login", fields])
    assert moved.value.status == 403
    assert stranger.cookies(world.link("gradio3")) == []
    stranger.close()


@pytest.mark.parametrize("server", SERVERS)
def test_a_program_acts_with_a_password_in_a_header_or_a_cookie(world, server):
    post = SERVERS[server][0]
    basic = {"Authorization": f"Basic {base64.b64encode(f'{LOGIN.user}:{LOGIN.password}'.encode()).decode()}"}
    for name, headers in (("basic", basic), ("cookie", world.cookie(server))):
        world.ask(server, "POST", f"{post}?mark=program-{server}&kind={name}", headers)
    assert world.ask(server, "POST", f"{post}?mark=program-{server}&kind=nobody", {}) == 401
    # A program may also say where it comes from, but then it must be the link.
    for origin in (
        "null",
        "https://evil.gradio.live",
        f"{world.link(server)}:8443",
        f"{world.link(server)}.evil.example",
    ):
        status = world.ask(server, "POST", f"{post}?mark=program-{server}&kind=foreign", basic | {"Origin": origin})
        assert status == 403, origin
    assert world.record.of(f"program-{server}") == {"basic", "cookie"}


def test_a_page_that_a_visitor_has_put_there_is_no_page_of_the_link(world):
    # The double answers with HTML at every path; an svg or html file of a visitor is such an answer.
    for server, path in (("gradio3", "/file=/tmp/gradio/a/evil.html"), ("comfyui", "/api/view?filename=evil.html")):
        page = world.page
        with page.expect_download() as download:
            page.evaluate(FOLLOW, world.link(server) + path)
        assert download.value.suggested_filename


def test_what_the_page_loads_from_elsewhere_does_not_name_the_link(world):
    for host, named in (("open", "https://open.gradio.live/"), ("gradio3", None)):
        world.page.goto(f"https://{host}.gradio.live/config")
        address = f"https://cdn.example.com/from-{host}"
        world.page.evaluate("address => fetch(address, {mode: 'no-cors'}).then(() => 1, () => 0)", address)
        assert world.record.referrers[f"/from-{host}"] == named
