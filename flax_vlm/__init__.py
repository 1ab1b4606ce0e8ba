# SPDX-License-Identifier: Apache-2.0
"""flax_vlm: vision-language models in JAX, from one CPU to a TPU pod with the same config."""

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def __getattr__(name: str):
    """Imports the public face on first use, so that `import flax_vlm.nn` stays light."""
    if name == "load":
        from flax_vlm.hub import load

        return load
    raise AttributeError(f"module 'flax_vlm' has no attribute {name!r}, public are {__all__}")
