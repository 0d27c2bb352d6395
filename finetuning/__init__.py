"""The machinery that all recipes share; it knows nothing of any one task.

Importing it first silences lines of the pinned libraries that tell a user nothing (and no others).
"""

import logging
import warnings


def _drop(logger: str, text: str) -> None:
    logging.getLogger(logger).addFilter(lambda record: text not in record.getMessage())


# accelerate is never told about accumulation when DeepSpeed does it.
_drop("accelerate.accelerator", "Gradient accumulation steps mismatch")
# An optional kernel for inference on CPUs, which has no backward pass.
_drop("bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward")
# Deprecated names that one pinned library still calls in another.
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
warnings.filterwarnings("ignore", message="`torch.distributed.\\w+` is deprecated", category=FutureWarning)
