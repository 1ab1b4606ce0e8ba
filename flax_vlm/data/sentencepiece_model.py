# SPDX-License-Identifier: Apache-2.0
"""spiece.model of SentencePiece to a Unigram tokenizer of the `tokenizers` library.

The file is a protocol buffer; the dozen fields that matter are read here, so that neither the
sentencepiece nor the protobuf package is needed.

Unigram: Kudo, 2018, arXiv:1804.10959. File: sentencepiece, src/sentencepiece_model.proto.

Differs from sentencepiece: models with BPE, or with pieces that the user defined, are refused.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, normalizers

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # what SentencePiece writes for a space

# numbers of fields in sentencepiece_model.proto
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_PIECE, _SCORE, _TYPE = 1, 2, 3
_MODEL_TYPE, _BYTE_FALLBACK, _UNK_ID = 3, 35, 40
_CHARSMAP, _REMOVE_SPACES, _ESCAPE = 2, 4, 5
_UNIGRAM, _USER_DEFINED = 1, 4


@dataclasses.dataclass(frozen=True)
class SentencePieceModel:
    """What a spiece.model holds.

    Attributes:
        pieces: pieces and their log probabilities; the position is the id.
        unk_id: of what no piece covers.
        charsmap: the normalisation (NFKC and the like), compiled by sentencepiece; may be empty.
        remove_extra_spaces: spaces at the ends and runs of them are dropped.
        byte_fallback: unknown letters become their bytes.
    """

    pieces: tuple[tuple[str, float], ...]
    unk_id: int
    charsmap: bytes
    remove_extra_spaces: bool
    byte_fallback: bool

    def build(self, *before: normalizers.Normalizer) -> tokenizers.Tokenizer:
        """Returns the tokenizer, without special tokens around a text.

        Args:
            *before: normalizers that come first; they also write the SPACE before the first word.
        """
        model = models.Unigram(list(self.pieces), self.unk_id, self.byte_fallback)
        tokenizer = tokenizers.Tokenizer(model)
        steps = [*before]
        if self.charsmap:
            steps.append(normalizers.Precompiled(self.charsmap))
        if self.remove_extra_spaces:
            steps.append(normalizers.Replace(Regex(" {2,}"), " "))
        steps.append(normalizers.Replace(" ", SPACE))
        if self.remove_extra_spaces:  # at the end; the one before the first word stays
            steps.append(normalizers.Replace(Regex(f"{SPACE}+$"), ""))
        tokenizer.normalizer = normalizers.Sequence(steps)
        tokenizer.decoder = decoders.Sequence(
            [
                decoders.Replace(SPACE, " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
        return tokenizer


def read_sentencepiece(path: str | os.PathLike) -> SentencePieceModel:
    """Returns what the spiece.model at `path` holds.

    Raises:
        ValueError: if the file is damaged, or no Unigram model without user-defined pieces.
    """
    try:
        model = _Message(pathlib.Path(path).read_bytes())
        trainer, normalizer = model.message(_TRAINER), model.message(_NORMALIZER)
        pieces = [_Message(piece) for piece in model.fields.get(_PIECES, [])]
        found = SentencePieceModel(
            pieces=tuple((p.text(_PIECE), p.real(_SCORE)) for p in pieces),
            unk_id=trainer.number(_UNK_ID, 0),
            charsmap=normalizer.last(_CHARSMAP, b""),
            remove_extra_spaces=bool(normalizer.number(_REMOVE_SPACES, 1)),
            byte_fallback=bool(trainer.number(_BYTE_FALLBACK, 0)),
        )
        kind, escape = trainer.number(_MODEL_TYPE, _UNIGRAM), normalizer.number(_ESCAPE, 1)
        types = {p.number(_TYPE, 1) for p in pieces}
    except (IndexError, struct.error, UnicodeDecodeError, _Damaged) as error:
        raise ValueError(f"{path} is no SentencePiece model, or is damaged: {error}") from error
    if not 0 <= found.unk_id < len(found.pieces):
        raise ValueError(f"{path} must have an unknown piece, got {len(found.pieces)} pieces")
    if kind != _UNIGRAM or _USER_DEFINED in types or not escape:
        raise ValueError(
            f"{path} must be a Unigram model without user-defined pieces, got model_type {kind}, "
            f"piece types {sorted(types)}, escape_whitespaces {escape}; save its tokenizer.json "
            f"with transformers and put it beside the model"
        )
    return found


class _Damaged(Exception):
    """A protocol buffer that contradicts itself."""


class _Message:
    """The fields of one protocol-buffer message: number -> values in order."""

    def __init__(self, data: bytes):
        self.fields: dict[int, list[Any]] = {}
        for number, value in _read_fields(data):
            self.fields.setdefault(number, []).append(value)

    def last(self, number: int, default: Any) -> Any:
        value = self.fields.get(number, [default])[-1]
        if type(value) is not type(default):
            raise _Damaged(f"field {number} is a {type(value).__name__}")
        return value

    def number(self, number: int, default: int) -> int:
        return self.last(number, default)

    def text(self, number: int) -> str:
        return self.last(number, b"").decode("utf-8")

    def real(self, number: int) -> float:
        return struct.unpack("<f", self.last(number, b"\0\0\0\0"))[0]

    def message(self, number: int) -> _Message:
        return _Message(self.last(number, b""))


def _read_fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yields field numbers with ints (wire type 0) or bytes (types 1, 2 and 5)."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, position = _varint(data, position)
            yield number, value
            continue
        if wire == 2:
            size, position = _varint(data, position)
        elif wire in _FIXED:
            size = _FIXED[wire]
        else:
            raise _Damaged(f"wire type {wire}")
        if position + size > len(data):
            raise _Damaged("it ends within a field")
        yield number, data[position : position + size]
        position += size


_FIXED: Mapping[int, int] = {1: 8, 5: 4}


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, position
        if shift > 63:
            raise _Damaged("a number has more than 64 bits")
