"""A Hugging Face Trainer that distils: copy it and change it. Needs transformers and accelerate.
One device a process (DDP, FSDP), and one evaluation data set.

args = TrainingArguments("out", gradient_accumulation_steps=4)
DistillationTrainer(student, args, train_dataset=data, teacher=teacher, gamma=0.5).train()
"""

import torch
from transformers import Trainer

from drkl_triton import drkl

LOGGED = ("student_entropy", "target_kl", "nontarget_kl")


class DistillationTrainer(Trainer):
    def __init__(self, *args, teacher, gamma=0.5, temperature=1.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.teacher = self.accelerator.prepare_model(teacher.eval(), evaluation_mode=True)
        self.gamma, self.temperature, self.sums = gamma, temperature, {}
        # The Trainer is to count num_items_in_batch. (Of a model that is not from transformers it
        # counts labels[:, 0], too, which nothing predicts: make them -100.)
        self.model_accepts_loss_kwargs = True
        config = getattr(self.model, "config", None)
        # With a cache, transformers lets packed sequences see each other: neither model has one.
        self.options = {} if config is None else {"use_cache": False}
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        self.aux_weight = getattr(text, "router_aux_loss_coef", 0.0)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if "shift_labels" in inputs:
            raise ValueError("shift_labels is not supported; pass labels as long as input_ids")
        labels = inputs["labels"]
        inputs = {k: v for k, v in inputs.items() if k not in ("labels", "skip_logits")}
        outputs = model(**inputs, **self.options)
        with torch.no_grad():
            teacher_logits = self.teacher(**inputs, **self.options).logits
        # The tokens of the whole step, not of this micro-batch, are the denominator.
        loss, metrics = drkl(
            outputs.logits, teacher_logits, labels, gamma=self.gamma, shift=True,
            temperature=self.temperature, num_items=num_items_in_batch, return_metrics=True,
        )  # fmt: skip
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # whose gradients are averaged
        if getattr(outputs, "aux_loss", None) is not None:  # experts, config.output_router_logits
            divide = model.training and num_items_in_batch is not None  # the Trainer does not
            steps = self.current_gradient_accumulation_steps if divide else 1
            loss = loss + self.aux_weight * outputs.aux_loss / steps
        tokens = (labels[:, 1:] != -100).sum()
        sums = torch.stack([*(getattr(metrics, name).sum() for name in LOGGED), tokens])
        mode = "loss" if model.training else "eval_loss"
        self.sums[mode] = self.sums.get(mode, 0) + sums
        return (loss, outputs) if return_outputs else loss

    def log(self, logs, *args, **kwargs):
        for loss in self.sums.keys() & logs.keys():  # once per logged step, so this may wait
            *sums, tokens = self.accelerator.reduce(self.sums.pop(loss)).tolist()
            for name, total in zip(LOGGED, sums, strict=True):
                logs[loss.removesuffix("loss") + name] = total / max(tokens, 1)
        super().log(logs, *args, **kwargs)
