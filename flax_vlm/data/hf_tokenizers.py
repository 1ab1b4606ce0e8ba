# SPDX-License-Identifier: Apache-2.0
"""The tokenizer of a checkpoint folder in the Hugging Face format, and back.

Whatever the family does to a text (lower case, punctuation, begin and end tokens, padding) ends up
in one tokenizer.json, so what is loaded is an ordinary `flax_vlm.data.text.Tokenizer`.

| family | case | punctuation | around a text | pad |
|---|---|---|---|---|
| CLIP | lower | kept | begin and end token | the end token |
| SigLIP | lower | dropped | end token | the end token, seen by the encoder |
| SigLIP 2 (Gemma) | lower | kept | end token | its own, seen by the encoder |

Differs from transformers: "</s>" or "<|endoftext|>" written in a caption is text, not the token;
texts are padded on the right whatever tokenizer_config.json says; fixed-resolution SigLIP 2 texts
are lower-cased as in training, also where transformers forgets to.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import string
from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors

from flax_vlm.data.hf_files import model_type, read_json
from flax_vlm.data.sentencepiece_model import SPACE, read_sentencepiece
from flax_vlm.data.text import Tokenizer

FILE, CONFIG, SPECIAL = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
_NO_LIMIT = 100_000  # transformers writes 1e30 for "as long as you like"


@dataclasses.dataclass(frozen=True)
class TextRecipe:
    """How a checkpoint wants its texts.

    Attributes:
        tokenizer: texts -> ids.
        length: L that the checkpoint was trained with.
        uses_mask: the text encoder does not see padding; SigLIP's does.
        chat: texts are conversations, whose template writes begin and end tokens out.
    """

    tokenizer: Tokenizer
    length: int
    uses_mask: bool
    chat: bool = False

    def save(self, folder: str | os.PathLike) -> None:
        """Writes tokenizer.json, tokenizer_config.json and special_tokens_map.json.

        transformers 4 and 5 read them with the class for any tokenizer.json. Of conversations it
        puts nothing around a text and pads on the left, for prompts.
        """
        folder, inner = pathlib.Path(folder), self.tokenizer
        ids = {"pad_token": inner.pad_id, "eos_token": inner.eos_id, "bos_token": inner.bos_id}
        special = {k: inner.token(i) for k, i in ids.items() if i is not None}
        names = ["input_ids", "attention_mask"] if self.uses_mask else ["input_ids"]
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": self.length,
            "padding_side": "left" if self.chat else "right",
            "model_input_names": names,
            "clean_up_tokenization_spaces": False,
            **special,
        }
        file = json.loads(inner.to_json())
        if self.chat:
            file["post_processor"] = None
        for name, content in ((FILE, file), (CONFIG, config), (SPECIAL, special)):
            unfinished = folder / f"{name}.part"
            unfinished.write_text(json.dumps(content, indent=2, ensure_ascii=False), "utf-8")
            os.replace(unfinished, folder / name)


@dataclasses.dataclass(frozen=True)
class _Family:
    """What a class of tokenizers does, unless tokenizer_config.json says otherwise."""

    bos: str | None
    eos: str
    pad: str
    begins: bool  # with the begin token
    length: int
    uses_mask: bool


CLASSES: dict[str, _Family] = {
    "CLIPTokenizer": _Family("<|startoftext|>", "<|endoftext|>", "<|endoftext|>", True, 77, True),
    "SiglipTokenizer": _Family(None, "</s>", "</s>", False, 64, False),
    "Siglip2Tokenizer": _Family("<bos>", "<eos>", "<pad>", False, 64, False),
}
# model_type of config.json: its class, for a folder that does not name one
OF_MODEL = {"clip": "CLIPTokenizer", "siglip": "SiglipTokenizer", "siglip2": "Siglip2Tokenizer"}
# classes of transformers 4 and 5 that stand for one of CLASSES, or for any tokenizer.json
_SYNONYMS = {"GemmaTokenizer": "Siglip2Tokenizer"}
_GENERIC = ("PreTrainedTokenizer", "TokenizersBackend")


def load_tokenizer(folder: str | os.PathLike) -> TextRecipe:
    """Returns how the checkpoint in `folder` wants its texts.

    Reads spiece.model for SigLIP, else tokenizer.json, else CLIP's vocab.json and merges.txt;
    with tokenizer_config.json, special_tokens_map.json and config.json.

    Raises:
        ValueError: if there is no tokenizer, or of an unknown class.
    """
    folder = pathlib.Path(folder)
    config = {**read_json(folder, SPECIAL), **read_json(folder, CONFIG)}
    config = {key: value for key, value in config.items() if value is not None}
    name = _class_name(folder, config)
    if name in _GENERIC:
        tokenizer = _from_json(folder)
        tokenizer.no_truncation()
        pad = _content(config.get("pad_token", (tokenizer.padding or {}).get("pad_token")))
        if pad is not None:
            _set_padding(tokenizer, pad, folder)
        uses_mask = "attention_mask" in config.get("model_input_names", ["attention_mask"])
        length = _length(folder, config, None)
        return TextRecipe(Tokenizer(tokenizer.to_str()), length, uses_mask)
    family = CLASSES[name]
    tokenizer = _BUILDERS[name](folder, config)
    tokenizer.no_truncation()
    bos, eos, pad = (
        _content(config.get(f"{key}_token", getattr(family, key))) for key in ("bos", "eos", "pad")
    )
    bos = bos if config.get("add_bos_token", family.begins) else None
    if not config.get("add_eos_token", True):
        raise ValueError(f"{name} must put an end token behind texts, got add_eos_token false")
    _set_ends(tokenizer, bos, eos, folder)
    _set_padding(tokenizer, pad, folder)
    length = _length(folder, config, family.length)
    return TextRecipe(Tokenizer(tokenizer.to_str()), length, family.uses_mask)


def load_chat_tokenizer(folder: str | os.PathLike) -> TextRecipe:
    """Returns the tokenizer of a language model: tokenizer.json, with the begin and end tokens that
    tokenizer_config.json or config.json name. Conversations write those out themselves.

    Raises:
        ValueError: if there is no tokenizer.json, or no end token.
    """
    folder = pathlib.Path(folder)
    config = {**read_json(folder, SPECIAL), **read_json(folder, CONFIG)}
    tokenizer = _from_json(folder)
    tokenizer.no_truncation()
    bos, eos, pad = (_content(config.get(f"{key}_token")) for key in ("bos", "eos", "pad"))
    if eos is None:
        raise ValueError(f"{folder / CONFIG} must name the eos_token, it does not")
    _set_ends(tokenizer, bos, eos, folder)
    _set_padding(tokenizer, pad or eos, folder)
    length = _length(folder, config, None)
    return TextRecipe(Tokenizer(tokenizer.to_str()), length, uses_mask=True, chat=True)


def begin_token(folder: str | os.PathLike) -> str | None:
    """Returns the begin token if transformers puts it in front of texts, None if it does not."""
    folder = pathlib.Path(folder)
    config = {**read_json(folder, SPECIAL), **read_json(folder, CONFIG)}
    bos = _content(config.get("bos_token"))
    if bos is None or not (folder / FILE).is_file():
        return None
    tokenizer = _from_json(folder)
    return bos if tokenizer.encode("").ids[:1] == [tokenizer.token_to_id(bos)] else None


def _class_name(folder: pathlib.Path, config: Mapping[str, Any]) -> str:
    name, family = config.get("tokenizer_class"), model_type(folder)
    if name is None:
        name = OF_MODEL.get(family, "")
    name = name.removesuffix("Fast")
    name = _SYNONYMS.get(name, name)
    if name not in CLASSES and name not in _GENERIC:
        raise ValueError(
            f"unknown tokenizer_class {config.get('tokenizer_class')!r} (model_type {family!r}) in "
            f"{folder}, choose one of {sorted([*CLASSES, *_SYNONYMS, *_GENERIC])}"
        )
    return name


def _content(token: Any) -> str | None:
    """Returns a special token's text; transformers writes a string or {"content": ...}."""
    return token.get("content") if isinstance(token, Mapping) else token


