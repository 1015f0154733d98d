"""Fine-tuning: a shipped model goes on learning from a text of yours, with truncated backpropagation through time.

    python examples/finetune.py book.txt --output runs/finetuned

The weights of `streams` are trained on all but the last tenth of the text. The memory is carried from window to window
without its gradients (`state.detach()`), and begins anew after `--carried` windows. The last tenth, which no step saw,
is read before and after. `titans_lm.load` opens what is saved, and so does `--model` of every command.
"""

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor, nn

from titans_lm import TitansForCausalLM, load


@torch.no_grad()
def bits_per_token(model: TitansForCausalLM, ids: Tensor) -> float:
    """Mean bits of the tokens `[1, T]` after the first; the memory begins empty and learns along."""
    return float(model.eval()(ids, labels=ids).loss) / math.log(2)


def train(
    model: TitansForCausalLM, ids: Tensor, steps: int, *, rows: int = 4, window: int = 256, carried: int = 8
) -> None:
    """AdamW on windows of a text `[T]` that follow one another, `carried` of them with one memory.

    Raises ValueError for a text too short for one such run of windows.
    """
    span = window * carried + 1
    if len(ids) < span:
        raise ValueError(f"the text must have at least {span} tokens to train on, got {len(ids)}")
    optimizer = torch.optim.AdamW(model.parameters(), 5e-4, betas=(0.9, 0.95))
    model.train()
    state, starts = None, torch.zeros(0)
    for step in range(steps):
        if step % carried == 0:  # other places of the text, and a memory that has read nothing
            state, starts = None, torch.randint(0, len(ids) - span + 1, (rows,))
        first = step % carried * window
        batch = torch.stack([ids[start + first : start + first + window] for start in starts.tolist()])
        out = model(batch, labels=batch, past_key_values=state, use_cache=True)
        optimizer.zero_grad()
        out.loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        state = out.past_key_values.detach()  # the memory goes on, its gradients do not
        if step % 20 == 0:
            print(f"step {step:4}  {out.loss.item() / math.log(2):.3f} bits per token")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--output", type=Path, required=True, help="the folder that the model goes to")
    parser.add_argument("--model", default="streams", help="a model folder, or the name of a shipped model")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--carried", type=int, default=8, help="windows of 256 tokens that one memory reads")
    arguments = parser.parse_args()
    if arguments.output.exists():
        parser.error(f"--output {arguments.output} is there already; give another folder")
    torch.manual_seed(0)
    model, tokenizer = load(arguments.model)
    ids = tokenizer(arguments.text.read_text(), return_tensors="pt", add_special_tokens=False).input_ids[0]
    held_out = ids[len(ids) * 9 // 10 :][None]
    before = bits_per_token(model, held_out)
    try:
        train(model, ids[: len(ids) * 9 // 10], arguments.steps, carried=arguments.carried)
    except ValueError as error:
        parser.error(str(error))
    print(f"held out: {before:.3f} bits per token before, {bits_per_token(model, held_out):.3f} after")
    model.save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)


if __name__ == "__main__":
    main()
