"""Makes vLLM serve a folder of this package: `vllm serve FOLDER --max-model-len 4096`, without remote code.

vLLM (0.32) calls `register` in each of its processes, by the entry point `vllm.general_plugins` of pyproject.toml. It has a
Phi-3-vision of its own, whose weights, names and vision tower (CLIP ViT-L/14-336, and no other) are the official ones; what it
does not have without remote code are the config and the processor, which this package registers.
"""

import sys
from pathlib import Path


def register() -> None:
    """Registers the Auto classes, and vLLM's model with crops that are not padded, under the name that config.json has.

    Raises:
        SystemExit: if the command line names an adapter of this model instead of a model.
    """
    refuse_adapter(sys.argv[1:])

    from vllm import ModelRegistry

    import phi3v  # noqa: F401

    # By name: vLLM imports it when a model needs it, and not before CUDA is set up.
    ModelRegistry.register_model("Phi3VForCausalLM", "phi3v.vllm_model:Phi3VForVLLM")


def refuse_adapter(arguments: list[str]) -> None:
    """Ends the process with one line if an argument is the folder of an adapter of this model.

    vLLM tells its plugins nothing of what it is about to load, and would itself end with a traceback that asks for a
    config.json.
    """
    for argument in arguments:
        # Also --model=FOLDER and --lora-modules NAME=FOLDER.
        folder = Path(argument.rpartition("=")[2])
        if is_adapter(folder):
            print(
                f"error: {folder}: expected a whole model, found an adapter, and vLLM has no LoRA for this model; merge it, "
                f"python -m finetuning.merge {folder} TO, and serve TO",
                file=sys.stderr,
            )
            raise SystemExit(2)


def is_adapter(folder: Path) -> bool:
    """Whether PEFT wrote `folder`, and this package the processor in it."""
    try:
        if (folder / "config.json").exists() or not (folder / "adapter_config.json").exists():
            return False
        # preprocessor_config.json, processor_config.json or both, by the version of transformers.
        return any('"Phi3V' in file.read_text(encoding="utf-8") for file in folder.glob("*processor_config.json"))
    except (OSError, ValueError):  # also an argument that is no path, such as a long JSON
        return False
