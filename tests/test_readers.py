"""drkl_triton/readers.py, on samples in the form that each producer documents (tests/data). They
were written by hand, to that form.
"""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given as given_that
from hypothesis import settings
from hypothesis import strategies as st

from drkl_triton import SparseTeacher, readers, reverse_kl

INF = float("inf")
DATA = Path(__file__).parent / "data"


def sample(name):
    return json.loads((DATA / name).read_text(encoding="utf-8"))


def entries(teacher):
    """{(row, id): log-probability} of one sequence."""
    return {
        (t, i): pytest.approx(x)
        for t, (ids, values) in enumerate(
            zip(teacher.ids.tolist(), teacher.log_probs.tolist(), strict=True)
        )
        for i, x in zip(ids, values, strict=True)
        if i >= 0
    }


def test_vllm():
    given = sample("vllm_prompt_logprobs.json")
    prompt, tokens = given["prompt_logprobs"], given["prompt_token_ids"]
    teacher = readers.vllm_prompt_logprobs(prompt, tokens)
    assert entries(teacher) == {
        (t - 1, int(i)): x["logprob"] for t in range(1, 5) for i, x in prompt[t].items()
    }
    assert teacher.ids.shape == (5, 3) and (teacher.ids[-1] == -1).all()
    assert teacher.label_log_probs.tolist() == pytest.approx(
        [-5.2188, -0.1094, -3.0156, -0.3125, -INF]
    )
    # as the engine has them: integers and objects, and bare numbers
    objects = [None, *({int(i): SimpleNamespace(**x) for i, x in p.items()} for p in prompt[1:])]
    numbers = [None, *({int(i): x["logprob"] for i, x in p.items()} for p in prompt[1:])]
    for same in (objects, numbers):
        assert torch.equal(readers.vllm_prompt_logprobs(same).ids, teacher.ids)
        assert torch.equal(readers.vllm_prompt_logprobs(same).log_probs, teacher.log_probs)


def test_a_batch_of_prompts_is_padded_and_trains():
    given = sample("vllm_prompt_logprobs.json")
    prompts = [given["prompt_logprobs"], given["prompt_logprobs"][:3]]
    tokens = [given["prompt_token_ids"], given["prompt_token_ids"][:3]]
    teacher = readers.vllm_prompt_logprobs(prompts, tokens)
    assert teacher.ids.shape == (2, 5, 3) and (teacher.ids[1, 2:] == -1).all()
    labels = torch.tensor([tokens[0], [*tokens[1], -100, -100]])
    student = torch.randn(2, 5, 10000, requires_grad=True)
    loss = reverse_kl(student, teacher, labels, shift=True)
    loss.backward()
    assert loss > 0 and (student.grad[1, 2:] == 0).all() and (student.grad[0, :4] != 0).any()


def test_sglang_and_tinker():
    given = sample("sglang_logprobs.json")
    teacher = readers.sglang_logprobs(given["input_top_logprobs"], given["input_ids"])
    assert entries(teacher) == {
        (0, 1156): -2.4063,
        (0, 1850): -2.9688,
        (1, 315): -0.1094,
        (1, 323): -3.3594,
    }
    # the first label is not among the ids
    assert teacher.label_log_probs.tolist() == pytest.approx([-INF, -0.1094, -INF])
    pairs = [None, *([(i, x) for x, i, _ in row] for row in given["input_top_logprobs"][1:])]
    assert torch.equal(readers.tinker_prompt_logprobs(pairs).ids, teacher.ids)


def test_trl_server():
    given = sample("trl_server.json")
    teacher = readers.trl_server(given["logprobs"], given["logprob_token_ids"])
    assert teacher.ids.tolist() == [[[264, 279], [2025, 3405]], [[13, 0], [-1, -1]]]
    assert teacher.log_probs[1, 0].tolist() == [-0.0625, -3.5]


def test_axolotl():
    teacher = readers.axolotl(sample("axolotl.json"))
    assert entries(teacher) == {
        (0, 279): -0.2231,
        (0, 264): -1.6094,
        (1, 1156): -0.0513,
        (1, 1850): -2.9957,
    }
    assert teacher.tail == "renormalise" and not teacher.normalised
    reverse_kl(torch.randn(3, 2000), teacher, temperature=2.0)


