"""What is measured of a student: on held-out documents, over training, and of its samples."""

from collections import defaultdict

import smollm
import torch
import torch.nn.functional as F
from evaluate import distinct, draw, ngrams, self_bleu, summarise_tokens, token_metrics
from transformers import DynamicCache

from drkl_triton import linear_reverse_kl

BATCH = 2  # windows: float32 logits of V = 49,152 are 50 MB then
REPEATED = 4  # n of the repeated n-grams


def _batches(setting, windows):
    for i in range(0, len(windows), BATCH):
        batch = windows[i : i + BATCH]
        yield batch, *setting.tensors(batch)


@torch.no_grad()
def documents(student, setting, windows):
    """{document: what evaluate.summarise_tokens makes of its tokens}"""
    found = defaultdict(list)
    for batch, tokens, given in _batches(setting, windows):
        teacher = F.linear(given, setting.teacher_matrix)
        logits = F.linear(smollm.hidden(student, tokens), smollm.matrix(student))
        metrics = token_metrics(logits, teacher, tokens)
        per_window = tokens.shape[1] - 1
        for j, window in enumerate(batch):
            own = slice(j * per_window, (j + 1) * per_window)
            found[window.document].append({k: v[own].cpu() for k, v in metrics.items()})
    return {document: summarise_tokens(parts) for document, parts in found.items()}


@torch.no_grad()
def pull(student, setting, windows):
    """Means over the predicted tokens: KL(q‖p), the tail's KL N = KL(q̂‖p̂), and over those with
    q_y >= p_y the pull of reverse KL's non-target term on the target's logit. That is
    (1 - q_y) N; N does not change with the target's logit, and dq_y/ds_y = q_y (1 - q_y), so that
    its derivative is -q_y (1 - q_y) N. Descent follows it upwards: the pull is its size.
    """
    rows = []
    for _, tokens, given in _batches(setting, windows):
        _, row = linear_reverse_kl(
            smollm.hidden(student, tokens), smollm.matrix(student), tokens, shift=True,
            teacher_hidden=given, teacher_weight=setting.teacher_matrix, reduction="none",
            return_metrics=True,
        )  # fmt: skip
        names = "loss", "nontarget_kl", "student_target_prob", "teacher_target_prob"
        rows.append(torch.stack([getattr(row, name)[:, :-1].flatten() for name in names]))
    loss, tail, q, p = torch.cat(rows, 1).double()
    sure = q >= p
    pulled = (q * (1 - q) * tail)[sure]
    return {
        "kl_student_teacher": loss.mean().item(),
        "tail_student_teacher": tail.mean().item(),
        "pull": pulled.mean().item() if len(pulled) else 0.0,
        "sure": sure.double().mean().item(),
    }


@torch.no_grad()
def sample(model, prompts, count, length, seed):
    """[P, count, length]: continuations of prompts [P, L] at temperature 1, from the whole
    distribution. The same seed draws the same uniform numbers for every model.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens, past, new = prompts.repeat_interleave(count, 0), DynamicCache(), []
    for _ in range(length):
        out = model.model(input_ids=tokens, cache=past, use_cache=True)
        logits = F.linear(out.last_hidden_state[:, -1], smollm.matrix(model))
        tokens = draw(logits, generator)
        new.append(tokens)
    return torch.cat(new, 1).view(len(prompts), count, length)


@torch.no_grad()
def log_likelihood(teacher, prompts, samples, batch=8):
    """[P]: the teacher's mean log p of a sampled token."""
    count, length = samples.shape[1:]
    whole = torch.cat([prompts.repeat_interleave(count, 0), samples.flatten(0, 1)], 1)
    found = []
    for tokens in whole.split(batch):
        hidden = smollm.hidden(teacher, tokens)[:, -length - 1 : -1]
        log_p = F.linear(hidden, smollm.matrix(teacher)).log_softmax(-1)
        found.append(log_p.gather(-1, tokens[:, -length:, None]).mean((1, 2)))
    return torch.cat(found).view(-1, count).mean(1).tolist()


def repetition(sequence, n=REPEATED):
    """The share of a sequence's n-grams that occurred in it before."""
    counts = ngrams(sequence, n)
    return 1 - len(counts) / counts.total() if counts else 0.0


def samples(prompts, teacher, drawn):
    """[{metric: number}], one for each prompt: of its samples together."""
    log_p = log_likelihood(teacher, prompts, drawn)
    found = []
    for i, group in enumerate(drawn.tolist()):
        found.append(
            {
                "distinct_1": distinct(group, 1),
                "distinct_2": distinct(group, 2),
                "self_bleu": self_bleu(group),
                "repetition": sum(map(repetition, group)) / len(group),
                "fidelity": log_p[i],
            }
        )
    return found
