# SPDX-License-Identifier: Apache-2.0
"""flax_vlm: vision-language models in JAX, from one CPU to a TPU pod with the same config."""

__version__ = "0.1.0"
_HUB = ("load", "save_pretrained")  # of flax_vlm.hub
__all__ = ["__version__", *_HUB]


def __getattr__(name: str):
    """Imports the public face on first use, so that `import flax_vlm.nn` stays light."""
    if name in _HUB:
        from flax_vlm import hub

        return getattr(hub, name)
    raise AttributeError(f"module 'flax_vlm' has no attribute {name!r}, public are {__all__}")