def test_nemo_rl():
    logits = torch.randn(1, 3, 50)
    values, ids = logits.topk(4)
    teacher = readers.nemo_rl(values, ids)
    assert teacher.tail == "renormalise"
    whole = readers.nemo_rl(values, ids, logits.logsumexp(-1))
    student = torch.randn(1, 3, 50)
    right = SparseTeacher(ids, logits.log_softmax(-1).gather(-1, ids))
    torch.testing.assert_close(reverse_kl(student, whole), reverse_kl(student, right))


def test_verl():
    log_probs = torch.tensor([[[-0.5, -1.5], [-0.25, 0.0], [0.0, 0.0], [0.0, -INF]]])
    ids = torch.tensor([[[7, 9], [4, 2], [0, 0], [5, 0]]], dtype=torch.int32)
    teacher = readers.verl(log_probs, ids)
    assert teacher.ids.tolist() == [[[7, 9], [4, -1], [-1, -1], [5, -1]]]
    assert teacher.log_probs[0, 1].tolist() == [-0.25, -INF]
    masked = readers.verl(log_probs, ids, torch.tensor([[True, False, True, True]]))
    assert masked.ids[0, 1].tolist() == [-1, -1]


def test_distillkit(tmp_path):
    rows = {
        "token_ids": [[[5, 6], [7, 8]], [[1, 2]]],
        "top_values": [[[-0.5, -1.0]] * 2, [[-1.0, -2.0]]],
    }
    pq = pytest.importorskip("pyarrow.parquet")
    pa = pytest.importorskip("pyarrow")
    pq.write_table(pa.table(rows), tmp_path / "teacher.parquet")
    first, second = readers.distillkit_parquet(tmp_path / "teacher.parquet")
    assert first.ids.tolist() == [[5, 6], [7, 8], [-1, -1]]
    assert entries(second) == {(0, 1): -1.0, (0, 2): -2.0}


@pytest.mark.parametrize("prompt, words", [
    ([], "the prompt: expected a list by position"),
    ([None, 5], "position 1: expected a mapping"),
    ([None, {"x": -1.0}], "position 1: expected token ids"),
    ([None, {1.5: -1.0}], "position 1: expected token ids"),
    ([None, {-2: -1.0}], "position 1: expected token ids"),
    ([None, {3: None}], "position 1: expected a log-probability"),
    ([None, {3: math.nan}], "position 1: expected log-probabilities"),
    ([None, {3: -1.0}, {4: 0.7}], "position 2: expected log-probabilities, in nats, of at most 0"),
    ([[None, {3: -1.0}], [None, {4: 0.7}]], "position 1 of sequence 1"),
])  # fmt: skip
def test_what_no_server_writes(prompt, words):
    with pytest.raises(ValueError, match=words):
        readers.vllm_prompt_logprobs(prompt)


def test_what_does_not_fit_together():
    with pytest.raises(ValueError, match="a token a position"):
        readers.vllm_prompt_logprobs([None, {3: -1.0}], [1, 2, 3])
    with pytest.raises(ValueError, match="the shape of the token_ids"):
        readers.trl_server([[[-1.0]]], [[[1, 2]]])
    with pytest.raises(ValueError, match="one value a row"):
        readers.verl(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3).long(), torch.zeros(2, 2))
    with pytest.raises(ValueError, match="token_id:123"):
        readers.axolotl([[{"token": "the", "logprob": -1.0}]])
    with pytest.raises(ValueError, match="a list of entries"):
        readers.sglang_logprobs([None, "text"])


def test_ragged_and_unknown_positions():
    teacher = readers.vllm_prompt_logprobs([None, {3: -1.0}, None, {1: -2.0, 2: -3.0, 4: -INF}])
    assert entries(teacher) == {(0, 3): -1.0, (2, 1): -2.0, (2, 2): -3.0}
    assert readers.vllm_prompt_logprobs([None]).ids.tolist() == [[-1]]
    # of an id that comes twice the first counts, for the label, too
    twice = readers.sglang_logprobs([None, [[-0.5, 3, None], [-0.75, 3, None]]], [1, 3])
    assert twice.label_log_probs.tolist() == [-0.5, -INF]


