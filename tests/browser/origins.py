"""Pages of other origins in a real Chromium that try every way in which a browser sends something to a link."""

import contextlib
import http.client
import ssl
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest
from tunnel_doubles import serve

from browser.front import open_front
from browser.lab import find_chromium
from fastsd_helpers.tunnels.gate.login import Login

__all__ = ["ATTACKERS", "KINDS", "Record", "World", "open_world"]

ATTACKERS = ["sibling", "other site", "other port", "plain http", "sandbox", "data page"]
KINDS = {
    *("form", "form-plain", "form-multipart", "fetch-plain", "fetch-json", "fetch-put", "fetch-delete", "upload"),
    *("beacon", "socket", "events", "fetch-get", "image", "script", "frame"),
}

# Sends one request of each kind, and tells of each what the page got to see.
ATTACK = """
async ([base, [post, upload, socket, stream, page], mark]) => {
  const url = (path, kind) => `${base}${path}?mark=${mark}&kind=${kind}`;
  const within = (promise) => Promise.race([
    promise.catch(() => "failed"), new Promise(done => setTimeout(() => done("no answer"), 8000))]);
  const ask = async (path, kind, options) => {
    const answer = await fetch(url(path, kind), {credentials: "include", ...options});
    return `${answer.type} ${answer.status} ${(await answer.text()).length}`;
  };
  const form = (kind, enctype) => new Promise(done => {
    const frame = document.createElement("iframe");
    frame.name = `${kind}-${mark}`;
    document.body.append(frame);
    const form = document.createElement("form");
    Object.assign(form, {method: "POST", action: url(post, kind), enctype, target: frame.name});
    form.append(Object.assign(document.createElement("input"), {name: "data", value: "[]"}));
    document.body.append(form);
    frame.onload = () => done("loaded");
    form.submit();
  });
  const element = (tag, kind) => new Promise(done => {
    const one = document.createElement(tag);
    one.onload = () => done("loaded");
    one.onerror = () => done("refused");
    one.src = url(page, kind);
    document.body.append(one);
  });
  const talk = () => new Promise(done => {
    const one = new WebSocket(url(socket, "socket").replace("http", "ws"));
    one.onopen = () => one.send("hello");
    one.onmessage = (message) => done(`read ${message.data}`);
    one.onerror = one.onclose = () => done("refused");
  });
  const listen = () => new Promise(done => {
    const one = new EventSource(url(stream, "events"), {withCredentials: true});
    one.onmessage = (message) => { one.close(); done(`read ${message.data}`); };
    one.onerror = () => { one.close(); done("refused"); };
  });
  const file = new FormData();
  file.append("files", new File(["x"], "a.png"));
  const json = {"Content-Type": "application/json"};
  const tries = {
    "form": form("form", "application/x-www-form-urlencoded"),
    "form-plain": form("form-plain", "text/plain"),
    "form-multipart": form("form-multipart", "multipart/form-data"),
    "fetch-plain": ask(post, "fetch-plain", {method: "POST", mode: "no-cors", body: '{"data": []}'}),
    "fetch-json": ask(post, "fetch-json", {method: "POST", headers: json, body: '{"data": []}'}),
    "fetch-put": ask(post, "fetch-put", {method: "PUT", body: "x"}),
    "fetch-delete": ask(post, "fetch-delete", {method: "DELETE"}),
    "upload": ask(upload, "upload", {method: "POST", mode: "no-cors", body: file}),
    "beacon": Promise.resolve(String(navigator.sendBeacon(url(post, "beacon"), "x"))),
    "socket": talk(),
    "events": listen(),
    "fetch-get": ask(page, "fetch-get", {}),
    "image": element("img", "image"),
    "script": element("script", "script"),
    "frame": element("iframe", "frame"),
  };
  const seen = {};
  for (const [kind, promise] of Object.entries(tries)) seen[kind] = await within(promise);
  return seen;
}
"""


class Record:
    """What reached the servers behind: the kinds of requests, by the mark of the attack."""

    def __init__(self) -> None:
        self._seen: dict[str, set[str]] = {}
        self.referrers: dict[str, str | None] = {}  # what pages of others were told, by their path

    def note(self, query: str) -> None:
        values = parse_qs(query)
        if "mark" in values and "kind" in values:
            self._seen.setdefault(values["mark"][0], set()).add(values["kind"][0])

    def of(self, mark: str) -> set[str]:
        return self._seen.get(mark, set())


