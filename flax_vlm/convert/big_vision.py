# SPDX-License-Identifier: Apache-2.0
"""ViT, SigLIP and SigLIP 2 (NaFlex too) as big_vision publishes them: one .npz file, read only.

There is no config: the sizes are those of the arrays, and what no array tells is big_vision's own
(tanh GELU, epsilon 1e-6, a square grid, in texts the last token). An image size is the grid's:
So400m/14 at 384 pixels is read as 378, 27 patches of 14; `with_image_size(loaded, 384)` brings the
unseen border back.

Arrays may lie below "params/" (with the optimizer's beside them, which are left out) or at the top,
and a scanned encoder holds all layers in one array. Not held: a hidden layer before a classifier
(`rep_size` with a head), pooling by maximum or by the first patch, text towers of another kind, and
files older than big_vision.

Source: google-research/big_vision 0127fb6: models/vit.py, models/proj/image_text/two_towers.py,
text_transformer.py and naflex_vit.py, utils.py.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from flax import linen as nn

from flax_vlm.convert.family import Config, Family
from flax_vlm.convert.npz_files import list_arrays
from flax_vlm.convert.rules import SAME, SCALAR, TOKENS, Layout, Rule, Shape, canonical_names, rule
from flax_vlm.convert.safetensors_files import StoredTensor
from flax_vlm.models.naflex import NaFlexVisionTransformer
from flax_vlm.models.siglip import SigLIP
from flax_vlm.models.vit import VisionTransformer, ViTClassifier

PREFIXES = ("params/", "opt/target/")
PACKED = Layout(((0, 1, 2), (3,)))  # NaFlex embeds patches that are vectors
RENAMES = (
    # positions of 2021 and before
    (r"^((img/)?)Transformer/(posembed_input/)?pos_embedding$", r"\1pos_embedding"),
    # a MAP head without a module of its own
    (
        r"^((img/)?)(probe$|MlpBlock_0/|MultiHeadDotProductAttention_0/|LayerNorm_0/)",
        r"\1MAPHead_0/\3",
    ),
)


def list_tensors(path: pathlib.Path) -> dict[str, StoredTensor]:
    """Returns the arrays of the model: one per layer, positions as [1, P, D].

    Args:
        path: the .npz file, or a folder that holds one.
    """
    arrays = list_arrays(find_npz(path) or path)
    for prefix in PREFIXES:
        if any(name.startswith(prefix) for name in arrays):
            arrays = {n.removeprefix(prefix): t for n, t in arrays.items() if n.startswith(prefix)}
    found: dict[str, StoredTensor] = {}
    for name, tensor in arrays.items():
        if "/encoderblock/" in name:
            found |= _layers(name, tensor)
        elif name.endswith("pos_embedding") and len(tensor.shape) == 3:  # a grid in NaFlex
            rows, columns, width = tensor.shape
            found[name] = _part(name, tensor, (1, rows * columns, width))
        else:
            found[name] = tensor
    return found


def _part(name: str, tensor: StoredTensor, shape: Shape, index: int = 0) -> StoredTensor:
    if tensor.by_column and shape != tensor.shape:
        raise ValueError(f"{tensor.path}: {name} is stored column by column; write it in C order")
    size = math.prod(shape) * tensor.dtype.itemsize
    return dataclasses.replace(tensor, shape=shape, offset=tensor.offset + index * size)


def find_npz(path: pathlib.Path) -> pathlib.Path | None:
    """Returns the .npz file that a path is, or that is the only one in a folder; None if none."""
    if path.is_file():
        return path if path.suffix == ".npz" else None
    files = sorted(path.glob("*.npz"))
    return files[0] if len(files) == 1 else None


def _layers(name: str, tensor: StoredTensor) -> dict[str, StoredTensor]:
    return {
        name.replace("/encoderblock/", f"/encoderblock_{i}/"): _part(
            name, tensor, tensor.shape[1:], i
        )
        for i in range(tensor.shape[0])
    }


def _encoder_fields(tensors: Mapping[str, Shape], prefix: str) -> dict[str, Any]:
    first = f"{prefix}/encoderblock_0"
    name = f"{first}/MultiHeadDotProductAttention_0/query/kernel"
    if name not in tensors or len(tensors[name]) != 3:
        raise ValueError(f"a checkpoint of big_vision must hold {name} [D, N, K], it does not")
    width, num_heads, _ = tensors[name]
    layers = {
        m[1] for n in tensors if (m := re.match(rf"{re.escape(prefix)}/encoderblock_(\d+)/", n))
    }
    mlp_dim = tensors.get(f"{first}/MlpBlock_0/Dense_0/bias", (4 * width,))[0]
    return dict(width=width, num_heads=num_heads, depth=len(layers), mlp_dim=mlp_dim)


def _image_fields(tensors: Mapping[str, Shape], prefix: str) -> dict[str, Any]:
    fields = _encoder_fields(tensors, f"{prefix}Transformer")
    kernel = tensors.get(f"{prefix}embedding/kernel", ())
    positions = tensors.get(f"{prefix}pos_embedding", ())
    if len(kernel) not in (2, 4) or len(positions) != 3:
        raise ValueError(
            f"a checkpoint of big_vision must hold {prefix}embedding/kernel and "
            f"{prefix}pos_embedding, got the shapes {kernel} and {positions}"
        )
    packed = len(kernel) == 2
    patch = (math.isqrt(kernel[0] // 3),) * 2 if packed else kernel[:2]
    class_token = f"{prefix}cls" in tensors
    count = positions[1]
    class_position = class_token and math.isqrt(count) ** 2 == count - 1
    side = math.isqrt(count - class_position)
    has_map = f"{prefix}MAPHead_0/probe" in tensors
    fields |= dict(
        name="naflex_vit" if packed else "vit",
        patch_size=patch[0] if patch[0] == patch[1] else tuple(patch),
        image_size=(side * patch[0], side * patch[1]),
        class_token=class_token,
        class_position=class_position or not class_token,
        pool="cls" if class_token else "map" if has_map else "gap",
    )
    return fields


def read(config: Config, tensors: Mapping[str, Shape]) -> dict[str, Any]:
    """Returns the config of our model, from the shapes of the arrays alone."""
    tensors = {new: tensors[old] for new, old in canonical_names(tensors, (), RENAMES).items()}
    if not any(name.startswith("img/") for name in tensors):
        spec = _image_fields(tensors, "")
        if "pre_logits/kernel" in tensors:
            return {**spec, "embed_dim": tensors["pre_logits/kernel"][1], "head_tanh": True}
        if "head/kernel" in tensors:
            return {**spec, "num_classes": tensors["head/kernel"][1]}
        return spec
    vocabulary = tensors.get("txt/Embed_0/embedding", (0, 0))
    length = tensors.get("txt/pos_embedding", (1, 0))[1]
    head = tensors.get("txt/head/kernel", ())
    if not (vocabulary[0] and length and head):
        raise ValueError(
            "of big_vision's two towers those with its own text transformer and a head are read, "
            "got no txt/Embed_0/embedding, txt/pos_embedding or txt/head/kernel"
        )
    text = _encoder_fields(tensors, "txt/Encoder_0")
    text |= dict(name="text_encoder", vocab_size=vocabulary[0], length=length)
    return dict(name="siglip", image=_image_fields(tensors, "img/"), text=text, embed_dim=head[1])


def write(model: nn.Module) -> dict[str, Any]:
    """Raises ValueError: the format is read only."""
    raise ValueError("the npz files of big_vision are read, not written")


def _layer_norm(tensor: str, leaf: str) -> list[Rule]:
    return [rule(f"{tensor}/{name}", f"{leaf}/{name}") for name in ("scale", "bias")]


def _dense(tensor: str, leaf: str, layout: Layout = SAME) -> list[Rule]:
    return [
        rule(f"{tensor}/kernel", f"{leaf}/kernel", layout),
        rule(f"{tensor}/bias", f"{leaf}/bias"),
    ]


def _attention(tensor: str, leaf: str) -> list[Rule]:
    names = {"query": "q", "key": "k", "value": "v", "out": "o"}
    return [
        r for theirs, ours in names.items() for r in _dense(f"{tensor}/{theirs}", f"{leaf}/{ours}")
    ]


def _mlp(tensor: str, leaf: str) -> list[Rule]:
    return [
        *_dense(f"{tensor}/Dense_0", f"{leaf}/fc1"),
        *_dense(f"{tensor}/Dense_1", f"{leaf}/fc2"),
    ]


def _encoder(tensor: str, leaf: str) -> list[Rule]:
    layer, block = f"{tensor}/encoderblock_{{layer}}", f"{leaf}encoder/blocks"
    return [
        *_layer_norm(f"{layer}/LayerNorm_0", f"{block}/ln1"),
        *_attention(f"{layer}/MultiHeadDotProductAttention_0", f"{block}/attention"),
        *_layer_norm(f"{layer}/LayerNorm_1", f"{block}/ln2"),
        *_mlp(f"{layer}/MlpBlock_0", f"{block}/mlp"),
        *_layer_norm(f"{tensor}/encoder_norm", f"{leaf}encoder/norm"),
    ]


def _image_rules(tower: VisionTransformer, tensor: str, leaf: str) -> list[Rule]:
    pool, ours = f"{tensor}MAPHead_0", f"{leaf}pool"
    packed = isinstance(tower, NaFlexVisionTransformer)
    return [
        *_dense(f"{tensor}embedding", f"{leaf}patches", PACKED if packed else SAME),
        rule(f"{tensor}cls", f"{leaf}cls", TOKENS),
        rule(f"{tensor}pos_embedding", f"{leaf}positions", TOKENS),
        *_encoder(f"{tensor}Transformer", leaf),
        rule(f"{pool}/probe", f"{ours}/probe"),
        *_attention(f"{pool}/MultiHeadDotProductAttention_0", f"{ours}/attention"),
        *_layer_norm(f"{pool}/LayerNorm_0", f"{ours}/norm"),
        *_mlp(f"{pool}/MlpBlock_0", f"{ours}/mlp"),
        *_dense(f"{tensor}{'pre_logits' if tower.head_tanh else 'head'}", f"{leaf}head"),
    ]


def rules(model: nn.Module) -> list[Rule]:
    """Returns the table of an image tower, or of both."""
    if not isinstance(model, SigLIP):
        return _image_rules(model, "", "")
    return [
        *_image_rules(model.image, "img/", "image/"),
        rule("txt/Embed_0/embedding", "text/embedding/embedding"),
        rule("txt/pos_embedding", "text/positions", TOKENS),
        *_encoder("txt/Encoder_0", "text/"),
        *_dense("txt/head", "text/head"),
        rule("t", "logit_scale", SCALAR),
        rule("b", "logit_bias", SCALAR),
    ]


FAMILY = Family(
    (SigLIP, VisionTransformer, ViTClassifier),
    read,
    write,
    rules,
    renames=RENAMES,
    ignored=(),
    resize="bilinear",
    tensors=list_tensors,
)
