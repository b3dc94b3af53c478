"""Programs that are fetched to run: only the right bytes ever run, wrong ones go, and a right one is fetched once."""

import http.server
import os
import socket
import stat
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fastsd_helpers.errors import TunnelToolMissing
from fastsd_helpers.tunnels.services import node_packages, programs


class Server:
    """A server that gives each of its answers once, and its last one again."""

    def __init__(self) -> None:
        self.answers: list[Callable[[Any], None]] = []
        self.asked = 0
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                answer = outer.answers[min(outer.asked, len(outer.answers) - 1)]
                outer.asked += 1
                answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/program"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def whole(data: bytes, kind: str = "application/octet-stream", status: int = 200) -> Callable[[Any], None]:
    def answer(request: Any) -> None:
        request.send_response(status)
        request.send_header("Content-Type", kind)
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        request.wfile.write(data)

    return answer


def without_length(data: bytes, times: int = 1) -> Callable[[Any], None]:
    def answer(request: Any) -> None:
        request.send_response(200)
        request.end_headers()
        try:
            for _ in range(times):
                request.wfile.write(data)
        except OSError:  # it was not taken any further
            pass

    return answer


def moved(to: str) -> Callable[[Any], None]:
    def answer(request: Any) -> None:
        request.send_response(302)
        request.send_header("Location", to)
        request.send_header("Content-Length", "0")
        request.end_headers()

    return answer


@pytest.fixture
def server() -> Iterator[Server]:
    one = Server()
    yield one
    one.close()


