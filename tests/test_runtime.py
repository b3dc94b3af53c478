"""Where we are, what the machine has, secrets that stay secret, and the fault points."""

import io
import logging
import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest

from fastsd_helpers import runtime
from fastsd_helpers.errors import FastSDError

ROOT = Path(__file__).resolve().parents[1]
TOKEN = "hf_" + "a1B2" * 8


@pytest.fixture(autouse=True)
def _no_secrets_left_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "_handed_out", set())
    for name in ("COLAB_RELEASE_TAG", "KAGGLE_KERNEL_RUN_TYPE", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)


def pretend_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    shell = types.SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))


class FakeUserdata(types.ModuleType):
    """Colab's `userdata`: one `get` that answers or raises one of Colab's own three errors; we call nothing else."""

    class SecretNotFoundError(Exception):
        pass

    class NotebookAccessError(Exception):
        pass

    def __init__(self, answer: str | Exception) -> None:
        super().__init__("google.colab.userdata")
        self._answer = answer

    def get(self, _key: str) -> str:
        if isinstance(self._answer, Exception):
            raise self._answer
        return self._answer


class ColabError(Exception):
    pass


def pretend_colab(monkeypatch: pytest.MonkeyPatch, answer: str | Exception) -> None:
    pretend_notebook(monkeypatch)
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release-colab_20260819")
    colab = types.ModuleType("google.colab")
    colab.userdata = FakeUserdata(answer)
    colab.errors = types.ModuleType("google.colab.errors")
    colab.errors.Error = ColabError
    monkeypatch.setitem(sys.modules, "google", types.ModuleType("google"))
    for name, module in (("", colab), (".userdata", colab.userdata), (".errors", colab.errors)):
        monkeypatch.setitem(sys.modules, f"google.colab{name}", module)


# ------------------------------------------------------------------------------------------------ where


def test_a_terminal_is_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "IPython", raising=False)
    assert runtime.where() == "terminal"
    assert not runtime.in_notebook()


def test_a_kernel_is_a_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_notebook(monkeypatch)
    assert runtime.where() == "jupyter"
    assert runtime.in_notebook()


def test_ipython_in_a_terminal_is_no_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: types.SimpleNamespace()))
    assert runtime.where() == "terminal"


@pytest.mark.parametrize(("variable", "place"), [("COLAB_RELEASE_TAG", "colab"), ("KAGGLE_KERNEL_RUN_TYPE", "kaggle")])
def test_a_command_started_from_a_hosted_notebook_knows_where_it_is(
    monkeypatch: pytest.MonkeyPatch, variable: str, place: str
) -> None:
    monkeypatch.setenv(variable, "x")
    assert runtime.where() == place


def test_versions_name_python_and_what_is_installed() -> None:
    found = runtime.versions()
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert "bitsandbytes" not in found or found["bitsandbytes"]


# ------------------------------------------------------------------------------------------------- sums


@pytest.mark.parametrize(
    ("chosen", "asked"),
    [
        (None, "AUTO,STRICT"),
        ("", "AUTO,STRICT"),
        ("AVX2", "AVX2,STRICT"),
        ("AVX512,STRICT", "AVX512,STRICT"),
        ("COMPATIBLE", "COMPATIBLE"),  # MKL has no strict form of it
        ("OFF", "OFF"),
    ],
)
def test_mkl_is_asked_for_repeatable_sums_in_the_branch_that_a_user_chose(
    monkeypatch: pytest.MonkeyPatch, chosen: str | None, asked: str
) -> None:
    monkeypatch.delenv("MKL_CBWR", raising=False)
    if chosen is not None:
        monkeypatch.setenv("MKL_CBWR", chosen)
    runtime.make_cpu_sums_repeatable()
    assert os.environ["MKL_CBWR"] == asked


# ----------------------------------------------------------------------------------------------- secrets


def test_the_environment_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_colab(monkeypatch, "from colab")
    monkeypatch.setenv("HF_TOKEN", f" {TOKEN}\n")
    assert runtime.secret("HF_TOKEN", prompt=lambda: "typed") == TOKEN


def test_then_colabs_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_colab(monkeypatch, "from colab")
    assert runtime.secret("HF_TOKEN", prompt=lambda: "typed") == "from colab"