def _length(folder: pathlib.Path, config: Mapping[str, Any], default: int | None) -> int:
    """Returns the shorter of what the tokenizer and the model allow."""
    model = read_json(folder, "config.json")
    text = model.get("text_config") or model
    stated = [config.get("model_max_length"), text.get("max_position_embeddings")]
    known = [int(n) for n in stated if isinstance(n, int | float) and n < _NO_LIMIT]
    if not known and default is None:
        raise ValueError(f"{folder / CONFIG} must state model_max_length, got none")
    return min(known, default=default)


def _from_json(folder: pathlib.Path) -> tokenizers.Tokenizer:
    path = folder / FILE
    if not path.is_file():
        raise ValueError(
            f"{folder} must have a {FILE} (for SigLIP a spiece.model, for CLIP vocab.json and "
            f"merges.txt will do), got {sorted(p.name for p in folder.glob('*'))}"
        )
    if "model" not in read_json(folder, FILE):
        raise ValueError(f"{path} must hold a tokenizer of the tokenizers library, it has no model")
    return tokenizers.Tokenizer.from_file(str(path))


def _set_ends(tokenizer: tokenizers.Tokenizer, bos: str | None, eos: str, folder: Any) -> None:
    tokens = [token for token in (bos, eos) if token is not None]
    ids = [(token, _id(tokenizer, token, folder)) for token in tokens]
    tokenizer.add_special_tokens(tokens)  # they are there; now decoding leaves them out
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*tokens[:-1], "$A", eos], special_tokens=ids
    )


