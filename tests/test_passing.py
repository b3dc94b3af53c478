"""What may pass the gate: closed paths in every spelling, honest requests untouched, headers of answers."""

import asyncio
import contextlib
import http.client
import os
import random
import threading
import time
from urllib.parse import quote

import pytest
from multidict import CIMultiDict

from fastsd_helpers.tunnels.closed import A1111_CLOSED, COMFYUI_CLOSED, GRADIO_CLOSED, UNKNOWN_CLOSED
from fastsd_helpers.tunnels.gate.passing import ClosedPath, answer_headers, refusal
from fastsd_helpers.webui import uis

HASH = "ab" * 20


def spellings(path):
    """One path as others have tried to get it past lists: encoded, doubled, with something before or behind it."""
    name, query = path.partition("?")[::2]
    tail = f"?{query}" if query else ""
    once = "".join(f"%{ord(sign):02x}" if sign not in "/=" else sign for sign in name)
    yield path
    yield name + "/" + tail
    yield name.upper() + tail
    yield once + tail
    yield once.upper().replace("/", "//") + tail
    yield quote(once, safe="/=") + tail
    yield quote(quote(quote(once, safe="/="), safe="/="), safe="/=") + tail
    yield "/" + quote(name, safe="") + tail
    yield name.replace("/", "//") + tail
    yield name.replace("/", "/./") + tail
    yield name.replace("/", "%5c", 1) + tail if name.startswith("%") else "/" + quote("\\", safe="") + name[1:] + tail
    yield name + ";a=b" + tail
    yield name + "%20" + tail
    yield name + "." + tail
    yield name + "?x=1"
    for mount in ("/api", "/gradio_api", "/some/root", "/api/api"):
        yield mount + path
    yield "".join(chr(ord(sign) + 0xFEE0) if sign.isalpha() else sign for sign in name) + tail


A1111_REFUSED = [
    ("GET", "/file=http://127.0.0.1:8188/x"),
    ("HEAD", "/file=https://example.com/"),
    ("GET", "/file=ftp://example.com/"),
    ("GET", "/file/http://127.0.0.1/"),
    ("GET", "/proxy=http://127.0.0.1/"),
    ("GET", "/docs"),
    ("GET", "/docs/oauth2-redirect"),
    ("GET", "/redoc"),
    ("GET", "/openapi.json"),
    ("GET", "/internal/sysinfo"),
    ("GET", "/internal/sysinfo-download"),
    ("GET", "/internal/profile-startup"),
    ("POST", "/sdapi/v1/options"),
    ("PUT", "/sdapi/v1/options"),
    ("POST", "/sdapi/v1/train/embedding"),
    ("POST", "/sdapi/v1/train/hypernetwork"),
    ("POST", "/sdapi/v1/create/embedding"),
    ("POST", "/sdapi/v1/create/hypernetwork"),
    ("POST", "/sdapi/v1/server-kill"),
    ("POST", "/sdapi/v1/server-restart"),
    ("POST", "/sdapi/v1/server-stop"),
    ("GET", "/sdapi/v1/cmd-flags"),
    ("GET", "/sdapi/v1/extensions"),
    ("POST", "/sdapi/v1/unload-checkpoint"),
    ("POST", "/sdapi/v1/reload-checkpoint"),
    ("GET", "/monitoring"),
    ("GET", "/monitoring/summary"),
    ("GET", "/logout"),
    ("GET", "/token"),
]
COMFYUI_REFUSED = [
    ("GET", "/internal/logs"),
    ("GET", "/internal/logs/raw"),
    ("PATCH", "/internal/logs/subscribe"),
    ("GET", "/internal/folder_paths"),
    ("GET", "/internal/files/output"),
    ("GET", "/manager/reboot"),
    ("POST", "/manager/queue/install"),
    ("POST", "/customnode/install/git_url"),
    ("POST", "/customnode/install/pip"),
    ("POST", "/snapshot/restore"),
    ("GET", "/externalmodel/getlist?mode=x"),
    ("POST", "/v2/manager/queue/task"),
    ("POST", "/v2/customnode/install/git_url"),
    ("POST", "/v2/snapshot/save"),
    ("POST", "/v2/comfyui_manager/comfyui_switch_version"),
    ("POST", "/users"),
    ("POST", "/userdata/user.css"),
    ("POST", "/userdata/a.css/move/user.css"),
]