def test_then_what_the_user_types(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_colab(monkeypatch, FakeUserdata.SecretNotFoundError())
    assert runtime.secret("HF_TOKEN", prompt=lambda: "typed") == "typed"


def test_a_secret_that_is_nowhere_is_none() -> None:
    assert runtime.secret("HF_TOKEN") is None
    assert runtime.secret("HF_TOKEN", prompt=lambda: "  ") is None


def test_a_colab_secret_without_access_says_what_to_switch_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pretend_colab(monkeypatch, FakeUserdata.NotebookAccessError())
    assert runtime.secret("HF_TOKEN") is None
    assert "HF_TOKEN is not switched on for this notebook" in caplog.text


def test_a_colab_that_does_not_answer_is_one_sentence_and_a_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_colab(monkeypatch, ColabError("timed out"))
    with pytest.raises(FastSDError) as caught:
        runtime.secret("HF_TOKEN")
    assert "HF_TOKEN" in caught.value.problem
    assert "again" in caught.value.hint


def test_a_command_in_colab_does_not_ask_the_kernels_service(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_colab(monkeypatch, AssertionError("must not be asked"))
    monkeypatch.delitem(sys.modules, "IPython")
    assert runtime.secret("HF_TOKEN") is None


@pytest.mark.parametrize("missing", [False, True])
def test_kaggles_secret_is_found_or_missed(monkeypatch: pytest.MonkeyPatch, missing: bool) -> None:
    class BackendError(Exception):
        pass

    class Client:
        def get_secret(self, _name: str) -> str:
            if missing:
                raise BackendError("Unexpected response from the service")
            return "from kaggle"

    pretend_notebook(monkeypatch)
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    # The three names that Kaggle's own module has and that we use.
    kaggle = types.SimpleNamespace(UserSecretsClient=Client, BackendError=BackendError, CredentialError=KeyError)
    monkeypatch.setitem(sys.modules, "kaggle_secrets", kaggle)
    assert runtime.secret("HF_TOKEN") == (None if missing else "from kaggle")


def test_another_python_on_kaggle_has_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_notebook(monkeypatch)
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    monkeypatch.setitem(sys.modules, "kaggle_secrets", None)  # makes the import fail, as where it is not installed
    assert runtime.secret("HF_TOKEN") is None


def test_every_secret_handed_out_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTSD_TEST_LONG", "correct-horse-battery")
    monkeypatch.setenv("FASTSD_TEST_SHORT", "correct-horse")
    runtime.secret("FASTSD_TEST_SHORT")
    runtime.secret("FASTSD_TEST_LONG")
    assert runtime.redact("a correct-horse-battery, a correct-horse") == "a •••, a •••"
    monkeypatch.setenv("FASTSD_TEST_SLIP", "a b")
    runtime.secret("FASTSD_TEST_SLIP")
    assert runtime.redact("it holds a blank, and is a b") == "it holds a blank, and is •••"


def test_what_is_shaped_like_a_token_is_hidden_too() -> None:
    assert TOKEN not in runtime.redact(f"Authorization: Bearer {TOKEN}.")
    assert runtime.redact("hf_hub_download of one file") == "hf_hub_download of one file"


def test_the_log_hides_secrets_in_messages_arguments_and_tracebacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTSD_TEST_SECRET", "open-sesame")
    runtime.secret("FASTSD_TEST_SECRET")
    shown = io.StringIO()
    with runtime.show_log(shown) as log:
        log.info("the word is %s", "open-sesame")
        log.info("open-sesame")
        try:
            raise ValueError("bad word open-sesame")
        except ValueError:
            log.exception("failed")
    assert "open-sesame" not in shown.getvalue()
    assert shown.getvalue().count("•••") == 4  # the traceback quotes the source line too
    assert "ValueError" in shown.getvalue()


def test_other_handlers_see_no_secret_either(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("FASTSD_TEST_SECRET", "open-sesame")
    runtime.secret("FASTSD_TEST_SECRET")
    logging.getLogger("fastsd_helpers").warning("the word is %s", "open-sesame")
    assert "•••" in caplog.text
    assert "open-sesame" not in caplog.text


def test_show_log_leaves_the_logger_as_it_was() -> None:
    logger = logging.getLogger("fastsd_helpers")
    before = logger.level, logger.propagate, list(logger.handlers)
    shown = io.StringIO()
    with runtime.show_log(shown):
        logger.info("inside")
    logger.info("outside")
    assert shown.getvalue() == "inside\n"
    assert (logger.level, logger.propagate, logger.handlers) == before


def test_starting_the_log_twice_says_everything_once() -> None:
    logger = logging.getLogger("fastsd_helpers")
    first, second = io.StringIO(), io.StringIO()
    with runtime.show_log(first):
        runtime.start_log(second)
        logger.info("once")
    assert (first.getvalue(), second.getvalue()) == ("", "once\n")


# ------------------------------------------------------------------------------------------------ faults

PASS_THREE_TIMES = """
from fastsd_helpers.runtime import fault_point
for number in (1, 2, 3):
    fault_point("other")
    fault_point("save")
    print(number, flush=True)
"""


@pytest.mark.parametrize(
    ("fault", "printed", "killed"),
    [
        ("save:2", "1\n", True),
        ("save:4", "1\n2\n3\n", False),
        ("sav:1", "1\n2\n3\n", False),
        (None, "1\n2\n3\n", False),
    ],
)
def test_a_fault_point_kills_at_the_named_passing_and_no_other(fault: str | None, printed: str, killed: bool) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "FASTSD_FAULT"}
    if fault:
        environment["FASTSD_FAULT"] = fault
    done = subprocess.run(
        [sys.executable, "-c", PASS_THREE_TIMES], capture_output=True, text=True, env=environment, cwd=ROOT, check=False
    )
    assert done.stdout == printed
    assert done.returncode == (-signal.SIGKILL if killed else 0)