class World:
    """The right program, which writes into the file `ran`; and a wrong one, which writes into `harm`."""

    def __init__(self, folder: Path) -> None:
        self.ran, self.harm = folder / "ran", folder / "harm"
        self.right = self.script(self.ran)
        self.wrong = self.script(self.harm)

    def script(self, mark: Path) -> bytes:
        return f"#!/bin/sh\necho here >> {mark}\n".encode()

    def run(self, folder: Path) -> None:
        folder.mkdir()
        copy = programs.bring_program("cloudflared", folder)
        subprocess.run([str(copy)], check=True)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def put(world: World, how: str, kept: Path, elsewhere: Path) -> None:
    flipped = bytearray(world.right)
    flipped[-2] ^= 1
    texts = {
        "tampered": world.right + world.wrong,
        "cut": world.right[: len(world.right) // 2],
        "one byte": b"#",
        "empty": b"",
        "one bit": bytes(flipped),
        "another program": world.wrong,
        "as long": world.wrong[: len(world.right)].ljust(len(world.right), b"\n"),
        "another machine's": b"\x7fELF" + bytes(60),
        "a line more": world.right + b"\n",
        "much more": world.right + bytes(4 * 2**20),
    }
    if how in texts:
        kept.write_bytes(texts[how])
        kept.chmod(0o755)
    elif how == "closed":
        kept.write_bytes(world.wrong)
        kept.chmod(0)
    elif how in ("link to a wrong one", "link to a right one", "link to nothing"):
        if how != "link to nothing":
            elsewhere.write_bytes(world.wrong if "wrong" in how else world.right)
            elsewhere.chmod(0o755)
        kept.symlink_to(elsewhere)
    elif how == "endless link":
        kept.symlink_to("/dev/zero")
    elif how == "folder":
        kept.mkdir()
        (kept / "inside").write_bytes(world.wrong)
    elif how == "pipe":
        os.mkfifo(kept)
    elif how == "socket":
        with socket.socket(socket.AF_UNIX) as one:
            here = os.getcwd()
            os.chdir(kept.parent)  # the path of a socket must be short
            try:
                one.bind(kept.name)
            finally:
                os.chdir(here)
    else:
        raise AssertionError(how)


KEPT_WRONG = (
    "tampered", "cut", "one byte", "empty", "one bit", "another program", "as long", "another machine's", "a line more",
    "much more", "closed", "link to a wrong one", "link to a right one", "link to nothing", "endless link", "folder",
    "pipe", "socket",
)  # fmt: skip


@pytest.mark.parametrize("how", KEPT_WRONG)
def test_what_is_wrong_never_runs_and_is_fetched_again_once(
    how: str, world: World, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tunnel_doubles import keep

    server.answers = [whole(world.right)]
    kept = keep(monkeypatch, "cloudflared", world.right, url=server.url, kept=False)
    put(world, how, kept, tmp_path / "elsewhere")
    world.run(tmp_path / "first")
    assert not world.harm.exists()
    assert server.asked == 1
    assert kept.read_bytes() == world.right
    assert stat.S_ISREG(kept.lstat().st_mode)
    if how == "link to a right one":
        assert (tmp_path / "elsewhere").exists(), "only the link goes, not what it leads to"
    world.run(tmp_path / "second")
    assert server.asked == 1, "the second time nothing is fetched"
    assert world.ran.read_text() == "here\nhere\n"


SERVED_WRONG: dict[str, Callable[[World], Callable[[Any], None]]] = {
    "another program": lambda world: whole(world.wrong),
    "tampered": lambda world: whole(world.right + world.wrong),
    "cut": lambda world: whole(world.right[:-4]),
    "empty": lambda world: whole(b""),
    "a page": lambda world: whole(b"<html>log in</html>", "text/html"),
    "not there": lambda world: whole(b"no", "text/plain", 404),
    "without a length": lambda world: without_length(world.wrong),
    "endless": lambda world: without_length(world.wrong * 5000, 5000),
    "a file of this machine": lambda world: moved("file:///bin/true"),
}


@pytest.mark.parametrize("how", SERVED_WRONG)
@pytest.mark.parametrize("sized", [True, False], ids=["size known", "size unknown"])
def test_what_comes_wrong_never_runs_and_does_not_stay(
    how: str, sized: bool, world: World, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tunnel_doubles import keep

    monkeypatch.setattr(programs, "PAUSES_S", (0.01,))
    monkeypatch.setattr(programs, "_LARGEST_BYTES", 2**20)
    server.answers = [SERVED_WRONG[how](world)]
    size = len(world.right) if sized else None
    kept = keep(monkeypatch, "cloudflared", world.right, url=server.url, size=size, kept=False)
    with pytest.raises(TunnelToolMissing, match="cloudflared is not installed, and cloudflared 1 could not be fetched"):
        world.run(tmp_path / "first")
    assert not world.harm.exists()
    assert not world.ran.exists()
    assert [path for path in kept.parent.iterdir() if not path.name.endswith(".lock")] == [], "nothing is left"
    assert server.asked <= 4
    server.answers = [whole(world.right)]
    world.run(tmp_path / "second")  # no wrong beginning is gone on with
    assert world.ran.read_text() == "here\n"


def test_a_wrong_answer_is_asked_for_once_more(
    world: World, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tunnel_doubles import keep

    server.answers = [whole(world.wrong), whole(world.right)]
    keep(monkeypatch, "cloudflared", world.right, url=server.url, kept=False)
    world.run(tmp_path / "first")
    assert server.asked == 2
    assert world.ran.exists()
    assert not world.harm.exists()


def test_a_right_one_works_without_a_network_and_without_its_permissions(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tunnel_doubles import keep

    kept = keep(monkeypatch, "cloudflared", world.right)  # its address leads nowhere
    kept.chmod(0o644)
    world.run(tmp_path / "first")
    assert world.ran.exists()
    assert stat.S_IMODE(kept.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "first" / "cloudflared").stat().st_mode) == 0o700


def test_what_was_hashed_is_run_though_the_kept_file_changes_afterwards(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tunnel_doubles import keep

    kept = keep(monkeypatch, "cloudflared", world.right)
    (tmp_path / "own").mkdir()
    copy = programs.bring_program("cloudflared", tmp_path / "own")
    kept.write_bytes(world.wrong)
    kept.chmod(0o755)
    subprocess.run([str(copy)], check=True)
    assert world.ran.exists()
    assert not world.harm.exists()


def test_a_wrong_one_in_gradios_own_place_is_deleted_and_a_right_one_there_is_used(
    world: World, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tunnel_doubles import keep

    from fastsd_helpers.tunnels.services.kinds import frpc_places

    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    keep(monkeypatch, "frpc", world.right, url=server.url, kept=False)
    (place,) = frpc_places()["also"]
    assert place.name == f"frpc_{programs.this_machine().replace(' ', '_')}_v0.3"
    place.parent.mkdir(parents=True)
    place.write_bytes(world.wrong)
    server.answers = [whole(world.right)]
    kept = programs.keep_program("frpc", **frpc_places())
    assert kept.read_bytes() == world.right
    assert not place.exists(), "gradio itself would run it the next time"
    kept.unlink()
    place.write_bytes(world.right)
    assert programs.keep_program("frpc", **frpc_places()).read_bytes() == world.right
    assert server.asked == 1


def test_a_folder_that_cannot_be_used_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(TunnelToolMissing, match="cannot be used"):
        programs.bring_program("cloudflared", tmp_path)


def test_every_row_of_the_table_is_one_file_at_an_address_that_lasts() -> None:
    seen = set()
    for program in programs.known_programs():
        assert program.url.startswith("https://"), program
        assert len(program.sha256) == 64
        assert int(program.sha256, 16)
        assert program.version.removeprefix("v") in program.url, "an address without a version changes its content"
        assert (program.name, program.machine) not in seen
        assert program.sha256 not in seen
        seen |= {(program.name, program.machine), program.sha256}
    for name in ("frpc", "cloudflared", "ngrok"):
        assert {(name, "linux amd64"), (name, "linux arm64")} <= seen


def test_the_table_and_gradio_agree_on_frpc() -> None:
    tunneling = pytest.importorskip("gradio.tunneling")
    rows = {program.url: program.sha256 for program in programs.known_programs() if program.name == "frpc"}
    assert rows
    assert {url: tunneling.CHECKSUMS.get(url) for url in rows} == rows


# --------------------------------------------------------------------------------------------- localtunnel's packages


def client(folder: Path, mark: Path) -> Path:
    """A folder like that of localtunnel's packages, whose program writes into a file."""
    program = folder / "localtunnel" / "bin" / "lt.js"
    program.parent.mkdir(parents=True)
    program.write_text(f"echo here >> {mark}\n")
    (folder / "axios").mkdir()
    (folder / "axios" / "index.js").write_text("// quiet\n")
    return folder


@pytest.fixture
def npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`npm ci` brings what lies in the folder that this gives; `node` is a shell."""
    brings = client(tmp_path / "brings", tmp_path / "ran")
    path = tmp_path / "path"
    path.mkdir()
    log = tmp_path / "npm.log"
    (path / "npm").write_text(
        f'#!/bin/sh\necho "$@" >> {log}\ncp -r {brings} node_modules\n: > node_modules/.package-lock.json\n'
    )
    (path / "node").write_text('#!/bin/sh\nexec /bin/sh "$@"\n')
    for name in ("npm", "node"):
        (path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{path}:/usr/bin:/bin")
    digest = node_packages._copy_tree(brings, tmp_path / "copied")
    monkeypatch.setattr(node_packages, "CLIENT_SHA256", digest)
    return brings


def use_client(folder: Path) -> None:
    folder.mkdir()
    subprocess.run(node_packages.bring_client(folder), check=True)


def spoil(kept: Path, how: str, harm: Path) -> None:
    program = kept / "localtunnel" / "bin" / "lt.js"
    if how == "changed":
        program.write_text(f"touch {harm}\n")
    elif how == "another package":
        (kept / "axios" / "index.js").write_text("// loud\n")
    elif how == "more":
        (kept / "axios" / "extra.js").write_text("// more\n")
    elif how == "a file that is not shown":
        (kept / ".hooks.js").write_text("// more\n")
    elif how == "less":
        (kept / "axios" / "index.js").unlink()
    elif how == "another name":
        (kept / "axios").rename(kept / "axi0s")
    elif how == "link":
        (harm.parent / "lt.js").write_bytes(program.read_bytes())
        program.unlink()
        program.symlink_to(harm.parent / "lt.js")
    elif how == "linked folder":
        (kept / "axios").rename(harm.parent / "axios")
        (kept / "axios").symlink_to(harm.parent / "axios")
    elif how == "linked as a whole":
        kept.rename(harm.parent / "whole")
        kept.symlink_to(harm.parent / "whole")
    elif how == "file":
        kept.rename(harm.parent / "whole")
        kept.write_text("x")
    else:
        raise AssertionError(how)


@pytest.mark.parametrize(
    "how",
    ["changed", "another package", "more", "a file that is not shown", "less", "another name", "link", "linked folder",
     "linked as a whole", "file"],
)  # fmt: skip
def test_packages_that_are_not_the_locked_ones_never_run(how: str, npm: Path, tmp_path: Path) -> None:
    use_client(tmp_path / "first")
    spoil(programs.programs_folder() / "localtunnel-2.0.2", how, tmp_path / "harm")
    use_client(tmp_path / "second")
    use_client(tmp_path / "third")
    assert not (tmp_path / "harm").exists()
    assert (tmp_path / "ran").read_text() == "here\n" * 3
    asked = (tmp_path / "npm.log").read_text().splitlines()
    assert len(asked) == 2, "once at first, once for what was spoiled"
    assert all("--ignore-scripts" in line for line in asked)


def test_packages_that_come_wrong_twice_are_refused_and_do_not_stay(npm: Path, tmp_path: Path) -> None:
    (npm / "axios" / "index.js").write_text("// loud\n")
    with pytest.raises(TunnelToolMissing, match="downloaded twice with the wrong hash"):
        use_client(tmp_path / "first")
    assert not (programs.programs_folder() / "localtunnel-2.0.2").exists()
    assert not (tmp_path / "ran").exists()


def test_npm_that_fails_is_a_sentence(npm: Path, tmp_path: Path) -> None:
    (tmp_path / "path" / "npm").write_text("#!/bin/sh\necho npm error code EAI_AGAIN\nexit 1\n")
    with pytest.raises(TunnelToolMissing, match=r"npm could not fetch localtunnel 2\.0\.2: npm error code EAI_AGAIN"):
        use_client(tmp_path / "first")


def test_the_lock_names_a_hash_for_every_package_and_no_address() -> None:
    import json

    lock = json.loads((Path(node_packages.__file__).with_name("localtunnel.lock.json")).read_text(encoding="utf-8"))
    packages = {name: about for name, about in lock["packages"].items() if name}
    assert packages["node_modules/localtunnel"]["version"] == node_packages.CLIENT_VERSION
    assert all(about["integrity"].startswith("sha512-") for about in packages.values())
    assert not any("resolved" in about for about in packages.values())
    assert not any(about.get("hasInstallScript") for about in packages.values())


# ------------------------------------------------------------------------------------------------------------------ uv


def test_a_uv_that_is_not_as_its_package_brought_it_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from base64 import urlsafe_b64encode
    from hashlib import sha256

    from fastsd_helpers.errors import DependencyMissing
    from fastsd_helpers.wheels import find_uv

    program = tmp_path / "site" / "bin" / "uv"
    program.parent.mkdir(parents=True)
    program.write_bytes(b"#!/bin/sh\n")
    program.chmod(0o755)
    about = tmp_path / "site" / "uv-9.9.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: uv\nVersion: 9.9\n")
    digest = urlsafe_b64encode(sha256(program.read_bytes()).digest()).rstrip(b"=").decode()
    (about / "RECORD").write_text(f"bin/uv,sha256={digest},10\nuv-9.9.dist-info/RECORD,,\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setenv("PATH", str(program.parent))
    assert find_uv() == program
    for wrong in (b"#!/bin/sh\ntouch harm\n", b"#!", b""):
        program.write_bytes(wrong)
        with pytest.raises(DependencyMissing, match="not the one from its package"):
            find_uv()
    own = tmp_path / "own" / "uv"
    own.parent.mkdir()
    own.write_bytes(b"#!/bin/sh\n# mine\n")
    own.chmod(0o755)
    monkeypatch.setenv("PATH", str(own.parent))
    assert find_uv() == own, "what the user has put on the path is the user's own"


@pytest.mark.network
def test_the_real_packages_have_the_hash_that_is_kept_here(tmp_path: Path) -> None:
    if node_packages.node_missing() is not None:
        pytest.skip("Node.js is not installed (apt install nodejs)")
    node, program = node_packages.bring_client(tmp_path)
    done = subprocess.run([node, program, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "2.0.2"
