"""Phi3VConfig: reads the official config.json of Phi-3-vision and Phi-3.5-vision as it is and writes one they still read."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import CLIPVisionConfig, Phi3Config, PreTrainedConfig

# CLIP ViT-L/14 at 336 pixels, the only vision tower the official models were released with.
# Source: https://huggingface.co/openai/clip-vit-large-patch14-336 (config.json, vision_config)
CLIP_VIT_L_14_336 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
}

# Where those who trust remote code find the official one; this package never asks for it.
OFFICIAL_CODE = "microsoft/Phi-3.5-vision-instruct--"
AUTO_MAP = {
    "AutoConfig": f"{OFFICIAL_CODE}configuration_phi3_v.Phi3VConfig",
    "AutoModelForCausalLM": f"{OFFICIAL_CODE}modeling_phi3_v.Phi3VForCausalLM",
}

# What the official code and vLLM read, and this package only checks.
# Source: https://huggingface.co/microsoft/Phi-3.5-vision-instruct (config.json)
EMBD_LAYER = {
    "embedding_cls": "image",
    "hd_transform_order": "sub_glb",
    "projection_cls": "mlp",
    "use_hd_transform": True,
    "with_learnable_separator": True,
}
IMG_PROCESSOR = {
    "image_dim_out": 1024,
    "model_name": "openai/clip-vit-large-patch14-336",
    "name": "clip_vision_model",
    "num_img_tokens": 144,
}


@strict
class Phi3VConfig(Phi3Config):
    """Configuration of a Phi-3-vision or Phi-3.5-vision model.

    Everything of [`Phi3Config`] applies to the language model. A small model for tests is only a config: pass smaller
    sizes here and a smaller `vision_config`.

    Args:
        vision_config (CLIPVisionConfig | dict, optional): the vision tower; CLIP ViT-L/14-336 when missing, as in the
            official config.json. Crop size, patch size, width and depth of the tower all come from it.
        image_token_id (int): id of `<|image|>`, which stands for one image feature in input_ids (official: 32044).
        end_token_id (int): id of `<|end|>`, which ends a turn; generation stops there and at `pad_token_id`
            (`<|endoftext|>`) (official: 32007).
        embd_layer, img_processor (dict, optional): kept as they are in the official config.json, and as they are there when
            missing, for the official code and vLLM.

    Raises:
        ValueError: if the crop size is not a whole, even number of patches, or if `embd_layer` asks for another
            layout of the image than the one that both released models use.
    """

    model_type = "phi3_v"
    # One and the same: transformers before 5.20 looks for the second name, later ones for the first.
    sub_configs_defaults = {"vision_config": CLIPVisionConfig}  # type: ignore[dict-item]
    sub_configs = {"vision_config": CLIPVisionConfig}

    max_position_embeddings: int = 131072
    # `<s>` and `</s>`; what ends an answer is `stop_token_ids`. Null in some copies of the official file.
    eos_token_id: int | list[int] | None = 2
    # A CLIPVisionConfig, or until __post_init__ the dict that it is made of.
    vision_config: Any = None
    image_token_id: int = 32044
    end_token_id: int = 32007
    embd_layer: dict | None = None
    img_processor: dict | None = None

    def __post_init__(self, **kwargs):
        # The official file pins flash_attention_2 there; the kernel is the caller's choice (`attn_implementation=`).
        kwargs.pop("_attn_implementation", None)
        # It also names the remote code, which is not used and must not be asked for.
        kwargs.pop("auto_map", None)
        rope = kwargs.get("rope_scaling")
        if rope and rope.get("type") == "su":
            # The official name of what transformers calls longrope.
            factors = {key: value for key, value in rope.items() if key != "type"}
            factor = self.max_position_embeddings / self.original_max_position_embeddings
            kwargs["rope_scaling"] = {**factors, "rope_type": "longrope", "factor": factor}
        if not isinstance(self.vision_config, PreTrainedConfig):
            self.vision_config = CLIPVisionConfig(**{**CLIP_VIT_L_14_336, **(self.vision_config or {})})
        if self.embd_layer is None:
            self.embd_layer = dict(EMBD_LAYER)
        if self.img_processor is None:
            self.img_processor = dict(IMG_PROCESSOR)
        super().__post_init__(**kwargs)
        layout = {"hd_transform_order": "sub_glb", "use_hd_transform": True, "with_learnable_separator": True}
        for key, expected in layout.items():
            found = self.embd_layer.get(key, expected)
            if found != expected:
                raise ValueError(
                    f"config.json: embd_layer.{key} is {found!r}, and only {expected!r} is supported: it is what "
                    "Phi-3-vision-128k-instruct and Phi-3.5-vision-instruct were released with"
                )
        size, patch = self.vision_config.image_size, self.vision_config.patch_size
        if size % (2 * patch):
            raise ValueError(
                f"config.json: vision_config.image_size is {size}, expected a multiple of {2 * patch}, twice the "
                f"patch_size {patch}, because 2 x 2 neighbouring patches become one image token"
            )

    @property
    def stop_token_ids(self) -> list[int]:
        """Ids that end an answer: `<|end|>` and `<|endoftext|>`."""
        return [self.end_token_id, self.pad_token_id]  # type: ignore[list-item]

    @property
    def crop_tokens_per_side(self) -> int:
        """Image tokens along one side of a crop (official: 336 / 14 / 2 = 12)."""
        return self.vision_config.image_size // self.vision_config.patch_size // 2

    def to_dict(self) -> dict:
        """Serialises with the official names: the official code reads `rope_scaling` of type `su` and `rope_theta`.

        `auto_map` names that code on the hub: a file with the relative names of the official config.json would send those who
        trust remote code to files that are not there.
        """
        output = super().to_dict()
        rope = output.pop("rope_parameters", None) or {}
        if rope.get("rope_type") == "longrope":
            output["rope_scaling"] = {
                "type": "su",
                "short_factor": rope["short_factor"],
                "long_factor": rope["long_factor"],
            }
        if "rope_theta" in rope:
            output["rope_theta"] = rope["rope_theta"]
        return output | {"auto_map": dict(AUTO_MAP)}

    def to_diff_dict(self) -> dict:
        """As `to_dict`, what config.json holds; `torch_dtype` is the name that transformers 4.x reads, 5 takes either."""
        output = super().to_diff_dict()
        return output | ({"torch_dtype": output["dtype"]} if output.get("dtype") else {})


__all__ = ["Phi3VConfig"]
