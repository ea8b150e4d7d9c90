"""For TRL (https://github.com/huggingface/trl): its ``generalized_jsd_loss`` fused, and a trainer
that minimises DRKL. Needs trl; tested with the release that constraints.txt names.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import _checks, functional
from ..algebra import RowMetrics

try:
    from trl.experimental.gkd import GKDConfig, GKDTrainer
    from trl.models.utils import unwrap_model_for_generation
except ImportError as error:
    raise ImportError(
        "drkl_triton.adapters.trl needs a TRL that has trl.experimental.gkd, and its dependencies "
        f"({error}). Install them with: pip install 'trl>=1.16'"
    ) from error

__all__ = ["DRKLConfig", "DRKLTrainer", "generalized_jsd_loss"]

# Taken at import, so that it stays TRL's when a caller puts ours in its place.
_trl_jsd = GKDTrainer.generalized_jsd_loss
# Options of js_divergence that a caller may pass beside TRL's own arguments.
_FUSED_OPTIONS = frozenset({"backend", "filter_value", "support", "vocab_mismatch"})
# The fields of RowMetrics that DRKLTrainer logs.
_LOGGED = (
    "student_entropy",
    "target_kl",
    "nontarget_kl",
    "student_target_prob",
    "teacher_target_prob",
)
# What collators and trainers put into a batch that is no input of a model.
_PROMPTS = frozenset({"prompts", "prompt_attention_mask"})
_NOT_INPUTS = _PROMPTS | {
    "labels", "byte_offsets", "completion_mask", "original_prompt_text", "original_completion_text",
    "skip_logits",
}  # fmt: skip
_PACKED = (
    "pass sequences that are packed already, lmbda=0 and "
    "data_collator=DataCollatorForLanguageModeling(pad_token_id, padding_free=True)"
)
_LABELS = "the loss is of the tokens whose label is not -100; pass a data_collator that sets them"
# Options of TRL's that this loss does not follow, what they must stay, and what to do.
_IGNORED_OPTIONS = {
    "loss_type": (("nll",), "DRKL is the loss; gamma and loss_temperature are its options"),
    "label_smoothing_factor": ((0, 0.0), "DRKL has none; raise loss_temperature for softer rows"),
    "use_liger_kernel": ((False,), "it would keep the logits from this loss; leave it out"),
    "packing": ((False,), _PACKED),
    "eval_packing": ((False, None), _PACKED),
    "padding_free": ((False,), _PACKED),
    "completion_only_loss": ((None, True), _LABELS),
    "assistant_only_loss": ((False,), _LABELS),
    "pad_to_multiple_of": (("auto", None), "pass a data_collator that pads"),
}


def generalized_jsd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    num_items_in_batch: float | Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """TRL's generalized Jensen-Shannon divergence (arXiv 2306.13649, Eq. 1), computed by
    :func:`drkl_triton.js_divergence` where it is summed: with ``"batchmean"``, ``"sum"`` or
    ``num_items_in_batch``. All else is handed to TRL's own function.

    Args:
        student_logits, teacher_logits: ``[B, T, V]``, already shifted. Fused, they must have the
            same shape, and the teacher must not require grad.
        labels: ``[B, T]``, int64; positions at -100 do not count. None: all count. Fused, int64 or
            int32, of the logits' leading shape.
        beta: 0 is KL(teacher || student), 1 is KL(student || teacher), between them the mixture.
        temperature: divides both logits.
        reduction: ``"batchmean"`` (sum over the positions that count / their number; without labels
            / B), ``"sum"``, or TRL's ``"mean"`` and ``"none"``, which are elementwise over the
            vocabulary.
        num_items_in_batch: number, or tensor of one element on any device; where given, the result
            is sum / num_items_in_batch, whatever ``reduction`` says. A tensor of several elements
            goes to TRL's function.
        kwargs: ``backend``, ``filter_value``, ``support``, ``vocab_mismatch`` of
            :func:`drkl_triton.js_divergence`, for calls that are fused. With any other the call
            goes to TRL's function.

    Returns:
        0-dim loss in nats. Fused, it is float32 (float64 where either side is float64) also for
        16-bit logits, in whose dtype TRL computes outside of autocast. The fused form differs in
        two more cases: a student at -inf adds 0, where 0 x -inf makes TRL's NaN; and
        num_items_in_batch of 0 gives 0, where TRL divides by 0.

    Raises:
        TypeError, ValueError: fused, as :func:`drkl_triton.js_divergence`; else TRL's. TypeError
            for an option of ours in a call that is not fused.
    """
    several = isinstance(num_items_in_batch, Tensor) and num_items_in_batch.numel() != 1
    summed = num_items_in_batch is not None or reduction in ("batchmean", "sum")
    fused = summed and not several
    ours = sorted(kwargs.keys() & _FUSED_OPTIONS)
    if ours and not fused:
        raise TypeError(
            f"{', '.join(ours)} must go with a call that is fused, got reduction={reduction!r}; "
            "pass a reduction of batchmean or sum, or one num_items_in_batch, or leave them out"
        )
    if not (fused and kwargs.keys() <= _FUSED_OPTIONS):
        return _trl_jsd(
            student_logits,
            teacher_logits,
            labels=labels,
            beta=beta,
            temperature=temperature,
            reduction=reduction,
            num_items_in_batch=num_items_in_batch,
            **kwargs,
        )
    if num_items_in_batch is not None:
        kwargs |= {"reduction": "mean", "num_items": _first(num_items_in_batch)}
    elif reduction == "sum":
        kwargs["reduction"] = "sum"
    elif labels is None:
        kwargs |= {"reduction": "mean", "num_items": max(student_logits.size(0), 1)}
    return functional.js_divergence(
        student_logits, teacher_logits, labels, beta=beta, temperature=temperature, **kwargs
    )


def _first(count: float | Tensor) -> float | Tensor:
    """0-dim. With several GPUs in one process the Trainer passes the same number for each."""
    return count.reshape(-1)[0] if isinstance(count, Tensor) and count.dim() else count


@dataclass
class DRKLConfig(GKDConfig):
    """TRL's ``GKDConfig`` with the options of :func:`drkl_triton.drkl`.

    Args:
        gamma: positive; the weight of the non-target part.
        loss_temperature: positive; divides both models' logits in the loss. TRL's ``temperature``
            is that of sampling, and its GKD trainer, too, computes the loss at 1.

    ``beta``, which interpolates TRL's divergence, has no meaning here and must stay 1. ``lmbda``,
    ``seq_kd`` and the rest are TRL's.
    """

    gamma: float = field(default=0.5, metadata={"help": "Weight of DRKL's non-target part."})
    loss_temperature: float = field(
        default=1.0, metadata={"help": "Temperature of both distributions in the loss."}
    )
    beta: float = field(default=1.0, metadata={"help": "Not used by DRKL; must stay 1."})

    def __post_init__(self):
        super().__post_init__()
        _checks.positive("gamma", self.gamma)
        _checks.positive("loss_temperature", self.loss_temperature)
        if self.beta != 1:
            raise ValueError(
                f"beta is not used by DRKL and must stay 1, got {self.beta!r}. Leave it out, or "
                "take TRL's GKDTrainer for the generalized Jensen-Shannon divergence."
            )


class DRKLTrainer(GKDTrainer):
    """TRL's ``GKDTrainer``, minimising :func:`drkl_triton.drkl` with ``args.gamma``: the same
    arguments, data, collator and on-policy generation, a :class:`DRKLConfig` for ``args``.

    Logs besides TRL's, as means over the tokens that count, on all processes:
    ``student_entropy``, ``target_kl``, ``nontarget_kl``, ``student_target_prob`` and
    ``teacher_target_prob`` of :class:`drkl_triton.RowMetrics` (nats and probabilities), before them
    in evaluation what stands before ``loss``: ``eval_``, or ``eval_NAME_`` of several data sets.

    The loss of a micro-batch is its sum over the tokens that the whole step counts, on all
    processes, so neither gradient accumulation nor the number of processes changes the gradient.
    Answers that are generated (``lmbda``, ``seq_kd``) are generated before they are counted. Every
    input of a batch reaches both models, which run without a cache: position_ids of packed
    sequences, pixel values. A mixture of experts keeps TRL's auxiliary loss. Under ``bf16=True``
    accelerate hands in float32 logits; docs/migrate.md says how to have them in 16 bits.

    Raises:
        TypeError: ``args`` is no :class:`DRKLConfig`.
        ValueError: an option of TRL's that would be ignored; generated answers to inputs that
            generation does not see; ``shift_labels``; prompt tuning.
    """

    _tag_names = ["trl", "gkd", "drkl"]

    def __init__(self, *args: Any, **kwargs: Any):
        config = kwargs.get("args", args[2] if len(args) > 2 else None)
        if not isinstance(config, DRKLConfig):
            raise TypeError(
                f"DRKLTrainer needs args to be a DRKLConfig, got {type(config).__name__}. It takes "
                "everything that GKDConfig takes, and gamma."
            )
        for name, (allowed, advice) in _IGNORED_OPTIONS.items():
            if (value := getattr(config, name, allowed[0])) not in allowed:
                raise ValueError(
                    f"{name} must be {allowed[0]!r} for DRKLTrainer, got {value!r}: {advice}"
                )
        if kwargs.get("formatting_func") is not None:
            raise ValueError(
                "formatting_func must be left out: DRKLTrainer does not prepare data; apply "
                "it with datasets.Dataset.map"
            )
        super().__init__(*args, **kwargs)
        # The Trainer is to count num_items_in_batch, whatever the model accepts, and as this loss
        # shifts the labels.
        self.model_accepts_loss_kwargs = self._loss_shifts_labels = True
        self._sums: dict[str, Tensor] = {}  # of the metrics over tokens, and the tokens' number

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """A step's micro-batches, generated where they are to be, and then counted."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        batches = [self._generated(batch) for batch in batches]
        return batches, self._get_num_items_in_batch(batches, device)

    def _generated(self, batch):
        if not (self.lmbda or self.seq_kd):
            return batch
        others = sorted(batch.keys() - _NOT_INPUTS - {"input_ids", "attention_mask"})
        if others or not _PROMPTS <= batch.keys():
            found = f"with {', '.join(others)}" if others else "without prompts"
            raise ValueError(
                f"answers are generated (lmbda={self.lmbda}, seq_kd={self.seq_kd}) to prompts and "
                f"prompt_attention_mask alone, got a batch {found}; set lmbda=0 and seq_kd=False"
            )
        if random.random() <= self.lmbda:
            writer, options = self.model_wrapped, self.args.gradient_checkpointing_kwargs
        elif self.seq_kd:
            writer, options = self.teacher_model, None
        else:
            return batch
        batch = self._prepare_inputs(batch)
        with unwrap_model_for_generation(
            writer,
            self.accelerator,
            generation_kwargs=self.generation_kwargs,
            gradient_checkpointing_kwargs=options,
        ) as model:
            ids, mask, labels = self.generate_on_policy_outputs(
                model, batch, self.generation_config
            )
        return {**batch, "input_ids": ids, "attention_mask": mask, "labels": labels}

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        return super(GKDTrainer, self).training_step(*args, **kwargs)  # generated already

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if "shift_labels" in inputs:
            raise ValueError(
                "shift_labels is not supported, got a batch with it (context parallelism, or a "
                "collator that shifts); pass labels as long as input_ids"
            )
        labels = inputs["labels"]
        inputs = {key: value for key, value in inputs.items() if key not in _NOT_INPUTS}
        # with a cache transformers drops the mask of packed sequences
        inputs |= {"use_cache": False}
        with_routers = {"output_router_logits": True} if self.aux_loss_enabled else {}
        outputs = model(**inputs, **with_routers)
        if outputs.logits.shape[:-1] != labels.shape:
            raise ValueError(
                f"the student's logits must be one for each label, got {tuple(labels.shape)} "
                f"labels and {tuple(outputs.logits.shape)} logits (prompt tuning adds positions); "
                "use an adapter that adds none, such as LoRA"
            )
        self.teacher_model.eval()
        with torch.no_grad():
            teacher_logits = self.teacher_model(**inputs).logits
        loss, metrics = functional.drkl(
            outputs.logits,
            teacher_logits,
            labels,
            gamma=self.args.gamma,
            temperature=self.args.loss_temperature,
            num_items=None if num_items_in_batch is None else _first(num_items_in_batch),
            shift=True,
            return_metrics=True,
        )
        counted = num_items_in_batch is not None
        if counted and self.args.average_tokens_across_devices:
            # several GPUs in one process share the loss of the whole batch
            if self.args.n_gpu <= 1:
                loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        if self.aux_loss_enabled:
            # a mean of the micro-batch; in training the Trainer does not divide what was counted
            divide = counted and self.model.training
            steps = self.current_gradient_accumulation_steps if divide else 1
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss / steps
        self._add(metrics, (labels[..., 1:] != -100).sum())
        return (loss, outputs) if return_outputs else loss

    def _add(self, metrics: RowMetrics, count: Tensor) -> None:
        sums = torch.stack([*(getattr(metrics, name).sum() for name in _LOGGED), count])
        mode = "train" if self.model.training else "eval"
        self._sums[mode] = self._sums.get(mode, 0) + sums.float()

    def train(self, *args: Any, **kwargs: Any):
        self._sums.clear()
        return super().train(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any):
        self._sums.pop("eval", None)  # of predict, or of an evaluation that did not end
        return super().evaluation_loop(*args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        # the entry of a training step, or of the evaluation of one of several data sets
        losses = [key for key in logs if key == "loss" or re.fullmatch("eval.*_loss", key)]
        for key in losses[:1]:
            mode = "train" if key == "loss" else "eval"
            if mode in self._sums:
                *sums, count = self.accelerator.reduce(self._sums.pop(mode)).tolist()
                for name, total in zip(_LOGGED, sums, strict=True):
                    logs[key.removesuffix("loss") + name] = total / max(count, 1)
        super().log(logs, *args, **kwargs)
