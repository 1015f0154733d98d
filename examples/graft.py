"""Graft: a memory for a pretrained model, trained on a text, which the memory then carries from window to window.

    python examples/graft.py runs/graft_base book.txt --output runs/grafted

The base is any causal language model of transformers, by folder or Hub name (studies/graft_base.py trains a small one).
Its weights stay as they are. Attention is cut to `--window` tokens; the memories of the chosen layers learn to carry
what lies further back. `titans_lm.load` opens what is saved, and so does `--model` of every command.
"""

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer

import titans_lm
from titans_lm import TitansForCausalLM
from titans_lm.models.hub import save
from titans_lm.models.tokenizer import encode


@torch.no_grad()
def bits_per_token(model: TitansForCausalLM, ids: Tensor) -> float:
    """Mean bits of the tokens `[1, T]` after the first."""
    return float(model.eval()(ids, labels=ids).loss) / math.log(2)


def train(model: TitansForCausalLM, ids: Tensor, steps: int, window: int, rows: int = 4) -> None:
    """AdamW on `rows` parts of a text `[T]` side by side, window after window, with one memory each."""
    if len(ids) < rows * window * 2:
        raise ValueError(f"the text must have at least {rows * window * 2} tokens to train on, got {len(ids)}")
    windows = ids[: len(ids) // rows * rows].view(rows, -1).split(window, 1)
    windows = [part for part in windows if part.shape[1] == window]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, 3e-3, betas=(0.9, 0.95))
    model.train()
    state = None
    for step in range(steps):
        if step % len(windows) == 0:
            state = None
        part = windows[step % len(windows)]
        out = model(part, labels=part, past_key_values=state, use_cache=True)
        optimizer.zero_grad()
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        state = out.past_key_values.detach()  # the memory goes on, its gradients do not


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="folder or Hub name of a pretrained causal language model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--layers", type=int, nargs="+")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()
    if args.output.exists():
        parser.error(f"--output {args.output} is there already; give another folder")
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    ids = torch.from_numpy(encode(tokenizer, args.text.read_text()))
    ids, held_out = ids.split([len(ids) * 9 // 10, len(ids) - len(ids) * 9 // 10])
    model = titans_lm.graft(args.base, layers=args.layers, window_size=args.window)
    print(f"before: {bits_per_token(model, held_out[None]):.3f} bits a token, the base's in this window")
    train(model, ids, args.steps, args.window)
    print(f"after:  {bits_per_token(model, held_out[None]):.3f}")
    save(model, tokenizer, args.output)


if __name__ == "__main__":
    main()
