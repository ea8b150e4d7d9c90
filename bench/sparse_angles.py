"""What is lost with a few of the teacher's log-probabilities: the angle, in degrees, between the
gradient of the student's logits from them and the one from the whole teacher, on a real text.

python bench/sparse_angles.py --model folder --gguf model.gguf --text speech.txt

The student is the same model without some layers. The model is loaded by transformers (with the
package gguf for such a file).
"""

import argparse
import sys
from pathlib import Path

import tables
import torch

from drkl_triton import (
    SparseTeacher,
    divergence,
    log_probs_at,
    objectives,
    sampled_teacher,
    teacher_topk,
    union_ids,
)

HERE = Path(__file__).parent
COLUMNS = (
    *("text", "tokens", "vocab", "k", "columns", "objective", "tail", "degrees", "value_kept"),
    *("negative_rows", "labels_outside", "model", *tables.ENVIRONMENT, "date"),
)
OBJECTIVES = {
    "forward_kl": objectives.forward_kl(),
    "reverse_kl": objectives.reverse_kl(),
    "drkl": objectives.drkl(0.5),
}


def logits(options):
    """(student, teacher [N, V], labels [N]) of the text's first tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    load = dict(gguf_file=options.gguf) if options.gguf else {}
    tokenizer = AutoTokenizer.from_pretrained(options.model, **load)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32, **load)
    text = options.text.read_text(encoding="utf-8", errors="replace")
    ids = tokenizer(text, return_tensors="pt").input_ids[:, : options.tokens + 1]
    with torch.no_grad():
        teacher = model(ids[:, :-1]).logits[0].float()
        layers = model.model.layers
        kept = [layer for i, layer in enumerate(layers) if i not in options.without]
        model.model.layers = torch.nn.ModuleList(kept)
        for i, layer in enumerate(kept):
            layer.self_attn.layer_idx = i
        model.config.num_hidden_layers = len(kept)
        student = model(ids[:, :-1], use_cache=False).logits[0].float()
    return student, teacher, ids[0, 1:]


def gradient(name, student, teacher, labels):
    x = student.clone().requires_grad_()
    loss = divergence(OBJECTIVES[name], x, teacher, labels, reduction="none")
    (grad,) = torch.autograd.grad(loss.sum(), x)
    return loss.detach(), grad.double().flatten()


def known(ids, teacher, labels, tail):
    at_label = log_probs_at(teacher, labels[:, None], return_tail=False)[:, 0]
    log_probs = log_probs_at(teacher, ids, return_tail=False)
    return SparseTeacher(ids, log_probs, tail=tail, label_log_probs=at_label)


def compare(student, teacher, labels, ks, draws):
    whole = {name: gradient(name, student, teacher, labels) for name in OBJECTIVES}

    def row(name, given, **more):
        right, g = whole[name]
        loss, ours = gradient(name, student, given, labels)
        angle = torch.acos((g @ ours / (g.norm() * ours.norm())).clamp(-1, 1))
        return more | {
            "objective": name,
            "tail": given.tail,
            "degrees": torch.rad2deg(angle).item(),
            "value_kept": (loss.sum() / right.sum()).item(),
            "negative_rows": (loss < 0).double().mean().item(),
        }

    for k in ks:
        top = teacher_topk(teacher, k).ids
        outside = 1 - (top == labels[:, None]).any(-1).double().mean().item()
        columns = {
            "teacher": top,
            "student": student.topk(k).indices,
            "union": union_ids(student, teacher, k),
        }
        for whose, ids in columns.items():
            for tail in ("bucket", "renormalise", "drop", "uniform"):
                if tail != "bucket" and whose != "teacher":
                    continue
                for name in OBJECTIVES:
                    given = known(ids, teacher, labels, tail)
                    if name != "drkl":  # they take no label's column
                        given = SparseTeacher(given.ids, given.log_probs, tail=tail)
                    yield row(name, given, k=k, columns=whose, labels_outside=outside)
    for n in draws:
        torch.manual_seed(n)
        ids = torch.multinomial(teacher.softmax(-1), n, replacement=True)
        yield row("forward_kl", sampled_teacher(ids), k=n, columns="samples")


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", required=True, help="a folder that transformers loads")
    add("--gguf", help="the file in it, of that format")
    add("--text", type=Path, required=True)
    add("--tokens", type=int, default=384)
    add("--without", type=int, nargs="*", default=[14, 17, 20, 23], help="layers of the student")
    add("--k", type=int, nargs="+", default=[1, 20, 64, 128])
    add("--draws", type=int, nargs="*", default=[12, 50, 200])
    add("--out", type=Path, default=HERE / "results" / "sparse-angles.csv")
    options = parser.parse_args(arguments)
    student, teacher, labels = logits(options)
    where = tables.environment(torch.device("cpu"), arguments, "bench/sparse_angles.py")
    where |= {"text": options.text.name, "tokens": len(labels), "vocab": student.shape[-1]}
    where["model"] = f"{options.gguf or options.model} without layers {options.without}"
    rows = []
    for found in compare(student, teacher, labels, options.k, options.draws):
        rows.append(found | where)
        text = "K={k} {columns} {objective} {tail}: {degrees:.1f} degrees, {value_kept:.1%} of the "
        print((text + "value, {negative_rows:.1%} of rows negative").format(**found), flush=True)
        tables.write_csv(options.out, rows, COLUMNS)


if __name__ == "__main__":
    main()
