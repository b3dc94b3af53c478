"""A public link: opened by one service or the first that works, checked, watched, reopened, closed."""

import threading
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta

from fastsd_helpers.errors import (
    FastSDError,
    SettingsError,
    TunnelError,
    TunnelServiceDown,
    TunnelTokenRefused,
)
from fastsd_helpers.runtime import colab_link, logger
from fastsd_helpers.tunnels.gate.login import Login, choose_login
from fastsd_helpers.tunnels.gate.passing import ClosedPath
from fastsd_helpers.tunnels.gate.server import Gate, open_gate
from fastsd_helpers.tunnels.services.kinds import SERVICES, Running, find_token
from fastsd_helpers.tunnels.services.probe import answers_nonce, port_answers, wait_for_nonce
from fastsd_helpers.tunnels.settings import KINDS, TunnelConfig

__all__ = ["Tunnel", "open_tunnel"]

_CHECK_S = 40  # for a fresh link to lead here
_MISSES = 2  # checks in a row that must fail before a link counts as dead
_LONGEST_PAUSE_S = 300


def open_tunnel(
    port: int,
    kind: str | None = None,
    *,
    config: TunnelConfig | None = None,
    login: Login | None = None,
    upstream_login: Login | None = None,
    closed: Sequence[ClosedPath] = (),
    on_change: Callable[["Tunnel"], None] | None = None,
    watch_every_s: float = 30,
) -> "Tunnel":
    """Give a port of this machine a public link, behind a login, and check that the link leads here.

    The order of "auto" is ngrok (when there is a token), gradio share, cloudflared, localtunnel; every attempt is
    reported. A watchdog opens the link anew when it dies, and reports the new address.

    Args:
        port: where the program answers already, on 127.0.0.1.
        kind: one of KINDS; that of `config` when None.
        config: everything else.
        login: whom to let in; made from `config` when None.
        upstream_login: the program's own login, entered for visitors who passed the gate's.
        closed: the gate's rows of paths that no visitor may reach.
        on_change: called from the watchdog's thread after the link was reopened.
        watch_every_s: seconds between two checks; 0: no watchdog.

    Returns:
        The link: `url`, `login`, `kind`; it is watched in a thread and open until `close`.

    Raises:
        SettingsError: no such kind or port.
        TunnelError: nothing answers at the port, or no service gave a link; what each one said is in the sentence.
    """
    config = config or TunnelConfig()
    kind = kind or config.kind
    if kind not in KINDS:
        raise SettingsError(f"There is no tunnel service named {kind!r}.", f"Choose {', '.join(KINDS)}.")
    if not 0 < port < 65536:
        raise SettingsError(f"There is no port {port}.", "Give the number in the program's own address, such as 7860.")
    if not port_answers(port):
        raise TunnelError(
            f"Nothing answers on port {port} of this machine.", "Start the program first, and check its port."
        )
    if kind == "colab":
        return Tunnel(port, kind, config, gate=None, running=None, url=_private_link(port))
    if config.access == "anyone":
        login = None
        logger.warning("Anyone who finds this link can use the program behind it, and the files it can read.")
    else:
        login = login or choose_login(config.user, config.password)
    gate = open_gate(port, login, upstream_login=upstream_login, closed=closed)
    try:
        used, running = _open_first(kind, gate, config)
    except BaseException:
        gate.close()
        raise
    return Tunnel(
        port, used, config, gate=gate, running=running, wanted=kind, on_change=on_change, watch_every_s=watch_every_s
    )


def _private_link(port: int) -> str:
    url = colab_link(port)
    if url is None:
        raise TunnelError(
            "Colab's own link exists only in a Colab notebook, and this is not one.",
            f"Open http://127.0.0.1:{port} on this machine, or choose another kind.",
        )
    return url


def _open_first(kind: str, gate: Gate, config: TunnelConfig) -> tuple[str, Running]:
    """Open the link with the service that was asked for, or with the first that works."""
    if kind != "auto":
        return kind, _open_checked(kind, gate, config)
    problems = []
    for name in SERVICES:
        try:
            if name == "ngrok" and find_token(config) is None:
                logger.info("ngrok: skipped, there is no token.")
                problems.append("ngrok: no token")
                continue
            return name, _open_checked(name, gate, config)
        except TunnelError as err:
            logger.info("%s: %s", name, err.problem)
            problems.append(f"{name}: {err.problem.rstrip('.')}")
            refused = isinstance(err, TunnelTokenRefused) and name == "ngrok"
            if refused:
                logger.info("%s", err.hint)
    raise TunnelError(
        f"No service opened a tunnel. {'; '.join(problems)}.",
        "Check this machine's connection; an ngrok token (dashboard.ngrok.com) is the most reliable way. In Colab, "
        "kind 'colab' gives a link for you alone.",
    )


def _open_checked(kind: str, gate: Gate, config: TunnelConfig) -> Running:
    """Open a link and make sure that it leads to this very gate."""
    gate.set_public_url(None)
    running = SERVICES[kind](gate.port, config)
    try:
        gate.set_public_url(running.url)
        gate.set_address_header(running.address_header)
        reason = wait_for_nonce(running.url, gate.nonce, time.monotonic() + min(_CHECK_S, config.wait_s))
    except BaseException:
        running.close()
        raise
    if reason:
        running.close()
        raise TunnelServiceDown(
            f"{kind} gave the link {running.url}, but it does not reach this machine ({reason}).",
            "Try again, or choose another service.",
        )
    return running


