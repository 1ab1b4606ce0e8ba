# SPDX-License-Identifier: Apache-2.0
"""What is installed. Settings of ruff, pytest and the build stand beside it in pyproject.toml."""

import pathlib
import re

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "flax_vlm/__init__.py").read_text()).group(1)

setup(
    name="flax_vlm",
    version=VERSION,
    description="Vision-language models in JAX, from one CPU to a TPU pod with the same config",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["flax_vlm", "flax_vlm.*"]),
    package_data={"flax_vlm": ["**/*.json", "**/*.csv"]},
    install_requires=[
        "absl-py",
        "filelock",
        "array-record",
        "flax>=0.12.8",
        "grain>=0.2.18",
        "huggingface_hub>=1.0",
        "jax>=0.10.2",
        "jinja2>=3.1",  # chat templates of checkpoints, in its sandbox
        "matplotlib",
        "ml-collections>=1.1",
        "ml-dtypes",  # bfloat16 of checkpoint files
        "numpy>=2.0",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "pillow>=11",
        "scikit-learn",  # ships the handwritten digits
        "scipy",
        "tensorboardX",
        "tensorflow-datasets>=4.9.10",  # used through data_source: TensorFlow is not installed
        "tokenizers>=0.21",
        "tqdm",
    ],
    extras_require={
        "bench": [
            "open_clip_torch>=3.3",
            "timm>=1.0",
            "torch",
        ],  # benchmarks/open_clip_cpu.py alone
        "cuda": ["jax[cuda13]>=0.10.2"],
        # captions: CIDEr-D and BLEU; the parts that are used need no Java
        "eval": ["pycocoevalcap>=1.2", "sacrebleu>=2.4"],
        "notebooks": ["ipykernel", "jupyterlab", "nbclient", "nbformat"],
        "test": [
            "ipykernel",
            "nbclient",
            "nbformat",
            "pytest>=8",
            "pytest-xdist",
            "ruff>=0.12",
            "safetensors>=0.8",  # parity tests; flax_vlm reads and writes the format itself
            "sentencepiece>=0.2",  # trains the small models of the tokenizer tests
            "torch==2.13.0",
            "transformers>=5.24",
        ],
        "tpu": ["jax[tpu]>=0.10.2"],
        "wandb": ["wandb"],
    },
)
