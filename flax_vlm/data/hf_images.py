# SPDX-License-Identifier: Apache-2.0
"""preprocessor_config.json to image operations and back, pixel for pixel what transformers does.

What transformers resamples with Pillow is the same here to the bit: both round to uint8 after the
resize, and only then rescale and normalise, which flax_vlm does on the device. The processors of
torchvision round once more and are at most one level away in nearly all pixels.

Differs from transformers: images become RGB always; transparency is seen on white, as in
transformers 5 (version 4 showed the colour hidden under it); 16-bit grey is scaled; the EXIF
orientation is applied. An image smaller than the crop is padded as Pillow's processors do, which
may be one pixel off torchvision's.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flax_vlm.build import build, lookup
from flax_vlm.data.anyres import AnyRes, read_any_res
from flax_vlm.data.hf_files import model_type, read_json
from flax_vlm.data.images import IMAGE_OPS, KINDS, ImageOp, pair
from flax_vlm.data.naflex import NaflexRecipe
from flax_vlm.data.tile_rows import TileRows, read_tile_rows

Channels = tuple[float, float, float]

FILE = "preprocessor_config.json"
_HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
_CLIP = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
_SQUARE = {"size": {"height": 224, "width": 224}}
_CROPPED = {
    "size": {"shortest_edge": 224},
    "crop_size": {"height": 224, "width": 224},
    "default_to_square": False,
    "do_center_crop": True,
}
_ALL = {
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "do_center_crop": False,
    "do_pad": False,
    "rescale_factor": 1 / 255,
    "default_to_square": True,
    "crop_size": None,
}
_BILINEAR, _BICUBIC = int(KINDS["bilinear"]), int(KINDS["bicubic"])
_TILE_ROWS = {
    "size": {"longest_edge": 1456},
    "max_image_size": {"longest_edge": 364},
    "resample": int(KINDS["lanczos"]),
    "do_image_splitting": True,
    "do_pad": True,
}

# class of transformers: what its preprocessor_config.json may leave out
DEFAULTS: dict[str, dict[str, Any]] = {
    "ViTImageProcessor": {**_ALL, **_HALF, **_SQUARE, "resample": _BILINEAR},
    "SiglipImageProcessor": {**_ALL, **_HALF, **_SQUARE, "resample": _BICUBIC},
    "CLIPImageProcessor": {**_ALL, **_CLIP, **_CROPPED, "resample": _BICUBIC},
    "BitImageProcessor": {**_ALL, **_CLIP, **_CROPPED, "resample": _BICUBIC},  # DINOv2
    "BlipImageProcessor": {
        **{**_ALL, **_CLIP, "resample": _BICUBIC},
        "size": {"height": 384, "width": 384},
    },
    "LlavaImageProcessor": {**_ALL, **_CLIP, **_CROPPED, "resample": _BICUBIC},
    "LlavaNextImageProcessor": {
        **{**_ALL, **_CLIP, **_CROPPED, "resample": _BICUBIC, "do_pad": True},
        "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
    },
    "LlavaOnevisionImageProcessor": {
        **{**_ALL, **_CLIP, "resample": _BICUBIC, "do_pad": True},
        "size": {"height": 384, "width": 384},
        "image_grid_pinpoints": [[384 * m, 384 * n] for m in range(1, 7) for n in range(1, 7)],
    },
    "Idefics3ImageProcessor": {**_ALL, **_HALF, **_TILE_ROWS},
    "SmolVLMImageProcessor": {**_ALL, **_HALF, **_TILE_ROWS},
    "Siglip2ImageProcessor": {
        **{**_ALL, **_HALF, "resample": _BILINEAR},
        **{"patch_size": 16, "max_num_patches": 256},
    },
}
# model_type of config.json: its class, for a file that does not name one
OF_MODEL: dict[str, str] = {
    "vit": "ViTImageProcessor",
    "clip": "CLIPImageProcessor",
    "siglip": "SiglipImageProcessor",
    "siglip2": "Siglip2ImageProcessor",
    "llava": "LlavaImageProcessor",
    "llava_next": "LlavaNextImageProcessor",
    "llava_onevision": "LlavaOnevisionImageProcessor",
    "idefics3": "Idefics3ImageProcessor",
    "smolvlm": "SmolVLMImageProcessor",
    "dinov2": "BitImageProcessor",
    "dinov2_with_registers": "BitImageProcessor",
    "blip-2": "BlipImageProcessor",
    "blip_2": "BlipImageProcessor",  # its vision tower alone
}
# classes that cut pictures into tiles: the reader of their config
LAYOUTS: dict[str, Callable[..., AnyRes | TileRows]] = {
    "LlavaNextImageProcessor": read_any_res,
    "LlavaOnevisionImageProcessor": read_any_res,
    "Idefics3ImageProcessor": read_tile_rows,
    "SmolVLMImageProcessor": read_tile_rows,
}
_KIND_OF = {int(resampling): kind for kind, resampling in KINDS.items()}


@dataclasses.dataclass(frozen=True)
class ImageRecipe:
    """How a checkpoint wants its images.

    Attributes:
        processor: class of transformers, a key of DEFAULTS.
        ops: operations as a config states them (`data.eval_ops`), entries for IMAGE_OPS.
        image_size: (height, width) after them.
        mean: per channel, in units of x / 255; the device normalises (`objective.image_mean`).
        std: per channel, in units of x / 255 (`objective.image_std`).
    """

    processor: str
    ops: tuple[dict[str, Any], ...]
    image_size: tuple[int, int]
    mean: Channels
    std: Channels

    def build_ops(self) -> tuple[ImageOp, ...]:
        """Returns the operations: [H, W, 3] uint8, generator -> [*image_size, 3] uint8."""
        return tuple(build(IMAGE_OPS, op, "image op") for op in self.ops)

    def to_config(self) -> dict[str, Any]:
        """Returns the preprocessor_config.json that transformers reads.

        Raises:
            ValueError: if transformers cannot do the operations; says which and why.
        """
        config: dict[str, Any] = {
            "image_processor_type": self.processor,
            "do_convert_rgb": True,
            "do_resize": False,
            "do_center_crop": False,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }
        names = [op["name"] for op in self.ops]
        if names[:1] == ["pad_to_square"] and self.processor == "LlavaImageProcessor":
            names = names[1:]
        if names not in _EXPORTABLE:
            raise ValueError(
                f"transformers can do one of the image operations {_EXPORTABLE}, got {names}; "
                f"change data.eval_ops"
            )
        for op in self.ops:
            config |= _EXPORTS[op["name"]](op)
        return config


_EXPORTABLE = [
    ["resize"],
    ["resize_small", "center_crop"],
    ["resize", "center_crop"],
    ["center_crop"],
]


def _export_resize(op: Mapping[str, Any]) -> dict[str, Any]:
    height, width = pair(op["size"])
    return _export_kind(op, {"height": height, "width": width})


def _export_resize_small(op: Mapping[str, Any]) -> dict[str, Any]:
    if not op.get("floor", False):
        raise ValueError(
            "transformers rounds the longer side down, got resize_small without it; set floor=True "
            "in data.eval_ops"
        )
    return _export_kind(op, {"shortest_edge": op["size"]})


def _export_kind(op: Mapping[str, Any], size: dict[str, int]) -> dict[str, Any]:
    if not op.get("antialias", True):
        raise ValueError(
            f"transformers always antialiases, got antialias=False in {op['name']}; set it to True "
            f"in data.eval_ops"
        )
    resample = int(lookup(KINDS, op.get("kind", "bilinear"), "kind of resize"))
    return {"do_resize": True, "size": size, "resample": resample}


def _export_center_crop(op: Mapping[str, Any]) -> dict[str, Any]:
    height, width = pair(op["size"])
    return {"do_center_crop": True, "crop_size": {"height": height, "width": width}}


_EXPORTS = {
    "pad_to_square": lambda op: {"do_pad": True},
    "resize": _export_resize,
    "resize_small": _export_resize_small,
    "center_crop": _export_center_crop,
}


def load_image_recipe(folder: str | os.PathLike) -> ImageRecipe | NaflexRecipe | AnyRes | TileRows:
    """Returns how the checkpoint in `folder` wants its images.

    Reads preprocessor_config.json, or the "image_processor" of processor_config.json, where
    transformers 5 puts it; without either, the defaults of the family that config.json names.

    Raises:
        ValueError: if there is none of them, the class is unknown, or it asks for what flax_vlm
            does not do.
    """
    config = read_json(folder, "processor_config.json").get("image_processor")
    config = read_json(folder, FILE) if config is None else config
    name, family = _class_name(config), model_type(folder)
    if name is None and family is None:
        raise ValueError(
            f"{folder} must have a {FILE} that names its image_processor_type, or a config.json "
            f"that names its model_type, got neither"
        )
    if name is None:
        name = lookup(OF_MODEL, family, "model_type for images")
    return image_recipe({**config, "image_processor_type": name})


def _class_name(config: Mapping[str, Any]) -> str | None:
    """Returns the class without what slow, fast and old processors add to its name."""
    for key in ("image_processor_type", "feature_extractor_type"):
        if config.get(key):
            name = config[key].removesuffix("Fast").removesuffix("Pil")
            return name.replace("FeatureExtractor", "ImageProcessor")
    return None


def image_recipe(config: Mapping[str, Any]) -> ImageRecipe | NaflexRecipe | AnyRes | TileRows:
    """Returns the recipe of a preprocessor_config.json, already read.

    Args:
        config: its keys; what is missing or null has the default of "image_processor_type".

    Raises:
        ValueError: see `load_image_recipe`.
    """
    name = _class_name(config)
    defaults = lookup(DEFAULTS, name, "image processor of transformers")
    config = {**defaults, **{key: value for key, value in config.items() if value is not None}}
    if config["do_pad"] and name != "LlavaImageProcessor" and name not in LAYOUTS:
        raise ValueError(f"of {name} do_pad must be false in {FILE}: only LLaVA's is known here")
    mean, std = _normalisation(config)
    if name == "Siglip2ImageProcessor":
        if not config["do_resize"]:
            raise ValueError("NaFlex must resize images to whole patches, got do_resize false")
        sizes = {key: config[key] for key in ("patch_size", "max_num_patches")}
        return NaflexRecipe(mean=mean, std=std, kind=_kind(config), **sizes)
    if name in LAYOUTS:
        if not config["do_resize"]:
            raise ValueError(f"{name} must resize pictures to tiles, got do_resize false")
        return LAYOUTS[name](config, mean, std, _kind(config))
    ops, size = _operations(config)
    return ImageRecipe(name, tuple(ops), size, mean, std)


def _operations(config: Mapping[str, Any]) -> tuple[list[dict[str, Any]], tuple[int, int]]:
    ops: list[dict[str, Any]] = []
    final = None
    if config["do_pad"]:  # with the mean colour, cut off to whole levels as LLaVA does
        mean = _channels(config["image_mean"], "image_mean")
        ops.append({"name": "pad_to_square", "color": tuple(int(255 * m) for m in mean)})
    if config["do_resize"]:
        size = _size(config["size"], config["default_to_square"])
        if isinstance(size, int):
            ops.append({"name": "resize_small", "size": size, "kind": _kind(config), "floor": True})
        else:
            ops.append({"name": "resize", "size": size, "kind": _kind(config)})
            final = size
    if config["do_center_crop"]:
        final = _size(config["crop_size"], True)
        ops.append({"name": "center_crop", "size": final, "fill": 0})
    if not isinstance(final, tuple):
        raise ValueError(
            f"a batch needs images of one size, but {config['image_processor_type']} leaves "
            f"theirs open: it must resize to height and width, or crop; got "
            f"do_resize={config['do_resize']}, size={config.get('size')}, "
            f"do_center_crop={config['do_center_crop']}, crop_size={config['crop_size']}"
        )
    return ops, final


def _size(size: Any, square: bool) -> tuple[int, int] | int:
    """Returns (height, width), or the length of the shortest edge."""
    if isinstance(size, int) and not isinstance(size, bool):
        return pair(size) if square else size
    if isinstance(size, Mapping):
        given = {key: value for key, value in size.items() if value is not None}
        if given.keys() == {"height", "width"}:
            return pair((given["height"], given["width"]))
        if given.keys() == {"shortest_edge"}:
            return pair(given["shortest_edge"])[0]
    if isinstance(size, Sequence) and len(size) == 2:
        return pair(size)
    raise ValueError(
        f"the size in {FILE} must be an int, height and width, or shortest_edge, got {size!r}"
    )


def _kind(config: Mapping[str, Any]) -> str:
    if config["resample"] not in _KIND_OF:
        raise ValueError(
            f"resample in {FILE} must be one of Pillow's {_KIND_OF}, got {config['resample']!r}"
        )
    return _KIND_OF[config["resample"]]


def _normalisation(config: Mapping[str, Any]) -> tuple[Channels, Channels]:
    """Returns mean and std in units of x / 255, for (f x - m) / s with rescale_factor f."""
    mean, std = (0.0,) * 3, (1.0,) * 3
    if config["do_normalize"]:
        mean, std = (_channels(config[key], key) for key in ("image_mean", "image_std"))
    factor = config["rescale_factor"] if config["do_rescale"] else 1.0
    if not isinstance(factor, int | float) or factor <= 0 or min(std) <= 0:
        raise ValueError(
            f"rescale_factor and image_std in {FILE} must be positive, got {factor!r} and {std}"
        )
    unit = 255 * factor
    return tuple(m / unit for m in mean), tuple(s / unit for s in std)


def _channels(value: Any, key: str) -> Channels:
    values = [value] * 3 if isinstance(value, int | float) else value
    if not isinstance(values, Sequence) or len(values) not in (1, 3):
        raise ValueError(f"{key} in {FILE} must be a number or three, got {value!r}")
    return tuple(float(v) for v in (values if len(values) == 3 else values * 3))