@pytest.mark.parametrize(
    ("closed", "method", "path"),
    [(A1111_CLOSED, *row) for row in A1111_REFUSED] + [(COMFYUI_CLOSED, *row) for row in COMFYUI_REFUSED],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_closed_path_is_closed_however_it_is_spelled(closed, method, path):
    passed = [spelling for spelling in spellings(path) if refusal(method, spelling, closed) is None]
    assert passed == []
    assert refusal(method.lower(), path, closed) is not None  # clients put methods in capitals themselves


def test_the_visitor_is_told_why_in_one_sentence():
    text = refusal("GET", "/file=http://127.0.0.1/", A1111_CLOSED)
    assert text == "Closed on this link, since it reads addresses of other machines."
    # And nothing of what was asked comes back.
    assert "evil" not in refusal("GET", "/sdapi/v1/cmd-flags?evil", A1111_CLOSED)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/"),
        ("GET", "/?__theme=dark"),
        ("GET", "/config"),
        ("GET", "/info?serialize=False"),
        ("GET", "/theme.css"),
        ("GET", "/assets/index-ab12.js"),
        ("GET", "/static/img/logo.svg"),
        ("GET", "/queue/join"),
        ("POST", "/run/predict"),
        ("POST", "/run/token"),
        ("POST", "/api/predict/"),
        ("POST", "/upload"),
        ("POST", "/reset"),
        ("GET", "/startup-events"),
        ("GET", "/file=script.js?1722000000.5"),
        ("GET", "/file=extensions/sd-webui-controlnet/javascript/a.js?1"),
        ("GET", "/file=/tmp/gradio/" + HASH + "/100%25%20of%20it.png"),
        ("GET", "/file=outputs/txt2img-images/2026-11-28/00001-1...2.png"),
        ("GET", "/file=outputs/docs/internal/sysinfo.png"),
        ("GET", "/file=C:\\Users\\me\\out.png"),
        ("GET", "/file=C:/Users/me/out.png"),
        ("GET", "/file//tmp/gradio/" + HASH + "/a.png"),
        ("GET", "/sd_extra_networks/thumb?filename=%2Fcontent%2Fmodels%2FLora%2Fa.png&mtime=1.5"),
        ("GET", "/sd_extra_networks/metadata?page=lora&item=a%20..%20b"),
        ("GET", "/sdapi/v1/options"),
        ("GET", "/sdapi/v1/sd-models"),
        ("GET", "/sdapi/v1/samplers"),
        ("GET", "/sdapi/v1/progress?skip_current_image=false"),
        ("GET", "/sdapi/v1/scripts"),
        ("GET", "/sdapi/v1/memory"),
        ("POST", "/sdapi/v1/txt2img"),
        ("POST", "/sdapi/v1/img2img"),
        ("POST", "/sdapi/v1/extra-single-image"),
        ("POST", "/sdapi/v1/png-info"),
        ("POST", "/sdapi/v1/interrogate"),
        ("POST", "/sdapi/v1/interrupt"),
        ("POST", "/sdapi/v1/refresh-checkpoints"),
        ("POST", "/sdapi/v1/refresh-loras"),
        ("POST", "/internal/progress"),
        ("GET", "/internal/ping"),
        ("GET", "/internal/pending-tasks"),
        ("GET", "/internal/quicksettings-hint"),
        ("GET", "/controlnet/model_list?update=true"),
        ("POST", "/controlnet/detect"),
        ("GET", "/webui-assets/x.woff2"),
    ],
)
def test_honest_use_of_automatic1111_passes(method, path):
    assert refusal(method, path, A1111_CLOSED) is None


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/"),
        ("GET", "/ws?clientId=0a1b"),
        ("GET", "/api/ws?clientId=0a1b"),
        ("POST", "/api/prompt"),
        ("POST", "/prompt"),
        ("GET", "/api/view?filename=ComfyUI_00001_.png&subfolder=&type=output&preview=webp%3B90"),
        ("GET", "/view?filename=a%20b%20%5Bw...%5D.png&subfolder=day%2Fone&type=temp&rand=0.4"),
        ("POST", "/api/upload/image"),
        ("POST", "/api/upload/mask"),
        ("GET", "/api/history/0f-1"),
        ("POST", "/api/history"),
        ("GET", "/api/queue"),
        ("POST", "/api/queue"),
        ("POST", "/api/interrupt"),
        ("POST", "/api/free"),
        ("GET", "/api/object_info"),
        ("GET", "/api/object_info/LoadImage"),
        ("GET", "/api/users"),
        ("GET", "/api/userdata?dir=workflows&recurse=true&split=false&full_info=true"),
        ("GET", "/api/v2/userdata?path=workflows"),
        ("GET", "/api/userdata/workflows%2Finternal%2Fmanager.json"),
        ("POST", "/api/userdata/workflows%2Fmine%20(2).json?overwrite=true"),
        ("DELETE", "/api/userdata/workflows%2Fmine.json"),
        ("POST", "/api/userdata/workflows%2Fa.json/move/workflows%2Fb.json?overwrite=false"),
        ("GET", "/api/userdata/user.css"),
        ("POST", "/api/settings/Comfy.Validation.NodeDefs"),
        ("GET", "/api/experiment/models/preview/loras/0/a.safetensors"),
        ("GET", "/api/view_metadata/loras?filename=sub%2Fa.safetensors"),
        ("GET", "/extensions/ComfyUI-Manager/js/common.js"),
        ("GET", "/extensions/pack/manager/a.js"),
        ("GET", "/api/system_stats"),
        ("GET", "/workflow_templates"),
        ("GET", "/api/models/checkpoints"),
    ],
)
def test_honest_use_of_comfyui_passes(method, path):
    assert refusal(method, path, COMFYUI_CLOSED) is None


