"""Measure what the login gate costs: 100 MB down and up, directly and through it, each end in a process of its own.

python scripts/measure_gate.py [--write]

In front of two servers: Gradio's, which is what the gate is for, giving a file and taking an upload, and one of bare
sockets, which does nothing but copy: the worst case. The turns are interleaved, and medians are compared; at least
three idle cores are needed for a fair figure, because server, gate and visitor work at the same time. With fewer, the
processor seconds tell more.
`--write` keeps the table in benchmarks/results/gate.md.
"""

import argparse
import asyncio
import contextlib
import datetime
import multiprocessing
import os
import platform
import re
import socket
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

TOTAL = 100_000_000
BLOCK = 2**18
ROUNDS = 15
FEW_CORES = """
Server, gate and visitor share these cores, where each wants one, so the processor columns tell more than the clock.
Gradio's server is what stands behind the gate. A transfer between bare sockets is copying and nothing else, and the
gate has to copy as much once more: about three quarters of its seconds are the system's own copying. Over a link of
100 Mbit/s the same 100 MB take 8 s.
"""


def serve(pipe: Connection) -> None:
    """A plain server in this process: /download gives TOTAL bytes, /upload takes them.

    Answers each message with the processor seconds it has used so far.
    """

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        block = bytes(BLOCK)
        if head.startswith(b"GET"):
            writer.write(f"HTTP/1.1 200 OK\r\nContent-Length: {TOTAL}\r\n\r\n".encode())
            for start in range(0, TOTAL, BLOCK):
                writer.write(memoryview(block)[: min(BLOCK, TOTAL - start)])
                await writer.drain()
        else:
            left = int(re.search(rb"Content-Length: (\d+)", head)[1])
            while left:
                left -= len(await reader.read(min(BLOCK, left)))
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        await writer.drain()
        writer.close()

    async def run() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0, limit=2 * BLOCK)
        pipe.send((server.sockets[0].getsockname()[1], "/download", "/upload"))
        threading.Thread(target=tell, daemon=True).start()
        await server.serve_forever()

    def tell() -> None:
        while pipe.recv():
            pipe.send(time.process_time())

    asyncio.run(run())


def serve_gradio(pipe: Connection) -> None:
    """Gradio's own server in this process: it gives a file of TOTAL bytes, and takes an upload of as many."""
    import tempfile

    import gradio

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder).resolve() / "hundred.bin"
        path.write_bytes(os.urandom(2**20) * (TOTAL // 2**20 + 1))
        os.truncate(path, TOTAL)
        with gradio.Blocks() as page:
            gradio.Markdown("measured")
        _app, address, _share = page.launch(
            prevent_thread_lock=True, quiet=True, server_name="127.0.0.1", allowed_paths=[folder]
        )
        pipe.send((int(address.rstrip("/").rpartition(":")[2]), f"/gradio_api/file={path}", "/gradio_api/upload"))
        while pipe.recv():
            pipe.send(time.process_time())


def guard(pipe: Connection, port: int) -> None:
    """The gate in this process; answers each message with the processor seconds it has used so far."""
    from fastsd_helpers.tunnels import Login, open_gate

    with open_gate(port, Login("fastsd", "gate-password-1")) as gate:
        pipe.send(gate.port)
        while pipe.recv():
            pipe.send(time.process_time())


def transfer(port: int, way: str, path: str) -> float:
    """Seconds to move TOTAL bytes one way over one fresh connection."""
    import base64

    basic = base64.b64encode(b"fastsd:gate-password-1").decode()
    before = (
        b'--edge\r\nContent-Disposition: form-data; name="files"; filename="a.bin"\r\n'
        b"Content-Type: application/octet-stream\r\n\r\n"
    )
    after = b"\r\n--edge--\r\n"
    head = f"{'GET' if way == 'down' else 'POST'} {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
    head += f"Authorization: Basic {basic}\r\nConnection: close\r\n"
    if way == "up":
        head += "Content-Type: multipart/form-data; boundary=edge\r\n"
        head += f"Content-Length: {len(before) + TOTAL + len(after)}\r\n"
    buffer, count = bytearray(BLOCK), 0
    start = time.monotonic()
    with socket.create_connection(("127.0.0.1", port), timeout=120) as raw:
        raw.sendall(f"{head}\r\n".encode())
        if way == "up":
            raw.sendall(before)
            for begin in range(0, TOTAL, BLOCK):
                raw.sendall(memoryview(buffer)[: min(BLOCK, TOTAL - begin)])
            raw.sendall(after)
        status = raw.recv(12)
        while got := raw.recv_into(buffer):
            count += got
        seconds = time.monotonic() - start
    if status[-3:] != b"200" or (way == "down" and count < TOTAL):
        raise SystemExit(f"{path} answered {status!r} and gave {count} bytes")
    return seconds


@contextlib.contextmanager
def process(target: object, *words: object) -> Iterator[tuple[Connection, Any]]:
    """Run a function in a process of its own; gives its pipe and what it says first."""
    here, there = multiprocessing.Pipe()
    child = multiprocessing.get_context("spawn").Process(target=target, args=(there, *words), daemon=True)
    child.start()
    try:
        yield here, here.recv()
    finally:
        child.terminate()
        child.join(10)


def used_by(pipe: Connection) -> float:
    """Processor seconds that the process at the other end has used so far."""
    pipe.send(True)
    return pipe.recv()


def measure(server: object = serve, rounds: int = ROUNDS) -> dict[str, dict[str, float]]:
    """Seconds for TOTAL bytes, down and up: direct, through the gate; and processor time of the gate and the ends."""
    rows = {}
    with process(server) as (site_pipe, (site, down, up)), process(guard, site) as (gate_pipe, gate):
        for way, path in (("down", down), ("up", up)):
            transfer(site, way, path), transfer(gate, way, path)  # the first of each is not counted
            times: dict[str, list[float]] = {"direct": [], "gate": [], "processor": [], "ends": []}
            for _ in range(rounds):
                before = used_by(site_pipe) + time.process_time()
                times["direct"].append(transfer(site, way, path))
                times["ends"].append(used_by(site_pipe) + time.process_time() - before)
                before = used_by(gate_pipe)
                times["gate"].append(transfer(gate, way, path))
                times["processor"].append(used_by(gate_pipe) - before)
            rows[way] = {name: statistics.median(column) for name, column in times.items()}
    return rows


def main() -> None:
    """Measure, print, and keep the table when asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="keep the table in benchmarks/results/gate.md")
    chosen = parser.parse_args()
    lines = [
        "| server | 100 MB | direct, s | through the gate, s | ratio | processor: the gate, s | "
        "server and visitor, direct, s |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, server in (("Gradio", serve_gradio), ("bare sockets", serve)):
        for way, row in measure(server).items():
            direct, through, gate, ends = row.values()
            lines.append(
                f"| {name} | {way} | {direct:.3f} | {through:.3f} | {through / direct:.2f} | {gate:.3f} | {ends:.3f} |"
            )
    table = "\n".join(lines)
    sys.stdout.write(table + "\n")
    if chosen.write:
        import aiohttp

        about = (
            f"# What the login gate costs\n\n{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores, "
            f"Python {platform.python_version()}, aiohttp {aiohttp.__version__}. Median of {ROUNDS}, interleaved, over "
            "loopback; server, gate and visitor in a process each. Made by `scripts/measure_gate.py`.\n\n"
        )
        few = FEW_CORES if (os.cpu_count() or 1) < 3 else ""
        (ROOT / "benchmarks" / "results" / "gate.md").write_text(f"{about}{table}\n{few}", encoding="utf-8")


if __name__ == "__main__":
    main()
