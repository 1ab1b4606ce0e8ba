# SPDX-License-Identifier: Apache-2.0
"""Captions to token ids: byte-level BPE, trained or without merges, by the `tokenizers` library.

Every byte has a token, so any text can be written and nothing is unknown. The whole tokenizer,
settings included, is one tokenizer.json that the `tokenizers` library reads alone. Ids: 0 <pad>,
1 <eos>, then <bos> if there is one, then the 256 bytes, then merges, then <unused..> tokens that
round the vocabulary up to a multiple, so that an embedding can be split over devices.

Byte-level BPE: Radford et al., GPT-2, 2019, section 2.2.
"""

from __future__ import annotations

import os
import pathlib
import unicodedata
import zlib
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

PAD, EOS, BOS = "<pad>", "<eos>", "<bos>"
FILE = "tokenizer.json"
_SPACES = (" ", "\u0120", "\u2581")  # as it is, of byte-level vocabularies, of SentencePiece's


class Tokenizer:
    """Texts to padded arrays of ids and back.

    The end token is kept when a text is cut, because text encoders pool there. Which ids pad, end
    and begin is read from the file: from its padding and from what it puts around a text.

    Attributes:
        vocab_size: number of ids, <unused..> included.
        pad_id: fills rows up; some checkpoints use the end token for it.
        eos_id: ends every text.
        bos_id: starts every text; None if the tokenizer has none.
    """

    def __init__(self, json: str):
        self._tokenizer = tokenizers.Tokenizer.from_str(json)
        # not in the file: "<eos>" in a caption is text, not the end of it
        self._tokenizer.encode_special_tokens = True
        # for conversations, whose templates write special tokens out
        self._chat = tokenizers.Tokenizer.from_str(json)
        self._chat.encode_special_tokens = False
        self._chat.no_padding()
        padding = self._tokenizer.padding
        around = self._tokenizer.num_special_tokens_to_add(is_pair=False)
        ids = self._tokenizer.encode("").ids
        if padding is None or around not in (1, 2):
            raise ValueError(
                f"the tokenizer of flax_vlm must state its padding and put an end token behind "
                f"every text (and at most one before it), got padding {padding} and {around} "
                f"tokens around a text; make it with train_bpe or byte_level, or read the folder "
                f"of a checkpoint with load_tokenizer"
            )
        self.pad_id: int = padding["pad_id"]
        self.eos_id: int = ids[-1]
        self.bos_id: int | None = ids[0] if around == 2 else None
        self.vocab_size: int = self._tokenizer.get_vocab_size()

    def __reduce__(self):
        return Tokenizer, (self.to_json(),)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokenizer) and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        return hash(self.to_json())

    def encode(
        self, texts: Sequence[str], length: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns ids, mask and which texts were cut.

        Args:
            texts: n texts.
            length: L, of every row; at least 1, or 2 with a begin token.

        Returns:
            ids [n, L] int32, padded with `pad_id`; mask [n, L] bool, True = a token of the text,
            its end token included; truncated [n] bool.

        Raises:
            ValueError: if the length has no room for the special tokens.
        """
        least = 1 if self.bos_id is None else 2
        if length < least:
            raise ValueError(f"the text length must be at least {least}, got {length}")
        ids = np.full((len(texts), length), self.pad_id, np.int32)  # [n, L]
        mask = np.zeros((len(texts), length), bool)
        truncated = np.zeros(len(texts), bool)
        for row, text in enumerate(texts):
            # half a surrogate pair, as broken JSON gives it, has no UTF-8: it becomes "?"
            tokens = self._tokenizer.encode(text.encode("utf-8", "replace").decode()).ids
            if len(tokens) > length:
                tokens = [*tokens[: length - 1], self.eos_id]
                truncated[row] = True
            ids[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = True
        return ids, mask, truncated

    def encode_chat(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Returns the ids of a text with nothing put around it, and the (start, stop) of the
        characters of each. Special tokens that are written out in the text are tokens here.
        """
        found = self._chat.encode(text, add_special_tokens=False)
        return found.ids, found.offsets

    def special(self, name: str) -> str:
        """Returns how the "pad", "bos" or "eos" token is written, "" if there is none."""
        index = getattr(self, f"{name}_id")
        return "" if index is None else self.token(index)

    def id_of(self, token: str) -> int | None:
        """Returns the id of a token as it is written, None if there is none."""
        return self._tokenizer.token_to_id(token)

    def decode(self, ids: np.ndarray | Sequence) -> str | list[str]:
        """Returns the text of ids [L], or the list of texts of ids [n, L], up to the end token."""
        array = np.asarray(ids)
        if array.ndim == 2:
            return [self.decode(row) for row in array]
        tokens = array.tolist()
        end = tokens.index(self.eos_id) if self.eos_id in tokens else len(tokens)
        return self._tokenizer.decode(tokens[:end])

    def token(self, index: int) -> str:
        """Returns how the token with this id is written.

        Raises:
            ValueError: if there is none.
        """
        found = self._tokenizer.id_to_token(index)
        if found is None:
            raise ValueError(f"a token id must be below {self.vocab_size}, got {index}")
        return found

    def starts_word(self, index: int) -> bool:
        """Returns whether a token is written with a space in front."""
        return self.token(index).startswith(_SPACES)

    def to_json(self) -> str:
        """Returns what `save` writes."""
        return self._tokenizer.to_str(pretty=True)

    def save(self, path: str | os.PathLike) -> None:
        """Writes tokenizer.json: `path` itself, or into it if it is a folder."""
        path = _file(path)
        unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        unfinished.write_text(self.to_json(), encoding="utf-8")
        os.replace(unfinished, path)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Tokenizer:
        """Returns the tokenizer that `save` wrote to `path`."""
        return cls(_file(path).read_text(encoding="utf-8"))


def _file(path: str | os.PathLike) -> pathlib.Path:
    path = pathlib.Path(path)
    return path / FILE if path.is_dir() else path


def train_bpe(
    texts: Iterable[str],
    *,
    vocab_size: int = 4096,
    lower: bool = False,
    bos: bool = False,
    special: Sequence[str] = (),
    multiple: int = 128,
) -> Tokenizer:
    """Returns a byte-level BPE tokenizer trained on texts; the same texts give the same tokenizer.

    Args:
        texts: captions.
        vocab_size: greatest number of tokens, special ones included; fewer if the texts have no
            more pairs to merge.
        lower: write all texts in lower case, in training and in use.
        bos: start every text with a begin token.
        special: further tokens that no text is cut into, such as "<image>".
        multiple: round the number of ids up to a multiple of this.

    Raises:
        ValueError: if the vocabulary has no room for the bytes.
    """
    special = [*_special_tokens(bos), *special]
    least = 256 + len(special)
    if vocab_size < least:
        raise ValueError(f"vocab_size must be at least {least} for all bytes, got {vocab_size}")
    tokenizer = _bare(models.BPE(), lower)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _finish(tokenizer, special, multiple)


def byte_level(
    texts: Iterable[str] = (),
    *,
    lower: bool = False,
    bos: bool = False,
    special: Sequence[str] = (),
    multiple: int = 128,
) -> Tokenizer:
    """Returns a tokenizer with one token per UTF-8 byte.

    Args:
        texts: not used; here so that all entries of TOKENIZERS are called alike.
        lower: write all texts in lower case.
        bos: start every text with a begin token.
        special: see `train_bpe`.
        multiple: round the number of ids up to a multiple of this.
    """
    special = [*_special_tokens(bos), *special]
    tokens = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    model = models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[])
    return _finish(_bare(model, lower), special, multiple)