@pytest.mark.parametrize("path", ["/runner", "/logout/", "/docs", "/token", "/internal/x", "/manager/", "/a//b/./c"])
def test_a_program_that_is_not_known_keeps_its_own_paths(path):
    assert refusal("POST", path, UNKNOWN_CLOSED) is None


def test_every_web_ui_has_closed_paths_and_says_why():
    for ui in uis():
        assert set(UNKNOWN_CLOSED) <= set(ui.closed), ui.key
        assert all(row.why and row.pattern.startswith("/") for row in ui.closed)
        assert refusal("GET", ui.alive_path, ui.closed) is None
    assert set(GRADIO_CLOSED) <= set(A1111_CLOSED)


def mutated(path, chance):
    """A path in some other spelling, which a server may or may not take for the same."""
    signs = list(path)
    for _ in range(chance.randrange(1, 4)):
        place = chance.randrange(1, len(signs))
        sign = signs[place]
        signs[place] = chance.choice(
            [
                *(f"%{ord(sign):02X}" if len(sign) == 1 else sign, f"%25{ord(sign[0]):02x}", sign.swapcase()),
                *(sign + extra for extra in ("/", "//", "/./", ";", ";a=b", ".", "%20", "%09", "%00", "\\", "+", "?")),
                *(extra + sign for extra in ("%2f", "%5c", "%2e/", "/%2e/", "%e2%80%8b", "%c2%a0", "%ef%bc%8f", ":")),
            ]
        )
    tail = chance.choice(["", "", "/", "//", "?a=b", "?", "%3fa=b", "%20", ".", ";", "%23"])
    return chance.choice(["", "", "", "/", "//", "/.", "/api", "/sub", "//api"]) + "".join(signs) + tail