# --- what the documented forms have in the corners ---


def test_an_infinity_in_json():
    """vLLM's server writes -9999.0 for -inf, which JSON lacks."""
    teacher = readers.vllm_prompt_logprobs([None, {"3": -0.5, "4": -9999.0}], [9, 4])
    assert teacher.ids.tolist() == [[3, -1], [-1, -1]]
    assert teacher.log_probs[0].tolist() == [-0.5, -INF]
    assert teacher.label_log_probs.tolist() == [-INF, -INF]


def test_a_flat_list_has_nothing_at_its_first_position():
    flat = [{}, {3: -0.5}]  # indexed, vLLM's flat_logprobs gives empty mappings
    assert entries(readers.vllm_prompt_logprobs(flat)) == {(0, 3): -0.5}
    assert readers.vllm_prompt_logprobs([flat, flat]).ids.shape == (2, 2, 1)


def test_labels_outside_of_the_largest():
    given = sample("sglang_logprobs.json")
    top, own = given["input_top_logprobs"], given["input_token_logprobs"]
    teacher = readers.sglang_logprobs(top, input_token_logprobs=own)
    assert teacher.label_log_probs.tolist() == pytest.approx([-5.2188, -0.1094, -INF])
    both = readers.sglang_logprobs([top, top[:2]], input_token_logprobs=[own, own[:2]])
    assert both.label_log_probs.tolist()[1] == pytest.approx([-5.2188, -INF, -INF])

    given = sample("tinker.json")
    teacher = readers.tinker_prompt_logprobs(
        given["topk_prompt_logprobs"], prompt_logprobs=given["prompt_logprobs"]
    )
    assert entries(teacher) == {
        (0, 1156): -2.4063,
        (0, 1850): -2.9688,
        (1, 315): -0.1094,
        (1, 323): -3.3594,
    }
    assert teacher.label_log_probs.tolist() == pytest.approx([-5.2188, -0.1094, -INF])

    given = sample("trl_server.json")
    teacher = readers.trl_server(
        given["logprobs"], given["logprob_token_ids"], given["actual_logprobs"]
    )
    assert teacher.label_log_probs.tolist() == [[-0.25, -3.75], [-0.0625, -INF]]


def test_trl_completions_of_unequal_length():
    given = sample("trl_server_ragged.json")
    teacher = readers.trl_server(
        given["logprobs"], given["logprob_token_ids"], given["actual_logprobs"]
    )
    assert teacher.ids.tolist() == [[[264, 279], [2025, -1]], [[13, 0], [-1, -1]]]
    assert teacher.label_log_probs.tolist() == [[-0.25, -3.75], [-0.0625, -INF]]


def test_trl_as_arrays():
    given = sample("trl_server.json")
    lists = readers.trl_server(given["logprobs"], given["logprob_token_ids"])
    logprobs, ids = np.array(given["logprobs"], "float32"), np.array(given["logprob_token_ids"])
    for arrays in (
        readers.trl_server(logprobs, ids),
        readers.trl_server(torch.tensor(logprobs), torch.tensor(ids)),
    ):
        assert torch.equal(arrays.ids, lists.ids)
        assert torch.equal(arrays.log_probs, lists.log_probs)


def test_axolotl_rows_line_up_with_the_whole_sequence():
    """The list's entries are of the last tokens: the first of three, in five, is of token 2."""
    rows = [None, *sample("axolotl.json")[:2]]
    teacher = readers.axolotl(rows, length=5)
    assert entries(teacher) == {
        (2, 279): -0.2231,
        (2, 264): -1.6094,
        (3, 1156): -0.0513,
        (3, 1850): -2.9957,
    }
    assert teacher.ids.shape == (5, 2)
    assert entries(readers.axolotl(rows, length=3)).keys() == {
        (0, 279),
        (0, 264),
        (1, 1156),
        (1, 1850),
    }
    with pytest.raises(ValueError, match="length: expected at least the 3 rows, got 2"):
        readers.axolotl(rows, length=2)


