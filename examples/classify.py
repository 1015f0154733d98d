"""A classifier of sequences with transformers' own Trainer: which of two motifs comes first?

    python examples/classify.py --steps 300 --output runs/classifier

The sequences are made: random bases with two motifs, A before B or B before A, as they are or
reverse-complemented.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from titans_lm import TitansConfig, TitansForSequenceClassification
from titans_lm.evaluate.labelled import accuracy, matthews, planted, tokens


def rows(count: int, length: int, seed: int) -> list[dict[str, Any]]:
    """Examples for the Trainer: `input_ids` and `labels`."""
    data = planted(count, length, seed)
    ids = torch.from_numpy(tokens(data.sequences, length))
    return [{"input_ids": row, "labels": int(label)} for row, label in zip(ids, data.labels, strict=True)]


def make_model() -> TitansForSequenceClassification:
    torch.manual_seed(0)
    return TitansForSequenceClassification(TitansConfig(
        variant="mag", vocab_size=6, pad_token_id=0, num_labels=2, hidden_size=32, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=64, window_size=32, num_persistent_tokens=4, memory_head_dim=8,
        memory_dim=16,
    ))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--length", type=int, default=96)
    parser.add_argument("--output", type=Path, default=Path("runs/classifier"))
    arguments = parser.parse_args()
    if arguments.output.exists():
        parser.error(f"--output {arguments.output} is there already; give another folder")
    options = TrainingArguments(
        str(arguments.output), max_steps=arguments.steps, per_device_train_batch_size=64, learning_rate=3e-3,
        save_strategy="no", report_to="none", use_cpu=True,
    )  # fmt: skip
    trainer = Trainer(make_model(), options, train_dataset=rows(64 * 40, arguments.length, 0))
    trainer.train()
    trainer.save_model()
    found = trainer.predict(rows(256, arguments.length, 1))
    logits = found.predictions[0] if isinstance(found.predictions, tuple) else found.predictions
    true, predicted = found.label_ids, logits.argmax(-1)
    print(f"accuracy {accuracy(true, predicted):.3f}, MCC {matthews(true, predicted):.3f}; {arguments.output}")


if __name__ == "__main__":
    main()