ROUTES = ("/internal/logs", "/internal/sysinfo", "/sdapi/v1/options", "/manager/reboot", "/docs")


def fetches(rest):
    """Whether Gradio 3 would ask this address."""
    return rest.lstrip().lower().startswith("http://")


@contextlib.contextmanager
def aiohttp_routes(reached):
    from aiohttp import web

    async def here(asked):
        if "rest" not in asked.match_info or fetches(asked.match_info["rest"]):
            reached.append(asked.raw_path)
        return web.Response()

    def grown():
        app = web.Application()
        for name in (*ROUTES, "/file={rest:.*}"):
            app.router.add_route("*", name, here)
        return app

    async def run():
        whole = grown()
        for mount in ("/api", "/sub"):
            whole.add_subapp(mount, grown())
        runner = web.AppRunner(whole)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        box.update(port=runner.addresses[0][1], loop=asyncio.get_running_loop(), stop=asyncio.Event())
        started.set()
        await box["stop"].wait()
        await runner.cleanup()

    box, started = {}, threading.Event()
    thread = threading.Thread(target=lambda: asyncio.run(run()), daemon=True)
    thread.start()
    assert started.wait(30)
    yield box["port"]
    box["loop"].call_soon_threadsafe(box["stop"].set)
    thread.join(10)


@contextlib.contextmanager
def starlette_routes(reached):
    uvicorn = pytest.importorskip("uvicorn")
    from starlette.applications import Starlette
    from starlette.responses import Response
    from starlette.routing import Mount, Route

    async def here(asked):
        if "rest" not in asked.path_params or fetches(asked.path_params["rest"]):
            reached.append(asked.scope["raw_path"].decode("latin-1"))
        return Response()

    methods = ["GET", "POST"]
    inside = [Route(name, here, methods=methods) for name in (*ROUTES, "/file={rest:path}")]
    app = Starlette(routes=[Mount("/api", routes=inside), Mount("/sub", routes=inside), *inside])
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="critical"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until = time.monotonic() + 60
    while not server.started and time.monotonic() < until:
        time.sleep(0.05)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join(10)


@pytest.mark.parametrize("serve", [aiohttp_routes, starlette_routes])
def test_no_spelling_that_passes_reaches_a_closed_route_of_a_real_server(serve):
    chance, reached = random.Random(11), []
    listed = unlisted = 0
    with serve(reached) as port:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        connection._validate_path = lambda url: None  # what is no address is what is tried
        for number in range(int(os.environ.get("FASTSD_SPELLINGS", "3000"))):
            path = mutated(chance.choice((*ROUTES, "/file=http://127.0.0.1:9/x")), chance)
            without = number % 10 == 0
            if not without and refusal("POST", path, (*A1111_CLOSED, *COMFYUI_CLOSED)) is not None:
                continue
            before = len(reached)
            try:
                connection.request("POST", path)
                connection.getresponse().read()
            except (http.client.HTTPException, OSError):
                connection.close()
            listed += not without
            unlisted += without and len(reached) > before
            assert without or len(reached) == before, path
        connection.close()
    # Of those that nobody looked at some got there, so the spellings are not all nonsense; and some passed the list.
    assert unlisted > 10
    assert listed > 50


# ---------------------------------------------------------------------------------------------- going up

UPS = ["..", "%2e%2e", "%2E.", "%252e%252e", "%25252e.", ".%20.", "..%20", "...", "%EF%BC%8E%EF%BC%8E", "%E2%80%A5"]


@pytest.mark.parametrize("up", UPS)
@pytest.mark.parametrize("slash", ["/", "%2f", "%5c", "\\", "%252F", "%255c", "%EF%BC%BC"])
def test_a_path_that_goes_up_is_refused_even_with_nothing_closed(up, slash):
    for path in (f"/a/{up}{slash}b", f"/{up}", f"/file={up}{slash}etc{slash}passwd", f"/a{slash}{up};x=1{slash}b"):
        assert refusal("GET", path, ()) is not None, path


