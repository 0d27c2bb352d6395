"""Makes vLLM serve a folder of this package: `vllm serve FOLDER --max-model-len 4096`, without remote code.

vLLM (0.32) calls `register` in each of its processes, by the entry point `vllm.general_plugins` of pyproject.toml. It has a
Phi-3-vision of its own, whose weights, names and vision tower (CLIP ViT-L/14-336, and no other) are the official ones; what it
does not have without remote code are the config and the processor, which this package registers.
"""


def register() -> None:
    """Registers the Auto classes, and vLLM's model with crops that are not padded, under the name that config.json has."""
    from vllm import ModelRegistry

    import phi3v  # noqa: F401

    # By name: vLLM imports it when a model needs it, and not before CUDA is set up.
    ModelRegistry.register_model("Phi3VForCausalLM", "phi3v.vllm_model:Phi3VForVLLM")
