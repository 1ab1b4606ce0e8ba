# SPDX-License-Identifier: Apache-2.0
"""flax_vlm: vision-language models in JAX, from one CPU to a TPU pod with the same config."""

import importlib

__version__ = "0.1.0"
# name: the module it is imported from
_PUBLIC = {
    "list_pretrained": "flax_vlm.convert.published_ids",
    "load": "flax_vlm.hub",
    "save_pretrained": "flax_vlm.hub",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str):
    """Imports the public face on first use, so that `import flax_vlm.nn` stays light."""
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'flax_vlm' has no attribute {name!r}, public are {__all__}")