def test_verl_keeps_the_columns_that_a_teacher_is_sure_of():
    """log p rounds to 0 where p > 1 - 6e-8: such an entry is none of verl's pads."""
    given = sample("verl.json")
    log_probs, ids = torch.tensor(given["logprobs"]), torch.tensor(given["ids"], dtype=torch.int32)
    teacher = readers.verl(log_probs, ids)
    assert teacher.ids.tolist() == [[[7, 9], [4, 2], [3, 8], [-1, -1]], [[5, 6]] + [[-1, -1]] * 3]
    assert teacher.log_probs[0].tolist() == [[-0.5, -1.5], [-0.25, -2.0], [0.0, -17.5], [-INF] * 2]
    mask = torch.tensor(given["mask"])
    masked = readers.verl(log_probs, ids, mask)
    assert torch.equal(masked.ids, teacher.ids)
    # with one column only the mask tells
    assert readers.verl(torch.zeros(1, 1, 1), torch.zeros(1, 1, 1).long()).ids.tolist() == [[[0]]]
    mask = torch.tensor([[False]])
    one = readers.verl(torch.zeros(1, 1, 1), torch.zeros(1, 1, 1).long(), mask)
    assert one.ids.tolist() == [[[-1]]] and one.log_probs.tolist() == [[[-INF]]]


def test_distillkit_ids_of_no_entry_are_anything():
    ids = torch.tensor([[5, 1 << 40], [7, 8]])
    values = torch.tensor([[-0.5, -INF], [-0.25, -3.0]])
    teacher = readers.distillkit(ids, values)
    assert teacher.ids.tolist() == [[5, -1], [7, 8], [-1, -1]]
    given = sample("distillkit.json")
    columns = zip(given["token_ids"], given["top_values"], strict=True)
    first, second = (readers.distillkit(*x) for x in columns)
    assert entries(first) == {
        (0, 1156): -2.4063,
        (0, 1850): -2.9688,
        (1, 315): -0.1094,
        (1, 323): -3.3594,
    }
    assert entries(second) == {(0, 9625): -0.5, (0, 279): -1.2031}
    assert readers.distillkit([], []).ids.tolist() == [[-1]]  # a document of one token


def test_parquet_needs_pyarrow(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match="pip install pyarrow"):
        readers.distillkit_parquet("teacher.parquet")


def test_nemo_rl_sample():
    given = sample("nemo_rl.json")
    logits = torch.tensor(given["teacher_topk_logits"])
    teacher = readers.nemo_rl(logits, torch.tensor(given["teacher_topk_indices"]))
    assert teacher.ids.tolist() == given["teacher_topk_indices"] and not teacher.normalised
    assert torch.equal(teacher.log_probs, logits)