def _set_padding(tokenizer: tokenizers.Tokenizer, pad: str, folder: Any) -> None:
    tokenizer.enable_padding(pad_id=_id(tokenizer, pad, folder), pad_token=pad)


def _id(tokenizer: tokenizers.Tokenizer, token: str, folder: Any) -> int:
    found = tokenizer.token_to_id(token)
    if found is None:
        raise ValueError(f"the tokenizer in {folder} must have the token {token!r}, it has not")
    return found


def _clip(folder: pathlib.Path, config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    if (folder / FILE).is_file() or not (vocab.is_file() and merges.is_file()):
        tokenizer = _from_json(folder)
    else:
        tokenizer = _clip_from_merges(vocab, merges, _content(config.get("unk_token", _END)))
    suffix = getattr(tokenizer.model, "end_of_word_suffix", None)
    if suffix:
        tokenizer.decoder = decoders.Sequence(
            [decoders.ByteLevel(), decoders.Replace(suffix, " "), decoders.Strip(" ", 0, 1)]
        )
    return tokenizer


_END = CLASSES["CLIPTokenizer"].eos
_WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)


def _clip_from_merges(vocab: pathlib.Path, merges: pathlib.Path, unk: str) -> tokenizers.Tokenizer:
    """Returns CLIP's byte-level BPE. Source: transformers, CLIPTokenizer; openai/CLIP."""
    model = models.BPE.from_file(str(vocab), str(merges), unk_token=unk, end_of_word_suffix="</w>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return tokenizer


def _canonical(lower: bool) -> list[normalizers.Normalizer]:
    """Returns SigLIP's canonicalize_text as normalizers (big_vision, prompt_engineering)."""
    punctuation = Regex("[" + "".join(f"\\{letter}" for letter in string.punctuation) + "]")
    steps = [normalizers.Replace(punctuation, "")]
    if lower:
        # Python, not the tokenizers library, knows the sigma that ends a word
        sigma = Regex("(?<=\\p{L})\N{GREEK CAPITAL LETTER SIGMA}(?!\\p{L})")
        final = "\N{GREEK SMALL LETTER FINAL SIGMA}"
        steps = [normalizers.Replace(sigma, final), normalizers.Lowercase(), *steps]
    return [*steps, normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]


def _siglip(folder: pathlib.Path, config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    canonical = _canonical(config.get("do_lower_case", True))
    if (folder / "spiece.model").is_file():
        # SPACE goes before the first word ahead of everything else, as transformers has it: a text
        # that starts with a space or a full stop starts with two
        start = [normalizers.Replace(SPACE, " "), normalizers.Prepend(SPACE)]
        return read_sentencepiece(folder / "spiece.model").build(*start, *canonical)
    tokenizer = _from_json(folder)
    _prepend(tokenizer, canonical)
    return tokenizer


def _siglip2(folder: pathlib.Path, config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    tokenizer = _from_json(folder)
    present = tokenizer.normalizer is not None and "Lowercase" in str(tokenizer.normalizer)
    if config.get("do_lower_case", True) and not present:
        _prepend(tokenizer, [normalizers.Lowercase()])
    return tokenizer


def _prepend(tokenizer: tokenizers.Tokenizer, steps: list[normalizers.Normalizer]) -> None:
    old = [] if tokenizer.normalizer is None else [tokenizer.normalizer]
    tokenizer.normalizer = normalizers.Sequence([*steps, *old])


_BUILDERS = {"CLIPTokenizer": _clip, "SiglipTokenizer": _siglip, "Siglip2Tokenizer": _siglip2}
