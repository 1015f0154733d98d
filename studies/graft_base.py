"""Train a small Llama of bytes, transformers' own class, that `titans graft` can give a memory to.

    python studies/graft_base.py runs/graft_base --novels novels.tar.xz --minutes 18

It reads rows of 256 bytes: novels, and the streams that `data.task: streams` makes. No row is longer, so it has learned
nothing about what lies more than 256 bytes back. Pretrained models come from the Hub; this one needs no download.
"""

import argparse
import itertools
import math
import time

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from titans_lm.models.tokenizer import byte_tokenizer
from titans_lm.tasks.streams import Streams

CONTEXT = 256
SOURCES = {
    "text": 4, "cipher": 2, "alphabets": 1.5, "language": 1, "logs": 5, "tables": 1.5, "markov": 1, "automata": 0.5,
    "letters": 1, "noise": 0.3, "repeat": 2,
}  # fmt: skip
NEEDLES = [
    {"name": "needle", "style": "short", "haystack": "words", "length": length, "weight": 0.7} for length in (96, 192)
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", help="folder of the model")
    parser.add_argument("--novels", required=True, help="folder or archive of .txt files; the last ten are not read")
    parser.add_argument("--minutes", type=float, default=18)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--pretrained", help="continue from this folder")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    task = Streams(CONTEXT, SOURCES, {args.novels: 2, "python-stdlib": 1}, held_out=10, tasks=NEEDLES)
    tokenizer = byte_tokenizer()
    torch.manual_seed(args.seed)
    model = LlamaForCausalLM.from_pretrained(args.pretrained) if args.pretrained else LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=128, intermediate_size=352, num_hidden_layers=5,
            num_attention_heads=4, max_position_embeddings=CONTEXT, tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), args.rate, betas=(0.9, 0.95), weight_decay=0.1)
    begun, losses = time.monotonic(), []
    for step in itertools.count():
        done = (time.monotonic() - begun) / (60 * args.minutes)
        if done >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = args.rate * min(1, (step + 1) / 50) * (0.02 + 0.98 * (1 + math.cos(math.pi * done)) / 2)
        ids = torch.from_numpy(task.batch(np.random.default_rng((args.seed, step)), args.batch).input_ids)
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item() / math.log(2))
        if (step + 1) % 50 == 0:
            print(f"{done:4.0%}  step {step + 1}  {np.mean(losses[-50:]):.3f} bits a byte", flush=True)
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)


if __name__ == "__main__":
    main()
