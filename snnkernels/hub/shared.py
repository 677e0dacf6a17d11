"""What saving and loading share: packages that are asked for late, names of fields."""

from __future__ import annotations

import re
from typing import Any

__all__ = ["HUB_ID", "NUMBERS", "PARTS", "VERSION", "huggingface", "safetensors_package"]

VERSION = 1
PARTS = ("prefix", "body", "suffix")
NUMBERS = ("rate", "error", "clipping", "quantisation", "unevenness", "inherited")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")


def safetensors_package() -> Any:
    """The package safetensors."""
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "saving and loading networks needs safetensors: pip install 'snnkernels[hub]'"
        ) from error
    return safetensors


def huggingface() -> Any:
    """The package huggingface_hub."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError(
            "the Hugging Face Hub needs huggingface_hub: pip install 'snnkernels[hub]'"
        ) from error
    return huggingface_hub
