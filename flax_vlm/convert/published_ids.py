# SPDX-License-Identifier: Apache-2.0
"""Checkpoints on the Hugging Face hub whose family and config are covered: `list_pretrained()`.

Other checkpoints of these families load too; these are the ones whose names, shapes and counts the
tests hold against transformers, timm or open_clip. Licences are those of the model cards; cards of
openai/* name none, and theirs is that of github.com/openai/CLIP. Those of dinov2-with-registers are
those of github.com/facebookresearch/dinov2 and those of siglip2-base-patch16-224 and
siglip2-large-patch16-256 those of github.com/google-research/big_vision, code and weights alike.
A card may change: read it before you ship weights. Some repositories hold their weights only as
pickles, which are refused with the command that converts them.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class PublishedCheckpoint:
    """A checkpoint that `flax_vlm.load` reads.

    Attributes:
        hub_id: "owner/name".
        family: a key of convert.FAMILIES.
        image_size: pixels of both sides; None for any size and aspect (NaFlex).
        parameters: number of scalars, of both towers where there are two.
        licence: of the weights.
        source: the paper, as arXiv id.
    """

    hub_id: str
    family: str
    image_size: int | None
    parameters: int
    licence: str
    source: str


# family, licence, paper: {hub id: (image_size, parameters)}
_IDS: dict[tuple[str, str, str], dict[str, tuple[int | None, int]]] = {
    ("vit", "apache-2.0", "arXiv:2010.11929"): {
        "google/vit-base-patch16-224": (224, 86_567_656),
        "google/vit-base-patch16-224-in21k": (224, 86_389_248),
        "google/vit-large-patch16-224": (224, 304_326_632),
    },
    ("clip", "mit", "arXiv:2103.00020"): {
        "openai/clip-vit-base-patch32": (224, 151_277_313),
        "openai/clip-vit-base-patch16": (224, 149_620_737),
        "openai/clip-vit-large-patch14": (224, 427_616_513),
        "openai/clip-vit-large-patch14-336": (336, 427_944_193),
    },
    ("siglip", "apache-2.0", "arXiv:2303.15343"): {
        "google/siglip-base-patch16-224": (224, 203_155_970),
        "google/siglip-base-patch16-256": (256, 203_202_050),
        "google/siglip-base-patch16-512": (512, 203_791_874),
        "google/siglip-large-patch16-256": (256, 652_150_786),
        "google/siglip-large-patch16-384": (384, 652_478_466),
        "google/siglip-so400m-patch14-384": (384, 877_960_498),
    },
    ("siglip", "apache-2.0", "arXiv:2502.14786"): {  # SigLIP 2 of fixed resolution
        "google/siglip2-base-patch16-224": (224, 375_187_970),
        "google/siglip2-large-patch16-256": (256, 881_526_786),
        "google/siglip2-so400m-patch14-384": (384, 1_136_008_498),
        "google/siglip2-so400m-patch16-256": (256, 1_135_670_962),
        "google/siglip2-so400m-patch16-512": (512, 1_136_555_698),
        "google/siglip2-giant-opt-patch16-384": (384, 1_871_885_426),
    },
    ("siglip2", "apache-2.0", "arXiv:2502.14786"): {
        "google/siglip2-base-patch16-naflex": (None, 375_234_050),
    },
    ("dinov2", "apache-2.0", "arXiv:2304.07193"): {
        "facebook/dinov2-small": (518, 22_056_576),
        "facebook/dinov2-base": (518, 86_580_480),
        "facebook/dinov2-large": (518, 304_368_640),
        "facebook/dinov2-giant": (518, 1_136_480_768),
    },
    ("dinov2_with_registers", "apache-2.0", "arXiv:2309.16588"): {
        "facebook/dinov2-with-registers-base": (518, 86_583_552),
        "facebook/dinov2-with-registers-large": (518, 304_372_736),
    },
    ("open_clip", "mit", "arXiv:2303.15389"): {
        "timm/eva02_base_patch16_clip_224.merged2b_s8b_b131k": (224, 149_691_137),
        "timm/eva02_large_patch14_clip_336.merged2b_s6b_b61k": (336, 428_083_137),
    },
}


def list_pretrained() -> list[PublishedCheckpoint]:
    """Returns the published checkpoints that are covered, family by family."""
    return [
        PublishedCheckpoint(hub_id, family, image_size, parameters, licence, source)
        for (family, licence, source), ids in _IDS.items()
        for hub_id, (image_size, parameters) in ids.items()
    ]
