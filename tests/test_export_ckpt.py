"""A session's model as .ckpt: the weights of the .safetensors, in a file that AUTOMATIC1111's safe loader accepts."""

import re
import zipfile

import pytest
from installed import require_installed

torch = pytest.importorskip("torch")

from dreambooth_runs import config_for  # noqa: E402

from fastsd_helpers.dreambooth import export, train  # noqa: E402
from fastsd_helpers.dreambooth.results.learned import ExportConfig  # noqa: E402
from fastsd_helpers.errors import CheckpointError, SettingsError  # noqa: E402
from fastsd_helpers.files import sha256_of  # noqa: E402
from fastsd_helpers.forms.widgets.form import show_form  # noqa: E402

require_installed("diffusers")


@pytest.mark.numeric
def test_a_session_is_exported_as_ckpt_with_the_same_weights(small_base, small_session) -> None:
    from safetensors.torch import load_file

    train(config_for(small_base, unet_steps=1, text_encoder_steps=0), small_session)
    whole = export(ExportConfig(), small_session)
    made = export(ExportConfig(format="ckpt"), small_session)
    assert made.path == whole.path.with_suffix(".ckpt")
    assert made.sha256 == sha256_of(made.path)
    with zipfile.ZipFile(made.path) as archive:
        # The pattern of AUTOMATIC1111's modules/safe.py.
        assert all(re.fullmatch(r"([^/]+)/((data/\d+)|version|(data\.pkl))", name) for name in archive.namelist())
    loaded, wanted = torch.load(made.path, weights_only=True)["state_dict"], load_file(whole.path)
    assert loaded.keys() == wanted.keys()
    assert all(torch.equal(loaded[name], wanted[name]) for name in wanted)
    with pytest.raises(CheckpointError, match="exists already"):
        export(ExportConfig(format="ckpt"), small_session)
    assert sorted(path.suffix for path in small_session.exports.glob("*unet-1*")) == [".ckpt", ".safetensors"]


@pytest.mark.parametrize(("format", "out"), [("ckpt", "a.safetensors"), ("safetensors", "a.ckpt"), ("lora", "a.ckpt")])
def test_the_name_must_fit_the_format(format, out) -> None:
    with pytest.raises(SettingsError, match=rf"must end in \.\w+, because format \(--format\) is {format}"):
        ExportConfig(format=format, out=out)


def test_the_notebooks_form_offers_it() -> None:
    form = show_form(ExportConfig)
    form.update(format="ckpt")
    assert form.config() == ExportConfig(format="ckpt")