class World:
    """The browser of a visitor, and pages of others in it."""

    def __init__(self, context: Any, record: Record, front: int) -> None:
        self.context, self.record, self.front = context, record, front
        self.page = context.new_page()
        self.marks = 0

    def link(self, server: str) -> str:
        return f"https://{server}.gradio.live"

    def attacker(self, name: str, server: str) -> Any:
        """A page, or a frame in one, of that origin."""
        page = self.page
        if name == "data page":
            page.goto("data:text/html,<body>page of no origin")
            return page
        host = {
            "same origin": self.link(server),
            "sibling": "https://evil.gradio.live",
            "other site": "https://evil.example.com",
            "other port": f"{self.link(server)}:8443",
            "plain http": f"http://{server}.gradio.live",
            "sandbox": "https://evil.gradio.live",
        }[name]
        page.goto(f"{host}/config" if name == "same origin" else f"{host}/")
        if name != "sandbox":
            return page
        page.set_content('<iframe sandbox="allow-scripts allow-forms allow-popups" srcdoc="<body>a"></iframe>')
        frame = page.frames[1]
        frame.wait_for_selector("body")
        return frame

    def attack(self, name: str, target: str, paths: tuple[str, ...], server: str) -> tuple[set[str], dict[str, str]]:
        """Send everything from a page of that origin; gives what arrived, and what the page saw."""
        self.marks += 1
        mark = f"m{self.marks}"
        place = self.attacker(name, server)
        seen = place.evaluate(ATTACK, [target, list(paths), mark])
        end = time.monotonic() + 0.25  # a beacon tells nobody when it has arrived
        while time.monotonic() < end and self.record.of(mark) != KINDS:
            time.sleep(0.02)
        return self.record.of(mark), seen

    def cookie(self, server: str) -> dict[str, str]:
        cookies = self.context.cookies(self.link(server))
        return {"Cookie": "; ".join(f"{one['name']}={one['value']}" for one in cookies)}

    def ask(self, server: str, method: str, path: str, headers: dict[str, str]) -> int:
        """Ask as a program does, which is no browser; gives the status."""
        tls = ssl.create_default_context()
        tls.check_hostname, tls.verify_mode = False, ssl.CERT_NONE
        connection = http.client.HTTPSConnection("127.0.0.1", self.front, context=tls, timeout=30)
        try:
            connection.request(method, path, body="{}", headers={"Host": f"{server}.gradio.live", **headers})
            return connection.getresponse().status
        finally:
            connection.close()

    def logged_in(self, server: str) -> bool:
        return self.ask(server, "GET", "/config", self.cookie(server)) == 200

    def log_in(self, server: str, login: Login) -> None:
        """Log in at a link's own page, as a person does; the page behind is titled "behind"."""
        self.page.goto(f"{self.link(server)}/")
        self.page.locator("input[name=user]").fill(login.user)
        self.page.locator("input[name=password]").fill(login.password)
        self.page.locator("button").click()
        self.page.wait_for_function("document.title.includes('behind')")


@contextlib.contextmanager
def open_world(folder: Path, ports: Mapping[str, int], record: Record) -> Iterator[World]:
    """Start Chromium, where NAME.gradio.live is a port of this machine and all other names are pages of others.

    Skips the test where Chromium or Playwright is not found.
    """
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed (pip install playwright)"
    )
    chromium = find_chromium()
    if chromium is None:
        pytest.skip("Chromium is not installed (apt install chromium)")

    async def elsewhere(request: Any) -> Any:
        from aiohttp import web

        record.referrers[request.path] = request.headers.get("Referer")
        return web.Response(text="<!doctype html><title>elsewhere</title><body>", content_type="text/html")

    hosts = {f"{name}.gradio.live": port for name, port in ports.items()}
    with (
        serve(elsewhere) as other,
        open_front(folder, hosts, other) as front,
        playwright.sync_playwright() as engine,
    ):
        browser = engine.chromium.launch(
            executable_path=chromium,
            args=[
                *("--no-sandbox", "--disable-gpu", "--ignore-certificate-errors"),
                # Names outside this machine all lead here; http of them to where pages of others are.
                f"--host-resolver-rules=MAP *:80 127.0.0.1:{other}, MAP * 127.0.0.1:{front}",
                # A browser may refuse to ask this machine for a page of elsewhere: here all of it is this machine.
                "--disable-features=LocalNetworkAccessChecks,HttpsUpgrades,HttpsFirstBalancedModeAutoEnable",
            ],
        )
        context = browser.new_context(ignore_https_errors=True)
        context.set_default_timeout(60_000)
        yield World(context, record, front)
        browser.close()
