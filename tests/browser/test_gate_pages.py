"""Who acts at the login gate, in a real Chromium: only the link's own page, whatever another page tries.

A local TLS front stands for the share service, so that the cookie is the one for https. The site behind answers on the
routes of Gradio 3, of our own page and of a ComfyUI-like one, and keeps what has reached it.
"""

import asyncio
import contextlib
import shutil
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .lab import find_chromium

pytest.importorskip("aiohttp")

from tunnel_doubles import serve

from fastsd_helpers.tunnels import Login, open_gate

pytestmark = pytest.mark.slow

LOGIN = Login("fastsd", "right-password-1")

# Everything a page can try, each as a script that ends when the browser has its answer or its refusal.
ACTIONS = {
    "form": """(url) => new Promise(done => {
        const frame = document.createElement("iframe"); frame.name = "target"; document.body.append(frame);
        const form = document.createElement("form"); form.method = "post"; form.target = "target";
        form.action = url + "/run/predict"; form.enctype = "text/plain";
        frame.onload = () => done(); document.body.append(form); form.submit(); setTimeout(done, 1500); })""",
    "fetch": """(url) => fetch(url + "/prompt", {method: "POST", credentials: "include", mode: "no-cors",
        headers: {"Content-Type": "text/plain"}, body: "{}"}).catch(() => 0)""",
    "multipart": """(url) => { const data = new FormData(); data.append("files", new Blob(["x"]), "a.txt");
        return fetch(url + "/upload", {method: "POST", credentials: "include", mode: "no-cors", body: data})
        .catch(() => 0) }""",
    "socket": """(url) => new Promise(done => { const one = new WebSocket(url.replace("https", "wss") + "/queue/join");
        one.onopen = () => { one.send("run"); setTimeout(done, 300) }; one.onerror = one.onclose = done })""",
    "events": """(url) => new Promise(done => {
        const one = new EventSource(url + "/queue/data", {withCredentials: true});
        one.onmessage = one.onerror = () => { one.close(); done() } })""",
    "picture": """(url) => new Promise(done => { const one = new Image(); one.onload = one.onerror = () => done();
        one.src = url + "/view?act=1" })""",
    "frame": """(url) => new Promise(done => { const one = document.createElement("iframe");
        one.onload = () => done(); one.src = url + "/ws-page"; document.body.append(one); setTimeout(done, 1500) })""",
    "logout": """(url) => fetch(url + "/.fastsd/logout", {method: "POST", credentials: "include", mode: "no-cors"})
        .catch(() => 0)""",
}
REACHES = {
    "form": "POST /run/predict",
    "fetch": "POST /prompt",
    "multipart": "POST /upload",
    "socket": "SOCKET /queue/join",
    "events": "GET /queue/data",
    "picture": "GET /view",
    "frame": "GET /ws-page",
}


class Site:
    """The server behind the gate: it answers everything, and keeps what has reached it."""

    def __init__(self) -> None:
        self.reached: list[str] = []

    async def handle(self, request: Any) -> Any:
        from aiohttp import web

        if request.headers.get("Upgrade"):
            socket = web.WebSocketResponse()
            await socket.prepare(request)
            async for _message in socket:
                self.reached.append(f"SOCKET {request.path}")
            return socket
        self.reached.append(f"{request.method} {request.path}")
        if request.path == "/queue/data":
            return web.Response(text="data: 1\n\n", content_type="text/event-stream")
        return web.Response(text="<h1>inside</h1>", content_type="text/html")


async def foreign_page(_request: Any) -> Any:
    """What another site shows: an empty page, and below it one in a sandbox, whose origin is null."""
    from aiohttp import web

    page = '<h1>elsewhere</h1><iframe sandbox="allow-scripts allow-forms" srcdoc="<p>null</p>"></iframe>'
    return web.Response(text=page, content_type="text/html")


@contextlib.contextmanager
def tls_front(target: int, context: ssl.SSLContext) -> Iterator[int]:
    """A port that speaks TLS and pipes to another one of this machine."""
    loop, started, box = asyncio.new_event_loop(), threading.Event(), {}

    async def pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while part := await reader.read(65536):
                writer.write(part)
                await writer.drain()
        writer.close()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", target)
        await asyncio.gather(pipe(reader, back), pipe(there, writer))

    async def run() -> None:
        server = await asyncio.start_server(talk, "127.0.0.1", 0, ssl=context)
        box["port"], box["stop"] = server.sockets[0].getsockname()[1], asyncio.Event()
        started.set()
        await box["stop"].wait()
        server.close()

    def work() -> None:
        loop.set_exception_handler(lambda *_: None)  # browsers leave in the middle of things
        loop.run_until_complete(run())

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    assert started.wait(10)
    try:
        yield box["port"]
    finally:
        loop.call_soon_threadsafe(box["stop"].set)
        thread.join(10)


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> ssl.SSLContext:
    if shutil.which("openssl") is None:
        pytest.skip("no openssl on this machine")
    folder: Path = tmp_path_factory.mktemp("tls")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=link.share.test"]
    subprocess.run(
        [*command, "-keyout", folder / "key.pem", "-out", folder / "cert.pem"], check=True, capture_output=True
    )
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    made.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    return made