class Tunnel:
    """An open link. `url` changes when the watchdog has to open it anew; `on_change` is told.

    Attributes:
        url: the public address.
        kind: the service that made it.
        login: user and password of the gate; None for a private or an open link.
        note: one line on what visitors will see.
        expires: when the service or the settings end it; None when nothing does.
        visitor_password: what localtunnel's own page asks for; None otherwise.
    """

    def __init__(
        self,
        port: int,
        kind: str,
        config: TunnelConfig,
        *,
        gate: Gate | None,
        running: Running | None,
        url: str = "",
        wanted: str = "",
        on_change: Callable[["Tunnel"], None] | None = None,
        watch_every_s: float = 0,
    ) -> None:
        self.port, self.kind, self.login = port, kind, gate.login if gate else None
        self._config, self._gate, self._running, self._wanted = config, gate, running, wanted
        self._on_change = on_change
        self._closing, self._closed = threading.Event(), threading.Event()
        self._lock = threading.Lock()
        self._ends_s = time.monotonic() + 60 * config.minutes if config.minutes else None
        self._ends = datetime.now(UTC) + timedelta(minutes=config.minutes) if config.minutes else None
        self.url, self.note = url, "For you alone, while this notebook is open in your browser."
        self.visitor_password: str | None = None
        self.expires = self._ends
        if running is not None:
            self._take(kind, running)
        self._thread: threading.Thread | None = None
        if watch_every_s or self._ends_s:
            self._thread = threading.Thread(
                target=self._watch, args=(watch_every_s or 3600,), name="fastsd-watchdog", daemon=True
            )
            self._thread.start()

    def _take(self, kind: str, running: Running) -> None:
        self._running, self.kind, self.url, self.note = running, kind, running.url, running.note
        self.visitor_password = running.visitor_password
        ends = [moment for moment in (self._ends, running.expires) if moment is not None]
        self.expires = min(ends) if ends else None

    @property
    def closed(self) -> bool:
        """Whether it was closed, by `close` or because its time was over."""
        return self._closed.is_set()

    def block(self) -> str:
        """Link, user, password and expiry in one block to copy; the password is in clear, so it is for no log."""
        lines = [f"Link:      {self.url}", *(self.login.lines() if self.login is not None else [])]
        if self.visitor_password:
            lines.append(f"Tunnel password (localtunnel's own page asks for it once): {self.visitor_password}")
        if self.expires is not None:
            lines.append(f"Valid to:  {self.expires.astimezone():%Y-%m-%d %H:%M %Z} at the latest")
        else:
            lines.append("Valid:     until it is stopped")
        return "\n".join(lines)

    def answers(self, *, timeout_s: float = 10) -> bool:
        """Ask now whether the public link leads here; for Colab's private link, whether the program answers.

        Args:
            timeout_s: seconds to wait for the answer.

        Returns:
            True when it does.
        """
        if self._gate is None:
            return port_answers(self.port)
        running = self._running
        if self.closed or running is None or not running.child.alive():
            return False
        return answers_nonce(self.url, self._gate.nonce, timeout_s=timeout_s)[0]

    def forget_upstream_login(self) -> None:
        """Log in anew at the program behind the link, after it was restarted."""
        if self._gate is not None:
            self._gate.forget_upstream_login()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until it is closed; False when it is still open after `timeout_s` seconds.

        Args:
            timeout_s: seconds; None: for as long as it is open.

        Returns:
            Whether it is closed.
        """
        return self._closed.wait(timeout_s)

    def close(self) -> None:
        """End the link, the gate and the service's process, and nothing else; calling it twice is harmless."""
        self._closing.set()
        with self._lock:
            if self._running is not None:
                self._running.close()
            if self._gate is not None:
                self._gate.close()
            self._closed.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(15)

    def __enter__(self) -> "Tunnel":
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    # ---------------------------------------------------------------------------------------------- watchdog

    def _watch(self, every_s: float) -> None:
        misses = 0
        while not self._closing.wait(self._pause(every_s if not misses else min(every_s, 5))):
            if self._ends_s is not None and time.monotonic() >= self._ends_s:
                logger.info("The link %s is closed: its %d minutes are over.", self.url, self._config.minutes)
                self.close()
                return
            if self._gate is None or self._running is None or self.answers():
                misses = 0
                continue
            misses = misses + 1 if self._running.child.alive() else _MISSES
            if misses >= _MISSES:
                misses = 0
                self._reopen(self._gate)

    def _pause(self, pause_s: float) -> float:
        left = pause_s if self._ends_s is None else self._ends_s - time.monotonic()
        return max(0.0, min(pause_s, left))

    def _reopen(self, gate: Gate) -> None:
        pause_s = 5.0
        logger.warning("The link %s has died; it is being reopened.", self.url)
        while not self._closing.is_set():
            if self._ends_s is not None and time.monotonic() >= self._ends_s:
                return
            if self._running is not None:
                self._running.close()
            try:
                kind, running = _open_first(self._wanted, gate, self._config)
            except FastSDError as err:
                logger.warning("%s Trying again in %.0f s.", err.problem, pause_s)
                if self._closing.wait(self._pause(pause_s)):
                    return
                pause_s = min(_LONGEST_PAUSE_S, pause_s * 2)
                continue
            with self._lock:
                if self._closing.is_set():
                    running.close()
                    return
                self._take(kind, running)
            logger.warning("The new link is %s (user and password are the same).", self.url)
            if self._on_change is not None:
                self._on_change(self)
            return
