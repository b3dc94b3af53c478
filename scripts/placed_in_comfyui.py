"""Place Flux files for ComfyUI as `fastsd` does, and let ComfyUI's own nodes load them by the workflow that is written.

    python scripts/placed_in_comfyui.py --comfyui path/to/ComfyUI [--gguf path/to/ComfyUI-GGUF]

Nothing of full size is written or held in memory: every file has its real header and a hole behind it, and ComfyUI
builds its networks on torch's meta device (parity_comfyui.py). What is its own: which files its lists show, how it
recognises each, and which names its networks lack. With --gguf the transformer is a GGUF file too, and the node pack
reads it. The exit status is 0 when every node loads and nothing is missing but what parity_uis.py permits.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from placed_flux import place_flux


def main() -> int:
    """Place, write the workflow, load; 0 when nothing is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path, required=True, help="a checkout of it")
    parser.add_argument("--gguf", type=Path, help="a checkout of the node pack ComfyUI-GGUF")
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)  # this script's own child
    options = parser.parse_args()
    if options.load:
        return load(options.comfyui.resolve(), options.gguf, json.loads(options.load.read_text()))
    failed = 0
    for packed in (False, True) if options.gguf else (False,):
        with tempfile.TemporaryDirectory() as scratch:
            about = place(Path(scratch), packed=packed)
            listed = Path(scratch) / "about.json"
            listed.write_text(json.dumps(about))
            words = [sys.executable, __file__, "--comfyui", str(options.comfyui.resolve()), "--load", str(listed)]
            words += ["--gguf", str(options.gguf.resolve())] if packed else []
            failed += subprocess.run(words, check=False, cwd=scratch).returncode != 0
    return 1 if failed else 0


def place(scratch: Path, *, packed: bool) -> dict[str, Any]:
    """Place hollow files for ComfyUI; the data folder and the workflow for its API."""
    from fastsd_helpers.webui.placing.workflows import write_workflow

    placed, ui, places = place_flux(scratch, "comfyui", packed=packed)
    write_workflow(placed, ui, places)
    workflow = json.loads((places.store / "comfyui" / "api-workflows" / "fastsd-flux.json").read_text())
    return {"data": str(places.data), "workflow": workflow}


def load(checkout: Path, pack: Path | None, about: dict[str, Any]) -> int:
    """In ComfyUI's own process: run the loading nodes of the workflow, each value taken from ComfyUI's own lists."""
    from parity_comfyui import open_comfyui
    from parity_uis import PERMITTED
    from ui_answers import Answer, recorded

    sys.argv = ["main.py", "--base-directory", about["data"], "--cpu"]
    sys.path.insert(0, str(checkout))
    import comfy.options

    comfy.options.enable_args_parsing()  # as its main.py does first of all
    open_comfyui(checkout)
    import re
    import warnings

    import nodes
    import torch

    warnings.filterwarnings("ignore", message=".*to a meta parameter in the current model.*")
    if pack is not None:
        sys.path.insert(0, str(pack.parent))
        nodes.NODE_CLASS_MAPPINGS.update(__import__(pack.name).NODE_CLASS_MAPPINGS)
    answer, failed = Answer(), 0
    for node in about["workflow"].values():
        kind = nodes.NODE_CLASS_MAPPINGS.get(node["class_type"])
        if kind is None or not node["class_type"].endswith(("Loader", "LoaderGGUF", "LoaderSimple")):
            continue
        offered = kind.INPUT_TYPES()
        for name, value in node["inputs"].items():
            choices = {**offered["required"], **offered.get("optional", {})}[name][0]
            if isinstance(choices, list) and value not in choices:
                print(f"FAILED {node['class_type']}: {value} is not in its list {choices[:8]}")
                failed += 1
        with torch.device("meta"), recorded(answer, lambda module: ""):
            loaded = getattr(kind(), kind.FUNCTION)(**node["inputs"])
        model = getattr(getattr(loaded[0], "model", None), "model_config", None)
        print(f"loaded {node['class_type']}: {type(model or loaded[0]).__name__}")
    allowed = [names for uis, exports, names, _why in PERMITTED if re.fullmatch(uis, "comfyui")]
    missing = [name for name in answer.missing if not any(re.fullmatch(names, name) for names in allowed)]
    extra = [name for name in answer.extra if "encoder.embed_tokens" not in name]
    print(f"missing: {missing[:5]} ({len(missing)}), not used: {extra[:5]} ({len(extra)}); {len(answer.missing)} noted")
    return 1 if failed or missing or extra else 0


if __name__ == "__main__":
    sys.exit(main())
