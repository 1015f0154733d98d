"""The settings of a run as transformers' `TrainingArguments`."""

import torch
from transformers import TrainingArguments

from titans_lm.training.config import Settings


def trainer_arguments(settings: Settings, evaluate: bool) -> TrainingArguments:
    """`TrainingArguments` of the settings; `evaluate`: whether there is text to evaluate on."""
    s = settings.training
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
        disable_tqdm=s.max_minutes is not None,
        report_to="tensorboard",
        dataloader_pin_memory=torch.cuda.is_available(),
    )
