"""examples/distillation_trainer.py: accumulation changes no gradient, and its logs are true."""

import sys
from pathlib import Path

import pytest
import torch

for name in ("transformers", "accelerate", "datasets"):
    pytest.importorskip(name)

import hf  # noqa: E402
from transformers import TrainingArguments  # noqa: E402

from drkl_triton import drkl, reference  # noqa: E402

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
sys.path.append(str(EXAMPLES))
from distillation_trainer import DistillationTrainer  # noqa: E402

VOCAB, LENGTH = 101, 12


def sequences(count=8, first=True):
    """Token ids whose prompts and paddings, of different lengths, do not count. The first label,
    never a target, is -100 unless ``first``.
    """
    generator = torch.Generator().manual_seed(5)
    rows = []
    for i in range(count):
        ids = torch.randint(3, VOCAB, (LENGTH,), generator=generator)
        labels = ids.clone()
        labels[: max(i % 5, 1 - first)] = labels[LENGTH - i // 2 :] = -100
        rows.append({"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)})
    return rows


def run(folder, batch, accumulation, student=None, steps=1, data=None, **options):
    student = student or hf.model("llama", VOCAB, seed=0)
    args = TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation, learning_rate=1.0, optim="sgd", max_grad_norm=0.0,
        lr_scheduler_type="constant", report_to=[], use_cpu=True, logging_steps=1,
        save_strategy="no", disable_tqdm=True, remove_unused_columns=False,
    )  # fmt: skip
    trainer = DistillationTrainer(
        student,
        args,
        train_dataset=data or sequences(),
        teacher=hf.model("llama", VOCAB, seed=1),
        **options,
    )
    trainer.train()
    return student, [entry for entry in trainer.state.log_history if "loss" in entry], trainer


class Plain(torch.nn.Module):
    """A model whose forward takes no loss keywords. The Trainer counts its tokens all the same, but
    not knowing that the loss shifts, the first label, too.
    """

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        return self.model(input_ids=input_ids, attention_mask=attention_mask)


@pytest.mark.parametrize("wrap", [lambda model: model, Plain], ids=["llama", "plain"])
def test_the_gradient_of_1_x_8_is_that_of_4_x_2_and_plain_pytorchs(wrap, tmp_path):
    data = sequences(first=wrap is not Plain)
    start = [p.detach().clone() for p in hf.model("llama", VOCAB, seed=0).parameters()]

    def gradients(batch, accumulation):
        student = wrap(hf.model("llama", VOCAB, seed=0))
        run(tmp_path, batch, accumulation, student, data=data, gamma=0.3)
        return [old - p.detach() for old, p in zip(start, student.parameters(), strict=True)]

    whole, parts = gradients(8, 1), gradients(2, 4)
    student, teacher = (hf.model("llama", VOCAB, seed=seed) for seed in (0, 1))
    batch = {k: torch.stack([row[k] for row in data]) for k in data[0]}
    labels = batch.pop("labels")
    with torch.no_grad():
        t = teacher(**batch).logits[:, :-1].double()
    s = student(**batch).logits[:, :-1].double()
    reference.drkl(s, t, labels[:, 1:], gamma=0.3).backward()
    for a, b, p in zip(whole, parts, student.parameters(), strict=True):
        size = p.grad.abs().max().item()
        # the optimiser's subtraction rounds to the spacing of the weights
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * size + 1e-7)
        torch.testing.assert_close(a, p.grad, rtol=0, atol=1e-4 * size + 1e-7)


def test_what_it_logs(tmp_path):
    student, log, trainer = run(tmp_path, 2, 2, steps=20, gamma=0.3)
    assert log[-1]["loss"] < 0.7 * log[0]["loss"]
    for entry in log:
        parts = entry["target_kl"] + 0.3 * entry["nontarget_kl"]
        assert abs(entry["loss"] - parts) < 1e-4 * max(1, parts)
        assert entry["student_entropy"] > 0
    trainer.evaluate(sequences(4))
    metrics = trainer.state.log_history[-1]
    batch = {k: torch.stack([row[k] for row in sequences(4)]) for k in sequences(1)[0]}
    labels = batch.pop("labels")
    with torch.no_grad():
        s, t = student.eval()(**batch).logits, trainer.teacher(**batch).logits
    expected = drkl(s, t, labels, gamma=0.3, shift=True)
    assert abs(metrics["eval_loss"] - expected.item()) < 1e-5
    parts = metrics["eval_target_kl"] + 0.3 * metrics["eval_nontarget_kl"]
    assert abs(parts - expected.item()) < 1e-5 and "target_kl" not in metrics


def test_packed_sequences_do_not_see_each_other(tmp_path):
    _, _, trainer = run(tmp_path, 8, 1)
    batch, alone = hf.packed(3, VOCAB)
    seen = []
    for model in (trainer.model, trainer.teacher):
        model.register_forward_pre_hook(lambda _, __, x: seen.append({*x}), with_kwargs=True)
    count = (batch["labels"] != -100).sum()
    whole, *parts = (
        trainer.compute_loss(trainer.model, {**x, "skip_logits": False}, num_items_in_batch=count)
        for x in (batch, *alone)
    )
    torch.testing.assert_close(whole, sum(parts), rtol=1e-5, atol=0)
    # skip_logits is for Liger's forward, which then has none
    assert seen == [{"input_ids", "position_ids", "use_cache"}] * 8
    assert trainer.teacher.config.use_cache  # the caller's model is left as it was
    with pytest.raises(ValueError, match="shift_labels"):
        trainer.compute_loss(trainer.model, {**batch, "shift_labels": batch["labels"]})


def test_a_mixture_of_experts_keeps_its_load_balanced(tmp_path):
    student = hf.experts(VOCAB, output_router_logits=True, router_aux_loss_coef=0.7)
    *_, trainer = run(tmp_path, 8, 1, student)
    batch = {k: torch.stack([row[k] for row in sequences(4)]) for k in sequences(1)[0]}
    count = (batch["labels"] != -100).sum()
    trainer.current_gradient_accumulation_steps = 4
    for training, num_items, steps in ((True, count, 4), (False, count, 1), (True, None, 1)):
        student.train(training)
        loss, outputs = trainer.compute_loss(student, dict(batch), True, num_items)
        with torch.no_grad():
            teacher = trainer.teacher(input_ids=batch["input_ids"]).logits
        alone = drkl(outputs.logits, teacher, batch["labels"], shift=True, num_items=num_items)
        torch.testing.assert_close(loss, alone + 0.7 * outputs.aux_loss / steps)


@pytest.mark.parametrize("bf16", [True, False], ids=["bf16=True", "models in bfloat16"])
def test_the_logits_dtype(bf16, tmp_path, monkeypatch):
    """docs/migrate.md: accelerate makes float32 of them, models in bfloat16 keep theirs."""
    seen = []

    def spy(student, teacher, labels, **options):
        seen.append((student.dtype, teacher.dtype))
        return drkl(student, teacher, labels, **options)

    monkeypatch.setattr(sys.modules["distillation_trainer"], "drkl", spy)
    dtype = torch.float32 if bf16 else torch.bfloat16
    args = TrainingArguments(
        str(tmp_path), max_steps=1, bf16=bf16, report_to=[], use_cpu=True, disable_tqdm=True,
        save_strategy="no", remove_unused_columns=False,
    )  # fmt: skip
    student, teacher = (hf.model("llama", VOCAB, seed=seed).to(dtype) for seed in (0, 1))
    DistillationTrainer(student, args, train_dataset=sequences(), teacher=teacher).train()
    assert set(seen) == {(dtype, dtype)}


def test_it_is_as_short_as_it_says():
    code = (EXAMPLES / "distillation_trainer.py").read_text().split('"""', 2)[2]
    assert len([line for line in code.splitlines() if line.strip()]) <= 50
