"""What diffusers and peft make of a LoRA file: loaded by their own code into real classes of small widths."""

import numpy as np
import tiny_families

_PIPELINES = {
    "sd15": "StableDiffusionPipeline",
    "sd21": "StableDiffusionPipeline",
    "sdxl": "StableDiffusionXLPipeline",
    "flux": "FluxPipeline",
}


class DiffusersReader:
    """The models of one family at small widths, which LoRA are loaded into and taken out of again."""

    def __init__(self, family):
        import diffusers
        import torch

        with torch.device("meta"):
            parts = tiny_families.build_parts(family)
        self.family = family
        # Their own weights do not matter, and are whatever the memory held.
        self.parts = {
            part: model.to_empty(device="cpu")
            for part, model in parts.items()
            if part != "vae" and type(model).__name__ != "T5EncoderModel"
        }
        self.pipeline = getattr(diffusers, _PIPELINES[family])

    def shapes(self):
        """(part, Diffusers path) -> shape of the weight."""
        return {
            (part, name.removeprefix("text_model.")): tuple(module.weight.shape)
            for part, model in self.parts.items()
            for name, module in model.named_modules()
            if type(module).__name__ in ("Linear", "Conv2d", "LoRACompatibleLinear")
        }

    def changes(self, path):
        """What diffusers adds to every weight: (part, Diffusers path) -> float64."""
        options = {"return_lora_metadata": True}
        options |= {"return_alphas": True} if self.family == "flux" else {"unet_config": self.parts["unet"].config}
        state, alphas, metadata = self.pipeline.lora_state_dict(str(path), **options)
        found = {}
        for part, model in self.parts.items():
            if not any(name.startswith(f"{part}.") for name in state):
                continue
            try:
                self._load(part, model, dict(state), alphas, metadata)
                found |= {(part, name.removeprefix("text_model.")): delta for name, delta in _adapted(model)}
            finally:
                _take_out(model)
        return found

    def _load(self, part, model, state, alphas, metadata):
        alphas = {name: float(alpha) for name, alpha in (alphas or {}).items()} or None
        if part in ("unet", "transformer"):
            load = getattr(self.pipeline, f"load_lora_into_{part}")
            load(state, alphas, model, metadata=metadata, low_cpu_mem_usage=True)
        else:
            load = self.pipeline.load_lora_into_text_encoder
            load(state, alphas, model, prefix=part, metadata=metadata, low_cpu_mem_usage=True)


def _adapted(model):
    for name, module in model.named_modules():
        if not hasattr(module, "lora_A") or not len(module.lora_A):
            continue
        (adapter,) = module.lora_A
        down, up = (side[adapter].weight.detach().double().numpy() for side in (module.lora_A, module.lora_B))
        yield name, module.scaling[adapter] * (up.reshape(len(up), -1) @ down.reshape(len(down), -1)).astype(np.float64)


def _take_out(model):
    from diffusers.utils.peft_utils import recurse_remove_peft_layers

    recurse_remove_peft_layers(model)
    if hasattr(model, "peft_config"):
        del model.peft_config
    model._hf_peft_config_loaded = False