@pytest.fixture(scope="module")
def world(context: ssl.SSLContext) -> Iterator[Any]:
    """(site, browser, address of the link, port of the foreign pages)."""
    playwright = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
    chromium = find_chromium()
    if chromium is None:
        pytest.skip("no Chromium on this machine")
    site = Site()
    with (
        serve(site.handle) as behind,
        open_gate(behind, LOGIN) as gate,
        serve(foreign_page) as pages,
        tls_front(gate.port, context) as link_port,
        tls_front(pages, context) as page_port,
        playwright.sync_playwright() as engine,
    ):
        link = f"https://link.share.test:{link_port}"
        gate.set_public_url(link)
        words = ["--no-sandbox", "--disable-gpu", "--ignore-certificate-errors"]
        words.append("--host-resolver-rules=MAP *.test 127.0.0.1")
        browser = engine.chromium.launch(executable_path=chromium, args=words)
        try:
            yield site, browser, link, page_port
        finally:
            browser.close()


def visitor(world: Any) -> Any:
    """A browser window of somebody who has logged in with the form."""
    _site, browser, link, _ = world
    window = browser.new_context(ignore_https_errors=True)
    page = window.new_page()
    page.set_default_timeout(60_000)
    page.goto(f"{link}/start")
    page.fill("#user", LOGIN.user)
    page.fill("#password", LOGIN.password)
    page.click("button")
    page.wait_for_selector("h1:text-is('inside')")
    assert page.url == f"{link}/start"
    cookie = next(one for one in window.cookies() if "fastsd" in one["name"])
    assert (cookie["name"], cookie["secure"], cookie["httpOnly"]) == ("__Host-fastsd_gate", True, True)
    return window, page


def still_in(page: Any, link: str) -> bool:
    page.goto(f"{link}/start")
    return page.locator("h1").first.inner_text() == "inside"


def test_the_own_page_does_everything(world: Any) -> None:
    site, _browser, link, _ = world
    window, page = visitor(world)
    for name, script in ACTIONS.items():
        site.reached.clear()
        page.goto(f"{link}/start")
        page.evaluate(script, link)
        assert name == "logout" or REACHES[name] in site.reached, name
    assert not still_in(page, link), "it has logged out"
    window.close()


@pytest.mark.parametrize("place", ["sibling", "other site", "other port", "null"])
def test_a_page_of_somewhere_else_reaches_nothing_but_by_a_link_that_is_followed(world: Any, place: str) -> None:
    site, _browser, link, port = world
    window, page = visitor(world)
    host = {"other site": "evil.example.test", "other port": "link.share.test"}.get(place, "evil.share.test")
    for name, script in ACTIONS.items():
        page.goto(f"https://{host}:{port}/")
        site.reached.clear()
        where = page.frames[1] if place == "null" else page
        assert where.evaluate("() => window.origin") == ("null" if place == "null" else f"https://{host}:{port}")
        where.evaluate(script, link)
        assert site.reached == [], name
    assert still_in(page, link), "nobody was logged out"
    page.goto(f"https://{host}:{port}/")
    page.evaluate(
        "(url) => { const a = document.createElement('a'); a.href = url; document.body.append(a); a.click() }", link
    )
    page.wait_for_selector("h1:text-is('inside')")
    window.close()


def test_a_page_of_somewhere_else_logs_nobody_in(world: Any) -> None:
    _site, browser, link, port = world
    window = browser.new_context(ignore_https_errors=True)
    page = window.new_page()
    page.goto(f"https://evil.share.test:{port}/")
    page.evaluate(
        """([url, password]) => fetch(url + "/.fastsd/login", {method: "POST", credentials: "include", mode: "no-cors",
        headers: {"Content-Type": "application/x-www-form-urlencoded"}, body: "user=fastsd&password=" + password})
        .catch(() => 0)""",
        [link, LOGIN.password],
    )
    assert [one for one in window.cookies() if "fastsd" in one["name"]] == []
    window.close()


def test_a_neighbours_cookie_for_the_whole_service_locks_nobody_out(world: Any) -> None:
    _site, _browser, link, port = world
    window, page = visitor(world)
    page.goto(f"https://evil.share.test:{port}/")
    page.evaluate(
        """() => { for (const name of ["fastsd_gate", "__Host-fastsd_gate"])
        document.cookie = name + "=neighbour; Domain=share.test; Path=/; Secure" }"""
    )
    assert still_in(page, link)
    window.close()
