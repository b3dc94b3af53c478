"""Programs at the gate: what they send of themselves is enough, with the real gradio_client against a real Gradio."""

import base64
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("aiohttp")

from test_gate_hostile import FORM, PUBLIC, send
from tunnel_doubles import serve, site_handler

from fastsd_helpers.tunnels import Gate, Login, open_gate

LOGIN = Login("fastsd", "right-password-1")
UI_LOGIN = Login("ui", "ui-password-1")


@pytest.fixture(scope="module", params=["open", "with a login of its own"])
def gradio_gate(request: Any) -> Iterator[Gate]:
    """A gate before Gradio's own server, which adds two numbers."""
    gradio = pytest.importorskip("gradio")
    with gradio.Blocks(analytics_enabled=False) as page:
        one, other, total = gradio.Number(), gradio.Number(), gradio.Number()
        gradio.Button().click(lambda first, second: first + second, [one, other], total, api_name="add")
    own = UI_LOGIN if request.param != "open" else None
    page.launch(
        prevent_thread_lock=True, quiet=True, server_name="127.0.0.1", auth=(own.user, own.password) if own else None
    )
    try:
        with open_gate(page.server_port, LOGIN, upstream_login=own) as gate:
            yield gate
    finally:
        page.close()


@pytest.mark.slow
def test_gradio_client_logs_in_with_its_own_argument(gradio_gate: Gate) -> None:
    client = pytest.importorskip("gradio_client")
    found = client.Client(gradio_gate.url, auth=(LOGIN.user, LOGIN.password), verbose=False)
    assert found.predict(2, 3, api_name="/add") == 5
    assert found.submit(4, 5, api_name="/add").result(timeout=30) == 9


@pytest.mark.slow
def test_gradio_client_gets_in_with_a_header_too(gradio_gate: Gate) -> None:
    client = pytest.importorskip("gradio_client")
    basic = base64.b64encode(f"{LOGIN.user}:{LOGIN.password}".encode()).decode()
    found = client.Client(gradio_gate.url, headers={"Authorization": f"Basic {basic}"}, verbose=False)
    assert found.predict(2, 3, api_name="/add") == 5


@pytest.mark.slow
def test_gradio_client_is_told_of_a_wrong_password(gradio_gate: Gate) -> None:
    client = pytest.importorskip("gradio_client")
    exceptions = pytest.importorskip("gradio_client.exceptions")
    with pytest.raises(exceptions.AuthenticationError, match="Invalid credentials"):
        client.Client(gradio_gate.url, auth=(LOGIN.user, "wrong"), verbose=False)


@pytest.mark.slow
def test_requests_with_its_own_argument_and_with_a_kept_cookie(gradio_gate: Gate) -> None:
    requests = pytest.importorskip("requests")
    assert requests.get(f"{gradio_gate.url}/config", timeout=20).status_code == 401
    whole = requests.get(f"{gradio_gate.url}/config", auth=(LOGIN.user, LOGIN.password), timeout=20)
    assert whole.json()["version"]
    with requests.Session() as session:
        form = {"user": LOGIN.user, "password": LOGIN.password}
        session.post(f"{gradio_gate.url}/.fastsd/login", data=form, allow_redirects=False, timeout=20)
        assert session.get(f"{gradio_gate.url}/config", timeout=20).status_code == 200


def test_the_login_of_programs_is_no_door_for_pages_and_passes_for_who_is_in() -> None:
    body = f"username={LOGIN.user}&password={LOGIN.password}".encode()
    with serve(site_handler) as port, open_gate(port, LOGIN) as gate:
        gate.set_public_url(PUBLIC)
        line = "POST /login HTTP/1.1"
        for own in (f"Origin: {PUBLIC}", "Sec-Fetch-Site: same-origin"):
            assert send(gate.port, line, FORM, own, body=body)[0] == 401, "that page is not there"
        status, head, text = send(gate.port, line, FORM, body=body)
        assert (status, text) == (200, b'{"success": true}')
        cookie = next(one for one in head.split("\r\n") if one.startswith("Set-Cookie: ")).split(" ", 1)[1]
        assert cookie.startswith("__Host-fastsd_gate=")
        kept = f"Cookie: {cookie.split(';')[0]}"
        assert send(gate.port, line, FORM, kept, body=body)[2] == b"hello from behind"
        basic = base64.b64encode(f"{LOGIN.user}:{LOGIN.password}".encode()).decode()
        for bad, answer in ((b"username=fastsd&password=no", 401), (b"\xff", 400), (b"a" * 5000, 413)):
            assert send(gate.port, line, FORM, body=bad)[0] == answer
        assert send(gate.port, "GET /login HTTP/1.1", f"Authorization: Basic {basic}")[2] == b"hello from behind"
