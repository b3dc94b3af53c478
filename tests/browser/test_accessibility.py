"""Everybody can use the forms: names for screen readers, contrast, keys, and a narrow cell; in a real JupyterLab."""

from collections.abc import Iterator
from typing import Any

import pytest

from browser.accessibility import find_axe, look_at_everything, open_forms

pytestmark = [pytest.mark.slow, pytest.mark.notebook, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The page with every form."""
    pytest.importorskip("jupyterlab")
    pytest.importorskip("transformers")
    if find_axe() is None:
        pytest.skip("axe-core cannot be had here: no npm, or no registry")
    with open_forms(tmp_path_factory.mktemp("lab")) as page:
        yield page


def test_nothing_serious_in_any_form_and_nothing_out_of_sight_in_a_narrow_cell(shown: Any) -> None:
    told = look_at_everything(shown)
    assert told["serious"] == [], "\n".join(told["serious"])
    assert told["unnamed"] == [], "\n".join(told["unnamed"])
    assert told["out_of_sight"] == [], "\n".join(told["out_of_sight"])