@pytest.mark.parametrize("read, words", [
    (lambda: readers.vllm_prompt_logprobs([{3: -1.0}, {4: -1.0}]), "the prompt: expected a list"),
    (lambda: readers.vllm_prompt_logprobs([[]]), "the prompt: expected a list"),
    (lambda: readers.vllm_prompt_logprobs([[None, {3: -1.0}], []]), "sequence 1: expected a list"),
    (lambda: readers.vllm_prompt_logprobs([None, {1 << 63: -1.0}]), "position 1: expected token"),
    (lambda: readers.sglang_logprobs([[[-1.0, 3, None]], [[-1.0, 4, None]]]), "the prompt"),
    (lambda: readers.sglang_logprobs([None, [5]]), "position 1: expected"),
    (lambda: readers.sglang_logprobs([None, [[-1.0]]]), "position 1: expected"),
    (lambda: readers.sglang_logprobs([None, [[3, -1.0, None]]]), "position 1: expected token ids"),
    (lambda: readers.sglang_logprobs([None, []], input_token_logprobs=[[None, 1, None]]),
     "the tokens' log-probabilities: expected a token a position"),
    (lambda: readers.tinker_prompt_logprobs([None, [(3, math.nan)]]), "position 1: expected log"),
    (lambda: readers.tinker_prompt_logprobs([None, []], prompt_logprobs=[None, math.nan]),
     "position 1: expected log-probabilities"),
    (lambda: readers.trl_server([[[-1.0, -2.0]]], [[[1]]]), "position 0 of sequence 0: expected"),
    (lambda: readers.trl_server([[[-1.0]]], [[[1], [2]]]), "sequence 0: expected"),
    (lambda: readers.trl_server([[[math.nan]]], [[[1]]]), "position 0 of sequence 0: expected log"),
    (lambda: readers.trl_server([[[-1.0]]], [[[1.5]]]), "position 0 of sequence 0: expected token"),
    (lambda: readers.trl_server(torch.tensor([[[-1.0], [math.nan]]]), torch.ones(1, 2, 1).long()),
     r"row \[0, 1\], entry 0: expected ids .* and log-prob"),
    (lambda: readers.trl_server([[[-1.0]]], [[[1]]], [[[-1.0], [-2.0]]]), "actual_logprobs"),
    (lambda: readers.axolotl([[{"logprob": -1.0}]]), "row 0: expected tokens written as"),
    (lambda: readers.axolotl([[5]]), "row 0: expected tokens written as"),
    (lambda: readers.axolotl([[{"token": "token_id:1"}]]), "row 0: expected a log-probability"),
    (lambda: readers.axolotl([[{"token": "token_id:1", "logprob": math.nan}]]), "row 0: expected"),
    (lambda: readers.nemo_rl(torch.full((1, 1, 2), math.nan), torch.ones(1, 1, 2).long()),
     r"row \[0, 0\], entry 0: expected ids .* and logits"),
    (lambda: readers.verl(torch.full((1, 1, 2), 0.5), torch.ones(1, 1, 2).long()),
     r"row \[0, 0\], entry 0: expected ids .* and log-prob"),
    (lambda: readers.verl(torch.full((1, 1, 2), -0.5), torch.full((1, 1, 2), -7)),
     r"row \[0, 0\], entry 0: expected ids of at least 0"),
    (lambda: readers.distillkit([[1, 2], [3]], [[-1.0, -2.0], [-1.0, -2.0]]),
     "position 1 of sequence 0: expected"),
    (lambda: readers.trl_server([], []), "the batch: expected at least one sequence"),
    (lambda: readers.trl_server("text", [[[1]]]), "the batch: expected"),
])  # fmt: skip
def test_hostile_input_is_refused_with_its_place(read, words):
    with pytest.raises(ValueError, match=words):
        read()


# --- every entry comes through, in its row ---

position = st.dictionaries(st.integers(0, 99), st.floats(-30, -0.5, width=32), max_size=5)
positions = st.lists(position, min_size=1, max_size=6)
FORMATS = {
    "vllm": lambda rows: readers.vllm_prompt_logprobs([None, *rows]),
    "vllm JSON": lambda rows: readers.vllm_prompt_logprobs(
        [None, *({str(i): {"logprob": x} for i, x in row.items()} for row in rows)]
    ),
    "sglang": lambda rows: readers.sglang_logprobs(
        [None, *([[x, i, None] for i, x in row.items()] for row in rows)]
    ),
    "tinker": lambda rows: readers.tinker_prompt_logprobs(
        [None, *(list(row.items()) for row in rows)]
    ),
    "trl": lambda rows: readers.trl_server(
        [[list(row.values()) for row in rows]], [[list(row) for row in rows]]
    ),
    "axolotl": lambda rows: readers.axolotl(
        [[{"token": f"token_id:{i}", "logprob": x} for i, x in row.items()] for row in rows]
    ),
    "verl": lambda rows: readers.verl(*padded(rows, 0, 0.0)),
    "nemo_rl": lambda rows: readers.nemo_rl(*padded(rows, 0, -INF)),
    "distillkit": lambda rows: readers.distillkit(
        [list(row) for row in rows], [list(row.values()) for row in rows]
    ),
}


def padded(rows, id_, value):
    """(log-probabilities, ids) [1, T, K], the shorter rows filled up."""
    K = max(2, *(len(row) for row in rows)) + 1
    ids = [[*row, *[id_] * (K - len(row))] for row in rows]
    values = [[*row.values(), *[value] * (K - len(row))] for row in rows]
    return torch.tensor([values]), torch.tensor([ids])