@pytest.mark.parametrize(
    "value",
    [
        "..",
        "../x",
        "a/../../etc/passwd",
        "%2e%2e%2fx",
        "%252e%252e%252fx",
        "..%5Cx",
        "..%255Cx",
        "my%20files/../../x",
        "..+/x",
        "../x.png%20[input]",
        "/abs/..",
        "file:///a/../b",
        "file:../b",
        ".%0A./x",
        "%09../x",
        "%7B%22path%22:%22../x%22%7D",
        "/view%3Ffilename=..%2Fx",
        "%EF%BC%8E%EF%BC%8E/x",
    ],
)
@pytest.mark.parametrize(
    "form", ["/view?filename={}", "/view?a=1&b={}&c=2", "/view?a=1;b={}", "/view?{}=1", "/view?{}"]
)
def test_a_value_that_is_a_path_and_goes_up_is_refused(form, value):
    assert refusal("GET", form.format(value), ()) is not None


@pytest.mark.parametrize(
    "text",
    [
        "a ... b",
        "a cat, looking up.. and down",
        "wait... what/who...",
        "use ../x for the folder above",
        "1/2..3/4",
        "line one\nline two\ttabbed\r\n",
        "50% of it, 100%",
        "v1..v2",
        "https://example.com/a/b?x=1",
        "\U0001f408 \u200d and e\u0301",
        "C:\\Users\\me",
        "/content/drive/My Drive/a.png",
        ".hidden/.config",
    ],
)
def test_honest_text_in_a_query_passes(text):
    assert refusal("GET", f"/page?q={quote(text)}", A1111_CLOSED) is None
    assert refusal("GET", f"/page?q={quote(text, safe='')}&x=1", COMFYUI_CLOSED) is None


@pytest.mark.parametrize(
    "path",
    [
        "/a%00",
        "/a%2500b",
        "/a%0d%0aSet-Cookie:x",
        "/a%09",
        "/a%7f",
        "/a%c2%85",
        "/%c0%ae%c0%ae/x",
        "/%e0%80%ae%e0%80%ae/x",
        "/%ff",
        "/%25c0%25ae",
        "/a\udcff",
        "/a?b=%00",
        "/a?b=%1b[0m",
        "/a#b",
        "/a?b#c",
        "http://example.com/",
        "*",
        "",
        "example.com:443",
        "/%" + "25" * 12 + "41",
        "/a?b=%" + "25" * 12 + "41",
    ],
)
def test_what_cannot_be_read_one_way_is_refused(path):
    assert refusal("GET", path, ()) is not None


