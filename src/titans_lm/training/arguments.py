"""The settings of a run as transformers' `TrainingArguments`."""

import torch
from transformers import TrainingArguments

from titans_lm.training.config import Settings
from titans_lm.training.progress import shows_bar
from titans_lm.training.trackers import check_installed


def trainer_arguments(settings: Settings, evaluate: bool) -> TrainingArguments:
    """`TrainingArguments` of the settings; `evaluate`: whether there is text to evaluate on.

    Raises ValueError for a tracker that is not installed."""
    s = settings.training
    check_installed(s.report_to)
    return TrainingArguments(
        output_dir=s.output_dir,
        max_steps=s.max_steps,
        per_device_train_batch_size=s.batch_size,
        per_device_eval_batch_size=s.batch_size,
        gradient_accumulation_steps=s.accumulation,
        learning_rate=s.learning_rate,
        weight_decay=s.weight_decay,
        adam_beta2=0.95,
        max_grad_norm=s.max_grad_norm,
        bf16=s.bf16,
        use_cpu=not torch.cuda.is_available(),
        activation_checkpointing=s.activation_checkpointing,
        logging_steps=s.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # show NaN
        eval_strategy="steps" if evaluate else "no",
        eval_steps=s.eval_steps,
        save_steps=s.save_steps,
        seed=s.seed,
        disable_tqdm=s.max_minutes is not None or not shows_bar(),
        report_to=list(s.report_to),
        fsdp=True if s.fsdp else None,
        ddp_find_unused_parameters=True,  # a bypassed memory, for one, has no gradient
        dataloader_pin_memory=torch.cuda.is_available(),
    )
