"""Place Flux files for Forge Neo as `fastsd` does, and let Forge Neo's own loader load them.

    python scripts/placed_in_forge.py --forge path/to/forge-neo --python path/to/its/environment/bin/python

Nothing of full size is written or held in memory (placed_flux.py). The files given to the loader are those that
`fastsd` wrote into Forge's settings file; which kind each is, which network it makes and which names that lacks is
Forge's own. Replaced are only `modules.shared`, of which it asks two options, the devices that its memory_management
gives out (here torch's meta device), and its Linear layer, by torch's own: Forge's takes whatever a file has, so it
would report nothing. The second time the transformer is a GGUF file, which needs Forge's own layers: there a layer
counts as missing when it got no weight. The exit status is 0 when nothing is missing but what parity_uis.py permits.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import types
from pathlib import Path
from typing import Any


def main() -> int:
    """Place, write the settings, load; 0 when nothing is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forge", type=Path, required=True, help="a checkout of Forge Neo")
    parser.add_argument("--python", default=sys.executable, help="the Python that has what it needs")
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)  # this script's own child
    options = parser.parse_args()
    if options.load:
        return load(options.forge.resolve(), json.loads(options.load.read_text()))
    failed = 0
    for packed in (False, True):
        with tempfile.TemporaryDirectory() as scratch:
            listed = Path(scratch) / "about.json"
            listed.write_text(json.dumps(place(Path(scratch), packed=packed)))
            words = [options.python, __file__, "--forge", str(options.forge.resolve()), "--load", str(listed)]
            failed += subprocess.run(words, check=False, cwd=scratch).returncode != 0
    return 1 if failed else 0


def place(scratch: Path, *, packed: bool) -> dict[str, Any]:
    """Place hollow files for Forge Neo; what its settings file says of them, and the folder of its models."""
    from placed_flux import place_flux

    from fastsd_helpers.webui.placing.forge_settings import choose_in_settings

    placed, ui, places = place_flux(scratch, "forge-neo", packed=packed)
    choose_in_settings(placed, ui, places)
    settings = json.loads((places.store / "config.json").read_text())
    model = places.models / "Stable-diffusion" / settings["sd_model_checkpoint"]
    return {"model": str(model), "beside": settings["forge_additional_modules"], "packed": packed}


def load(checkout: Path, about: dict[str, Any]) -> int:
    """In Forge's own process: `forge_loader` with the model and the files beside it, as a start would call it."""
    from parity_uis import PERMITTED
    from ui_answers import Answer, recorded

    open_forge(checkout, strict=not about["packed"])
    import re
    import warnings

    from backend import loader

    warnings.filterwarnings("ignore", message=".*to a meta parameter in the current model.*")

    answer, parts = Answer(), {}
    split, load_part = loader.split_state_dict, loader.load_state_dict

    def noted(*args: Any, **options: Any) -> Any:
        found, guess = split(*args, **options)
        parts.update({id(tensors): name for name, tensors in found.items()})
        print("taken for", type(guess).__name__, {name: len(tensors) for name, tensors in found.items()})
        return found, guess

    def named(model: Any, tensors: Any, *rest: Any, **options: Any) -> Any:
        with recorded(answer, lambda _module: parts.get(id(tensors), "transformer")):
            done = load_part(model, tensors, *rest, **options)
        # What Forge's own layers did not get they do not report.
        answer.missing += [name for name, layer in model.named_modules() if vars(layer).get("weight", name) is None]
        return done

    loader.split_state_dict, loader.load_state_dict = noted, named
    engine = loader.forge_loader(about["model"], additional_state_dicts=about["beside"])
    print("engine", type(engine).__name__)
    allowed = [names for uis, exports, names, _why in PERMITTED if re.fullmatch(uis, "forge") and exports != "sd21.*"]
    missing = [name for name in answer.missing if not any(re.fullmatch(names, name) for names in allowed)]
    print(f"missing: {missing[:5]} ({len(missing)}), not used: {answer.extra[:5]} ({len(answer.extra)})")
    return 1 if missing or answer.extra else 0


def open_forge(checkout: Path, *, strict: bool) -> None:
    """Make Forge Neo's packages importable on a machine without a GPU, with networks that have no memory."""
    sys.path[:0] = [str(checkout), str(checkout / "modules_forge" / "packages")]
    sys.argv[1:] = ["--cpu"]  # its settings are read at import
    shared = types.ModuleType("modules.shared")
    shared.opts = types.SimpleNamespace(emphasis="Original", sdxl_crop_left=0, sdxl_crop_top=0)
    modules = types.ModuleType("modules")
    modules.shared, modules.__path__ = shared, [str(checkout / "modules")]
    sys.modules |= {"modules": modules, "modules.shared": shared}

    import torch
    from backend import loader, memory_management, operations

    meta = torch.device("meta")
    memory_management.cpu = meta
    for name in [name for name in vars(memory_management) if name.endswith("_device")]:
        if name.startswith(("get_torch", "text_encoder", "unet", "vae")):
            setattr(memory_management, name, lambda *_args, **_rest: meta)
    if strict:

        class Linear(torch.nn.Linear):
            def __init__(self, ins: int, outs: int, bias: bool = True, **_rest: Any) -> None:
                super().__init__(ins, outs, bias, device=meta)

        operations.ForgeOperations.Linear = Linear
    load_component = loader.load_huggingface_component

    def without_memory(guess: Any, component: str, *rest: Any) -> Any:
        with torch.device("cpu" if component == "scheduler" else "meta"):
            return load_component(guess, component, *rest)

    loader.load_huggingface_component = without_memory


if __name__ == "__main__":
    sys.exit(main())