def test_no_text_makes_it_fail_or_run_for_long():
    chance = random.Random(3)
    pieces = [
        "%",
        "25",
        "2e",
        "..",
        "/",
        "\\",
        ";",
        "?",
        "=",
        "&",
        "file=",
        "http:",
        "\udc80",
        "é",
        "%ff",
        "%00",
        "internal",
    ]
    for _ in range(3000):
        path = "/" + "".join(chance.choices(pieces, k=chance.randrange(20)))
        answer = refusal("GET", path, COMFYUI_CLOSED)
        assert answer is None or answer.endswith(".")
        answer_headers(path, {"Content-Type": "".join(chance.choices(pieces, k=3))})
    started = time.monotonic()
    for part in ("/a", "/file=", "/.", "/. ", "%25", "/user.css", "/;", "../", "/ab" * 20 + "/"):
        path = "/" + part * (65000 // len(part))
        refusal("GET", path, COMFYUI_CLOSED + A1111_CLOSED)
        refusal("GET", "/?a=" + path, COMFYUI_CLOSED)
        answer_headers(path, {"Content-Type": "text/javascript"})
    assert time.monotonic() - started < 60


def test_a_row_may_name_methods():
    row = ClosedPath("/a", "does it", ("POST",))
    assert refusal("GET", "/a", [row]) is None
    assert refusal("POST", "/a", [row]) == "Closed on this link, since it does it."
    assert refusal("POST", "/ab", [row]) is None


# ----------------------------------------------------------------------------------------- headers of answers


def test_every_answer_keeps_other_origins_out():
    added = answer_headers("/", {"Content-Type": "text/html"})
    assert added == {
        "Content-Security-Policy": "frame-ancestors 'self'",
        "Cross-Origin-Opener-Policy": "same-origin-allow-popups",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Referrer-Policy": "same-origin",
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "SAMEORIGIN",
    }


@pytest.mark.parametrize(
    ("name", "weaker"),
    [
        ("Referrer-Policy", "unsafe-url"),
        ("Referrer-Policy", "no-referrer-when-downgrade"),
        ("Referrer-Policy", "origin, unsafe-url"),
        ("X-Frame-Options", "ALLOWALL"),
        ("X-Frame-Options", "ALLOW-FROM https://evil.example"),
        ("X-Content-Type-Options", "none"),
        ("Cross-Origin-Resource-Policy", "cross-origin"),
        ("Cross-Origin-Opener-Policy", "unsafe-none"),
    ],
)
def test_a_weaker_header_of_the_server_is_replaced(name, weaker):
    plain = answer_headers("/", {})
    assert answer_headers("/", {name.lower(): weaker})[name] == plain[name]
    assert answer_headers("/", CIMultiDict([(name, plain[name]), (name, weaker)]))[name] == plain[name]


def test_a_stricter_header_of_the_server_stays():
    given = {"referrer-policy": "same-origin", "X-Frame-Options": "DENY", "Cross-Origin-Opener-Policy": "same-origin"}
    added = answer_headers("/", given)
    assert not {"Referrer-Policy", "X-Frame-Options", "Cross-Origin-Opener-Policy"} & set(added)
    assert added["Content-Security-Policy"] == "frame-ancestors 'none'"
    added = answer_headers("/", CIMultiDict([("Content-Security-Policy", "a"), ("content-security-policy", "b, c")]))
    assert added["Content-Security-Policy"] == "a, b, c, frame-ancestors 'self'"


def test_no_other_origin_is_let_in_by_the_server():
    given = {
        "access-control-allow-origin": "https://evil.gradio.live",
        "Access-Control-Allow-Credentials": "true",
        "Access-Control-Expose-Headers": "*",
        "Timing-Allow-Origin": "*",
    }
    added = answer_headers("/config", given)
    assert {name.lower() for name, value in added.items() if value == ""} == {name.lower() for name in given}


USER_FILES = [
    "/file=/tmp/gradio/x/a.svg",
    "/file=outputs/a",
    "/file/tmp/a",
    "/%66ile=/tmp/a",
    "/%2566ile%3d/tmp/a",
    "//file=a",
    "/sub/path/file=a",
    "/gradio_api/file=/tmp/a",
    "/view?filename=a.svg&type=input",
    "/api/view?filename=a.svg",
    "/VIEW?filename=a",
    "/view;x?filename=a",
    "/view/?filename=a",
    "/userdata/a.html",
    "/api/userdata/workflows%2Fa.html",
    "/a/b/c/d/e/f/g/h/i/j/userdata/a.html",
    "/sd_extra_networks/thumb?filename=a",
    "/api/assets/1b4e28ba-2fa1-11d2-883f-0016d3cca427/content?disposition=inline",
    "/vhs/viewvideo?filename=a",
]


@pytest.mark.parametrize("path", USER_FILES)
@pytest.mark.parametrize(
    "kind",
    [
        "text/html",
        "TEXT/HTML; charset=utf-8",
        "application/xhtml+xml",
        "image/svg+xml",
        "text/xml",
        "application/xml",
        "application/rss+xml",
        "application/mathml+xml",
        "text/xsl",
        "multipart/x-mixed-replace; boundary=a",
        "message/rfc822",
        "text/html-sandboxed",
        "unknown",
        "*/*",
        "image/png, text/html",
        " text/html",
        None,
    ],
)
def test_a_file_of_a_visitor_is_never_opened_as_a_page(path, kind):
    given = {"Content-Length": "5", "Content-Disposition": 'inline; filename="a.html"'}
    added = answer_headers(path, given | ({"Content-Type": kind} if kind is not None else {}))
    assert added["Content-Security-Policy"].endswith(", sandbox")
    assert added["Content-Disposition"] == 'attachment; filename="a.html"'


def test_a_type_given_twice_counts_as_the_worse_one():
    for pair in (("image/png", "text/html"), ("text/html", "image/png")):
        added = answer_headers("/view", CIMultiDict(("Content-Type", kind) for kind in pair))
        assert added["Content-Disposition"] == "attachment"


@pytest.mark.parametrize(
    "kind", ["image/png", "image/webp", "video/mp4", "application/json", "text/plain; charset=utf-8"]
)
@pytest.mark.parametrize("path", USER_FILES)
def test_pictures_and_texts_of_visitors_are_shown_as_before(path, kind):
    added = answer_headers(path, {"Content-Type": kind})
    assert "Content-Disposition" not in added
    assert "sandbox" not in added["Content-Security-Policy"]
    assert "Content-Type" not in added


@pytest.mark.parametrize("kind", ["application/javascript", "text/javascript; charset=utf-8", "text/css"])
@pytest.mark.parametrize(
    "path",
    [
        "/file=script.js?1",
        "/sub/file=/content/ext/javascript/a.mjs",
        "/file=style.css?1",
        "/file=javascript/viewer.js",
        "/extensions/pack/view/main.js",
        "/assets/userdata/a.js",
        "/app/view/main.js",
    ],
)
def test_the_web_uis_own_scripts_and_styles_still_work(path, kind):
    added = answer_headers(path, {"Content-Type": kind})
    assert not {"Content-Type", "Content-Disposition"} & set(added)
    assert "sandbox" not in added["Content-Security-Policy"]


@pytest.mark.parametrize(
    "path",
    [
        f"/file=/tmp/gradio/{HASH}/a.js",
        f"/file=%2Ftmp%2Fgradio%2F{HASH}%2Fa.js",
        f"/gradio_api/file=/tmp/gradio/{'0f' * 32}/a.js",
        "/view?filename=a.js",
        "/api/view?filename=a.js",
        "/userdata/a.js",
        "/userdata/file=a.js",
    ],
)
def test_a_script_that_a_visitor_has_put_there_is_text(path):
    # Else a page made by a fault elsewhere could install it, at /view for the whole link, for good.
    added = answer_headers(
        path, {"Content-Type": "application/javascript; charset=utf-8", "Service-Worker-Allowed": "/"}
    )
    assert added["Content-Type"] == "text/plain; charset=utf-8"
    assert added["Service-Worker-Allowed"] == ""


def test_an_answer_that_nothing_changed_changes_nothing_that_is_kept():
    added = answer_headers("/view?filename=a.png", {"ETag": '"1"', "Last-Modified": "x"})
    assert "Content-Disposition" not in added
    assert "sandbox" not in added["Content-Security-Policy"]


@pytest.mark.parametrize(
    "path", ["/", "/config", "/index.html", "/static/img/logo.svg", "/viewer", "/profile", "/files"]
)
def test_pages_of_the_program_itself_are_pages(path):
    added = answer_headers(path, {"Content-Type": "text/html"})
    assert "Content-Disposition" not in added
    assert "sandbox" not in added["Content-Security-Policy"]


def test_a_page_with_forms_keeps_its_origin_whatever_the_server_says_of_referrers() -> None:
    for said in ("no-referrer", "unsafe-url", "no-referrer, unsafe-url"):
        assert answer_headers("/", {"Referrer-Policy": said})["Referrer-Policy"] == "same-origin"