@pytest.mark.parametrize("name", FORMATS)
@given_that(rows=positions)
@settings(max_examples=40, deadline=None)
def test_every_entry_comes_through(name, rows):
    if name == "verl":  # whose pads fill whole rows
        rows = [row if sum(map(math.exp, row.values())) > 0.01 else {} for row in rows]
    teacher = FORMATS[name](rows)
    ids, log_probs = teacher.ids, teacher.log_probs
    assert ids.dtype == torch.int64 and log_probs.dtype == torch.float32
    assert torch.equal(ids < 0, log_probs == -INF)
    ids, log_probs = ids.reshape(-1, ids.shape[-1]), log_probs.reshape(-1, ids.shape[-1])
    found = [
        {i: x for i, x in zip(*row, strict=True) if i >= 0}
        for row in zip(ids.tolist(), log_probs.tolist(), strict=True)
    ]
    assert found[: len(rows)] == rows and not any(found[len(rows) :])


# --- the rows are those of the student's logits ---

T, V, PROMPT = 6, 8, 2


def by_position(log_p):
    """{id: log-probability} of every token but the first."""
    return [None, *(dict(enumerate(row)) for row in log_p[:-1].tolist())]


def dicts(rows):
    return [[{"token": f"token_id:{i}", "logprob": x} for i, x in row.items()] for row in rows]


ids_of = torch.arange(V).expand(T - 1, V)
WHOLE = {
    "vllm": lambda p: readers.vllm_prompt_logprobs(by_position(p)),
    "sglang": lambda p: readers.sglang_logprobs(
        [x and [[v, i, None] for i, v in x.items()] for x in by_position(p)]
    ),
    "tinker": lambda p: readers.tinker_prompt_logprobs(
        [x and list(x.items()) for x in by_position(p)]
    ),
    "axolotl": lambda p: readers.axolotl(dicts(by_position(p)[PROMPT:]), length=T),
    "verl": lambda p: readers.verl(
        torch.cat([p[:-1], torch.zeros(1, V)]), torch.cat([ids_of, torch.zeros(1, V).long()])
    ),
    "nemo_rl": lambda p: readers.nemo_rl(p + 3.0, torch.arange(V).expand(T, V)),
    "distillkit": lambda p: readers.distillkit(ids_of.tolist(), p[:-1].tolist()),
}


@pytest.mark.parametrize("name", WHOLE)
def test_with_every_column_the_loss_is_that_of_the_whole_teacher(name):
    """K = V leaves nothing out, so that a row in another's place would show."""
    log_p = torch.randn(1, T, V).log_softmax(-1)
    student, tokens = torch.randn(1, T, V), torch.randint(V, (1, T))
    tokens[:, :PROMPT] = -100
    teacher = WHOLE[name](log_p[0])
    loss = reverse_kl(student[0], teacher, reduction="none")
    right = reverse_kl(student[0], log_p[0], reduction="none")
    torch.testing.assert_close(loss[PROMPT - 1 : -1], right[PROMPT - 1 : -1])
    batch = SparseTeacher(
        teacher.ids[None], teacher.log_probs[None], teacher.tail, teacher.normalised
    )
    torch.testing.assert_close(
        reverse_kl(student, batch, tokens, shift=True),
        reverse_kl(student, log_p, tokens, shift=True),
    )


def test_rows_of_completions():
    """TRL's server and axolotl's lists, without a length: those of the completion's tokens."""
    log_p, student = torch.randn(T, V).log_softmax(-1), torch.randn(T, V)
    rows = by_position(log_p)[PROMPT:]
    right = reverse_kl(student, log_p, reduction="none")[PROMPT - 1 : -1]
    trl = readers.trl_server([[list(x.values()) for x in rows]], [[list(x) for x in rows]])
    of_completion = student[PROMPT - 1 : -1]
    loss = reverse_kl(of_completion[None], trl, reduction="none")
    torch.testing.assert_close(loss[0], right)
    loss = reverse_kl(of_completion, readers.axolotl(dicts(rows)), reduction="none")
    torch.testing.assert_close(loss, right)