def _special_tokens(bos: bool) -> list[str]:
    return [PAD, EOS, BOS] if bos else [PAD, EOS]


def _bare(model: models.Model, lower: bool) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(model)
    if lower:
        tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _finish(tokenizer: tokenizers.Tokenizer, special: list[str], multiple: int) -> Tokenizer:
    if multiple < 1:
        raise ValueError(f"the vocabulary must be a multiple of at least 1, got {multiple}")
    unused = -tokenizer.get_vocab_size() % multiple
    tokenizer.add_special_tokens([*special, *(f"<unused{i}>" for i in range(unused))])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A {EOS}" if BOS in special else f"$A {EOS}",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in special],
    )
    tokenizer.enable_padding(pad_id=tokenizer.token_to_id(PAD), pad_token=PAD)
    return Tokenizer(tokenizer.to_str())


def text_id(caption: str) -> np.int32:
    """Returns a number that is equal for equal captions: CRC-32 of the canonical caption.

    Captions are equal if they differ only in case, in white space or in how Unicode composes their
    letters. Two different captions collide with probability 2^-32.
    """
    canonical = " ".join(unicodedata.normalize("NFC", caption).casefold().split())
    return np.uint32(zlib.crc32(canonical.encode("utf-8", "replace"))).astype(np.int32)


TOKENIZERS: dict[str, Callable[..., Tokenizer]] = {"bpe": train_bpe, "byte": byte_level}
