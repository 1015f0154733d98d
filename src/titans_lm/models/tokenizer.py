"""Tokenizers of models, bytes by default, and a text's tokens."""

from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Ids 0 to 255 are the bytes themselves (of UTF-8 text), then <pad>, <bos>, <eos>. Needs no download."""
    characters = _byte_characters()
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(characters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<pad>", "<bos>", "<eos>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>",
        padding_side="left", clean_up_tokenization_spaces=False,
    )  # fmt: skip


def _byte_characters() -> list[str]:
    """The printable character by which the byte-level alphabet stands for each byte (as in GPT-2's tokenizer)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(256, 512))
    return [chr(b) if b in set(printable) else chr(next(others)) for b in range(256)]


_known: WeakKeyDictionary[PreTrainedTokenizerBase, bool] = WeakKeyDictionary()


def is_bytes(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether each token below 256 is one byte."""
    if tokenizer not in _known:  # asking takes as long as the bytes of a megabyte, and short texts are many
        ids = tokenizer.convert_tokens_to_ids(_byte_characters()) if tokenizer.vocab_size == 256 else []
        _known[tokenizer] = ids == list(range(256))
    return _known[tokenizer]


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """ "bytes", or the name or folder of any Hugging Face tokenizer. One that brings its own code is refused."""
    if name == "bytes":
        return byte_tokenizer()
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f'tokenizer {name!r} cannot be loaded; give "bytes", a folder or a Hub name: {plain_reason(error)}'
        ) from error


def plain_reason(error: Exception) -> str:
    """What transformers says, as one line; of code that it would run, that it is not."""
    if "trust_remote_code" in str(error):
        return "it brings Python code of its own, which is never run"
    return " ".join(str(error).split())


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> NDArray[np.int64]:
    """The text's tokens, `[T]`, without special ones. Raises ValueError for half a character (a lone surrogate), as a
    command line has it whose bytes are not UTF-8."""
    try:
        content = text.encode()
    except UnicodeEncodeError as error:
        place = f"character {error.start:,} is {text[error.start]!r}"
        raise ValueError(f"this is not text, for it is not UTF-8: {place} in {text[:50]!r}") from None
    if is_bytes(tokenizer):  # a megabyte in a millisecond
        return np.frombuffer(content, np.uint8).astype(np.int64)
    return np.asarray(tokenizer.encode(text, add_special_tokens=False), np.int64)
