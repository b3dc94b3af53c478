"""Below a cell stand this library's words alone: other libraries' bars, warnings and advice are silenced."""

import importlib.util
import os
import subprocess
import sys

import pytest

# In a process of its own, as in a notebook's kernel: what is silenced stays so.
QUIET = "from fastsd_helpers.forms.quiet import quieten_libraries\n"


def say(code: str) -> str:
    """Everything that a fresh Python says while it runs the code."""
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_VERBOSITY")}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False, timeout=240
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout + done.stderr


BARS = {
    "transformers": "from transformers.utils import logging\nlist(logging.tqdm(range(3), desc='a bar'))",
    "huggingface_hub": "from huggingface_hub.utils import tqdm\nlist(tqdm(range(3), desc='a bar'))",
    "diffusers": "from diffusers.utils import logging\nlist(logging.tqdm(range(3), desc='a bar'))",
    "nncf": "from nncf.common.logging.track_progress import track\nlist(track(range(3), description='a bar'))",
}


@pytest.fixture(scope="module")
def there() -> dict[str, str]:
    """Those of the libraries that are installed."""
    found = {name: code for name, code in BARS.items() if importlib.util.find_spec(name)}
    return found or pytest.skip("none of the libraries is installed (fastsd install dreambooth)")


def test_no_bar_of_a_library_that_is_imported_later_is_drawn(there: dict[str, str]) -> None:
    said = say("\n".join([QUIET, "quieten_libraries()", *there.values(), "print('end')"]))
    assert "a bar" not in said
    assert said.endswith("end\n")


def test_no_bar_of_a_library_that_is_there_already_is_drawn_and_no_advice_logged(there: dict[str, str]) -> None:
    advice = "import logging\n" + "\n".join(
        f"logging.getLogger({name!r}).warning('advice of {name}')" for name in there
    )
    loud = "\n".join(code.replace("a bar", "a loud bar") for code in there.values())
    errors = advice.replace("warning", "error").replace("advice", "error")
    said = say("\n".join([loud, QUIET, "quieten_libraries()", *there.values(), advice, errors]))
    assert "a loud bar" in said, "before there are bars"
    assert "a bar" not in said
    assert "advice of" not in said
    assert "error of" in said, "what goes wrong is said"


def test_what_the_users_own_cell_warns_of_is_still_shown(tmp_path) -> None:
    (tmp_path / "torch_like.py").write_text("import warnings\nwarnings.warn('mine')\n")
    said = say(
        f"{QUIET}quieten_libraries()\nimport warnings, sys\nsys.path.insert(0, {str(tmp_path)!r})\n"
        "import torch_like\nwarnings.warn_explicit('theirs', UserWarning, 'f', 1, module='torch.nn.functional')\n"
        "warnings.warn_explicit('old', FutureWarning, 'f', 1, module='fastsd_helpers.forms')"
    )
    assert "mine" in said
    assert "theirs" not in said
    assert "old" not in said


def test_whoever_asked_a_library_to_speak_hears_it() -> None:
    code = f"import os\nos.environ['TRANSFORMERS_VERBOSITY'] = 'info'\n{QUIET}quieten_libraries()\n"
    assert say(f"{code}print(os.environ['TRANSFORMERS_VERBOSITY'])").strip() == "info"
