"""Train the byte-level BPE tokenizer of `studies/babilong.yaml`: on bAbI's training facts and on novels.

    python studies/babilong_tokenizer.py tokenizer --babi babi.tar.xz --background novels

A fact takes some seven of its tokens, thirty-five bytes, so that rows of 1,024 tokens hold the stories of all tasks.
"""

import argparse
from collections.abc import Iterator

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from titans_lm.models.tokenizer import SPECIAL_TOKENS, with_special_tokens
from titans_lm.tasks.babilong import Babilong
from titans_lm.utils.corpora import text_files
from titans_lm.utils.text_file import read_text

STORIES = 2000
"""Stories of each task that are read."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", help="folder of the tokenizer")
    parser.add_argument("--babi", required=True, help="folder or archive of bAbI's files")
    parser.add_argument("--background", nargs="+", required=True, help="text files or folders of .txt files")
    parser.add_argument("--tasks", nargs="+", default=[f"qa{i}" for i in range(1, 6)])
    parser.add_argument("--size", type=int, default=2048, help="tokens in all")
    parser.add_argument("--characters", type=int, default=100_000, help="characters read of each background text")
    args = parser.parse_args()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=args.size - len(SPECIAL_TOKENS), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts(args), trainer)
    with_special_tokens(tokenizer).save_pretrained(args.output)
    print(f"{tokenizer.get_vocab_size():,} tokens, in {args.output}")


def texts(args: argparse.Namespace) -> Iterator[str]:
    for name in args.tasks:
        for example in Babilong(args.babi, name, 0, background=()).examples[:STORIES]:
            yield " ".join(["", *example.facts, "\n\nQuestion:", example.question]) + f"\nAnswer: {example.answer}."
    for file in text_files(args.background, [".txt"]):
        yield read_text(file)[: args.characters]


if __name__ == "__main__":
    main()
