"""What is measured on held-out text, and on text sampled from the models.

Every formula here has a test against numbers worked out by hand (tests/test_demo.py).
"""

import math
from collections import Counter
from contextlib import nullcontext

import torch
from progress import progress

from drkl_triton import reverse_kl

BINS = 15  # of top-1 confidence, equal width, for calibration
BLEU_ORDER = 4
BLEU_EPSILON = 0.1  # what a count of 0 matching n-grams is replaced by


# --- per token ---


def masked_log_softmax(log_probabilities, labels):
    """log q̂: the distribution without the label's column, renormalised; -inf at the label."""
    rest = log_probabilities.scatter(-1, labels.unsqueeze(-1), float("-inf"))
    return rest - rest.logsumexp(-1, keepdim=True)


def kl(log_p, log_q):
    """KL(p‖q) over the last dimension, 0 log 0 = 0."""
    absent = log_p == float("-inf")
    difference = (log_p - log_q).masked_fill(absent, 0.0)
    return (log_p.exp() * difference).sum(-1)


def token_metrics(student_logits, teacher_logits, tokens, backend="auto"):
    """{name: [B (T-1)]} for next-token logits [B, T, V] of tokens [B, T].

    The reverse KL and its parts come from the package's RowMetrics; the rest is plain PyTorch.
    """
    _, rows = reverse_kl(
        student_logits,
        teacher_logits,
        tokens,
        shift=True,
        reduction="none",
        backend=backend,
        return_metrics=True,
    )
    labels = tokens[:, 1:]
    log_q = student_logits[:, :-1].float().log_softmax(-1)
    log_p = teacher_logits[:, :-1].float().log_softmax(-1)
    confidence, top = log_q.max(-1)
    metrics = {
        "cross_entropy": -log_q.gather(-1, labels.unsqueeze(-1)).squeeze(-1),
        "kl_teacher_student": kl(log_p, log_q),
        "kl_student_teacher": rows.loss[:, :-1],
        "tail_student_teacher": rows.nontarget_kl[:, :-1],
        "tail_teacher_student": kl(
            masked_log_softmax(log_p, labels), masked_log_softmax(log_q, labels)
        ),
        "agreement": (top == log_p.argmax(-1)).float(),
        "accuracy": (top == labels).float(),
        "confidence": confidence.exp(),
        "label_probability": rows.student_target_prob[:, :-1],
        "label_probability_teacher": rows.teacher_target_prob[:, :-1],
        "entropy": rows.student_entropy[:, :-1],
    }
    return {name: values.flatten() for name, values in metrics.items()}


# --- over a text ---


def reliability_bins(confidence, correct, bins=BINS):
    """For each bin (i/bins, (i+1)/bins] of confidence: the "count" of its tokens, and the sums of
    their "confidence" and "accuracy"."""
    index = (confidence.double() * bins).ceil().long().clamp(1, bins) - 1
    values = torch.stack([torch.ones_like(confidence), confidence, correct]).double()
    sums = torch.zeros(3, bins, dtype=torch.float64).index_add_(1, index, values)
    return dict(zip(("count", "confidence", "accuracy"), sums.tolist(), strict=True))


def expected_calibration_error(bins):
    """Σ_b (n_b / n) |accuracy_b − confidence_b|."""
    gaps = (abs(a - c) for a, c in zip(bins["accuracy"], bins["confidence"], strict=True))
    return sum(gaps) / sum(bins["count"])


@torch.no_grad()
def evaluate(models, teacher, windows, *, device, batch=8, backend="auto", desc=None):
    """{name: {metric: mean over the predicted tokens}}, plus the "reliability" bins; in float32.

    With desc it shows its progress under that name.
    """
    parts = {name: [] for name in models}
    batches = windows.split(batch)
    with progress(len(batches), desc) if desc else nullcontext() as bar:
        for tokens in batches:
            tokens = tokens.to(device)
            teacher_logits = teacher(tokens)
            for name, model in models.items():
                logits = teacher_logits if model is teacher else model(tokens)
                metrics = token_metrics(logits, teacher_logits, tokens, backend)
                parts[name].append({key: values.cpu() for key, values in metrics.items()})
            if bar is not None:
                bar.update()
    return {name: summarise_tokens(part) for name, part in parts.items()}


