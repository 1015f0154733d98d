"""Tokenizers, bytes by default, and the tokens of a text."""

from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from titans_lm.models.configuration import plain_reason

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of bytes: ids 0 to 255 are the bytes of UTF-8 text, then <pad>, <bos>, <eos>. Needs no download."""
    characters = byte_characters()
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(characters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return with_special_tokens(tokenizer)


def with_special_tokens(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """A tokenizer for transformers, with <pad>, <bos> and <eos> after its own tokens."""
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>",
        padding_side="left", clean_up_tokenization_spaces=False,
    )  # fmt: skip


def byte_characters() -> list[str]:
    """The printable character that stands for each byte in the byte-level alphabet of GPT-2's tokenizer."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(256, 512))
    return [chr(b) if b in set(printable) else chr(next(others)) for b in range(256)]


_is_bytes_cache: WeakKeyDictionary[PreTrainedTokenizerBase, bool] = WeakKeyDictionary()


def is_bytes(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer's ids 0 to 255 are the bytes themselves."""
    if tokenizer not in _is_bytes_cache:  # the check takes as long as encoding a megabyte
        ids = tokenizer.convert_tokens_to_ids(byte_characters()) if tokenizer.vocab_size == 256 else []
        _is_bytes_cache[tokenizer] = ids == list(range(256))
    return _is_bytes_cache[tokenizer]


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer "bytes", or any of Hugging Face by its name or folder. Raises ValueError for one that needs its own
    code, or that cannot be loaded."""
    if name == "bytes":
        return byte_tokenizer()
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f'tokenizer {name!r} cannot be loaded; give "bytes", a folder or a Hub name: {plain_reason(error)}'
        ) from error


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> NDArray[np.int64]:
    """The token ids of a text, `[T]`, without special tokens.

    Raises ValueError for a lone surrogate, which a command line holds where its bytes are not UTF-8."""
    try:
        content = text.encode()
    except UnicodeEncodeError as error:
        place = f"character {error.start:,} is {text[error.start]!r}"
        raise ValueError(f"this is not UTF-8 text: {place} in {text[:50]!r}") from None
    if is_bytes(tokenizer):  # a megabyte in a millisecond
        return np.frombuffer(content, np.uint8).astype(np.int64)
    return np.asarray(tokenizer.encode(text, add_special_tokens=False), np.int64)