def summarise_tokens(parts):
    """parts: what token_metrics() gave for each batch."""
    tokens = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    mean = {key: values.double().mean().item() for key, values in tokens.items()}
    mean["label_gap"] = mean["label_probability"] - mean["label_probability_teacher"]
    mean["overconfidence"] = mean["confidence"] - mean["accuracy"]
    mean["reliability"] = reliability_bins(tokens["confidence"], tokens["accuracy"])
    mean["calibration_error"] = expected_calibration_error(mean["reliability"])
    return mean


# --- samples and their diversity ---


def draw(logits, generator):
    """[N, 1]: a token for each row of logits [N, V], by one uniform number of the generator."""
    total = logits.double().softmax(-1).cumsum(-1)
    u = torch.rand(len(total), 1, generator=generator, dtype=total.dtype, device=generator.device)
    u = u.to(total.device) * total[:, -1:]
    return torch.searchsorted(total, u, right=True).clamp_max(logits.shape[-1] - 1)


@torch.no_grad()
def sample(model, prompts, per_prompt, length, seed):
    """[P, per_prompt, length]: continuations of prompts [P, L], drawn from the whole distribution.

    An end-of-text token does not stop a sample: what follows is the start of a new file, as in
    training, and all samples have one length, on which Distinct-2 depends.
    """
    generator = torch.Generator(device=prompts.device).manual_seed(seed)
    caches = [{} for _ in model.blocks]
    tokens = prompts.repeat_interleave(per_prompt, 0)
    new = []
    for _ in range(length):
        tokens = draw(model(tokens, caches)[:, -1], generator)
        new.append(tokens)
    return torch.cat(new, 1).view(len(prompts), per_prompt, length)


@torch.no_grad()
def sample_nll(teacher, prompts, samples, batch=32):
    """Mean −log p(token) of the samples under the teacher (nats): does it find them likely?"""
    per_prompt, length = samples.shape[1:]
    whole = torch.cat([prompts.repeat_interleave(per_prompt, 0), samples.flatten(0, 1)], 1)
    total = 0.0
    for tokens in whole.split(batch):
        log_p = teacher(tokens)[:, -length - 1 : -1].float().log_softmax(-1)
        total -= log_p.gather(-1, tokens[:, -length:, None]).sum(dtype=torch.float64).item()
    return total / samples.numel()


def ngrams(sequence, n):
    return Counter(tuple(sequence[i : i + n]) for i in range(len(sequence) - n + 1))


def distinct(sequences, n=2):
    """Distinct-n: different n-grams over all n-grams of the sequences together."""
    counts = sum((ngrams(sequence, n) for sequence in sequences), Counter())
    return len(counts) / counts.total() if counts else 0.0


def bleu(hypothesis, references, order=BLEU_ORDER):
    """Sentence BLEU: brevity penalty × geometric mean of clipped n-gram precisions, n = 1..order.

    Smoothing ("method 1" of Chen and Cherry, 2014): a numerator of 0 becomes 0.1; with no common
    token at all the score is 0. The brevity penalty takes the reference length closest to the
    hypothesis', the shorter of two as close.
    """
    log_precision = 0.0
    for n in range(1, order + 1):
        counts = ngrams(hypothesis, n)
        most = Counter()
        for reference in references:
            most |= ngrams(reference, n)
        matches = (counts & most).total()
        if n == 1 and matches == 0:
            return 0.0
        log_precision += math.log((matches or BLEU_EPSILON) / max(1, counts.total())) / order
    closest = min((abs(len(r) - len(hypothesis)), len(r)) for r in references)[1]
    brevity = min(0.0, 1 - closest / len(hypothesis))
    return math.exp(brevity + log_precision)


def self_bleu(sequences):
    """Mean BLEU of each sequence against all others (Zhu et al., 2018); 1 if all are the same."""
    scores = [bleu(s, sequences[:i] + sequences[i + 1 :]) for i, s in enumerate(sequences)]
    return sum(scores) / len(scores)


def diversity(samples):
    """Distinct-2 and self-BLEU among each prompt's samples [P, S, T], mean over the prompts."""
    groups = samples.tolist()
    return {
        "distinct_2": sum(map(distinct, groups)) / len(groups),
        "self_bleu": sum(map(self_bleu, groups)) / len(groups),
    }
