"""drkl_triton/teacher_cache.py: what is written comes back, an interrupted run goes on, and what
does not fit is refused.
"""

import json

import pytest
import torch

from drkl_triton import SparseTeacher

pytest.importorskip("safetensors")

from drkl_triton.teacher_cache import load_teacher, save_teacher, saved_keys  # noqa: E402

INF = float("inf")
quiet = dict(progress=False)


def teacher(T, K=3, **more):
    ids = torch.randint(0, 100, (T, K))
    return SparseTeacher(ids, -torch.rand(T, K) - 1, label_log_probs=-torch.rand(T), **more)


def same(x, y, dtype=torch.float32):
    assert torch.equal(x.ids.long(), y.ids) and x.ids.dtype == torch.int32
    assert torch.equal(x.log_probs, y.log_probs.to(dtype)) and x.log_probs.dtype == dtype
    assert torch.equal(x.label_log_probs, y.label_log_probs)
    assert (x.tail, x.normalised) == (y.tail, y.normalised)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip(tmp_path, dtype):
    documents = {f"doc{i}": teacher(4 + i, tail="uniform") for i in range(5)}
    assert save_teacher(tmp_path, documents.items(), dtype=dtype, shard_tokens=9, **quiet) == 5
    cache = load_teacher(tmp_path, kind="sparse", temperature=1.0)
    assert cache.keys == list(documents) and len(cache) == 5 and "doc3" in cache
    for key, right in documents.items():
        same(cache[key], right, dtype)
    assert len(list(tmp_path.glob("shard-*.safetensors"))) == 3
    assert not list(tmp_path.glob("*.tmp"))


def test_hidden_states_and_their_batches(tmp_path):
    documents = {"a": torch.randn(5, 8), "b": torch.randn(3, 8)}
    save_teacher(tmp_path, documents.items(), **quiet)
    cache = load_teacher(tmp_path, kind="hidden")
    batch = cache.batch(["b", "a"])
    assert batch.shape == (2, 5, 8)
    assert torch.equal(batch[0, :3], documents["b"]) and (batch[0, 3:] == 0).all()


def test_batches_of_unequal_documents(tmp_path):
    documents = {"a": teacher(5), "b": teacher(2)}
    save_teacher(tmp_path, documents.items(), **quiet)
    batch = load_teacher(tmp_path).batch(["a", "b"])
    assert batch.ids.shape == (2, 5, 3)
    assert (batch.ids[1, 2:] == -1).all() and (batch.log_probs[1, 2:] == -INF).all()
    assert torch.equal(batch.log_probs[1, :2], documents["b"].log_probs)


def test_an_interrupted_run_goes_on(tmp_path):
    documents = {f"doc{i}": teacher(10) for i in range(6)}
    computed = []

    def until(stop):
        done = saved_keys(tmp_path)
        for i, (key, value) in enumerate(documents.items()):
            if key in done:
                continue
            if i == stop:
                raise KeyboardInterrupt
            computed.append(key)
            yield key, value

    with pytest.raises(KeyboardInterrupt):
        save_teacher(tmp_path, until(3), shard_tokens=20, **quiet)
    assert saved_keys(tmp_path) == {"doc0", "doc1"}  # doc2's shard was not full
    # a shard that was written, and the manifest not
    (tmp_path / "shard-00001.safetensors").write_bytes(b"half")
    assert save_teacher(tmp_path, until(None), shard_tokens=20, **quiet) == 4
    assert computed == ["doc0", "doc1", "doc2", "doc2", "doc3", "doc4", "doc5"]
    cache = load_teacher(tmp_path)
    for key, right in documents.items():
        same(cache[key], right)
    assert save_teacher(tmp_path, documents.items(), **quiet) == 0


class Tokenizer:
    def __init__(self, *words):
        self.words = words

    def get_vocab(self):
        return {word: i for i, word in enumerate(self.words)}


def test_what_does_not_fit_is_refused(tmp_path):
    ours, other = Tokenizer("a", "b"), Tokenizer("b", "a")
    save_teacher(tmp_path, [("a", teacher(4))], tokenizer=ours, **quiet)
    load_teacher(tmp_path, tokenizer=Tokenizer("a", "b"))
    for wrong, words in (
        (dict(tokenizer=other), "tokenizer"),
        (dict(temperature=2.0), "temperature"),
        (dict(kind="hidden"), "kind"),
    ):
        with pytest.raises(ValueError, match=f"was written with {words}"):
            load_teacher(tmp_path, **wrong)
    for document, options, words in (
        (teacher(4, K=2), {}, "width is 2, the cache's 3"),
        (teacher(4), dict(dtype=torch.bfloat16), "dtype"),
        (teacher(4), dict(temperature=2.0), "temperature"),
        (teacher(4), dict(tokenizer=other), "tokenizer"),
        (teacher(4, tail="drop"), {}, "tail"),
        (torch.randn(4, 8), {}, "kind"),
    ):
        options = {"tokenizer": ours} | options
        with pytest.raises(ValueError, match=words):
            save_teacher(tmp_path, [("b", document)], **options, **quiet)
    assert saved_keys(tmp_path) == {"a"}
    with pytest.raises(ValueError, match="one sequence"):
        batch = SparseTeacher(torch.zeros(1, 4, 3).long(), torch.zeros(1, 4, 3))
        save_teacher(tmp_path, [("c", batch)], tokenizer=ours, **quiet)
    with pytest.raises(KeyError, match="no document 'z'"):
        load_teacher(tmp_path)["z"]


def test_what_came_before_an_error_is_kept(tmp_path):
    with pytest.raises(ValueError, match="width"):
        save_teacher(tmp_path, [("a", teacher(4)), ("b", teacher(4, K=2))], **quiet)
    assert saved_keys(tmp_path) == {"a"}


def test_damaged_caches(tmp_path):
    with pytest.raises(FileNotFoundError, match="save_teacher"):
        load_teacher(tmp_path)
    assert saved_keys(tmp_path) == set()
    save_teacher(tmp_path, [("a", teacher(4))], **quiet)
    shard = tmp_path / "shard-00000.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-5])
    with pytest.raises(ValueError, match="bytes, not"):
        load_teacher(tmp_path)
    shard.unlink()
    with pytest.raises(ValueError, match="is missing"):
        load_teacher(tmp_path)
    shard.write_bytes(b"x" * len(whole))
    cache = load_teacher(tmp_path)
    with pytest.raises(ValueError, match="cannot be read"):
        cache["a"]
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"format": 9}))
    with pytest.raises(ValueError, match="has format 9, this version reads 1"):
        load_teacher(tmp_path)


def test_no_documents(tmp_path):
    assert save_teacher(tmp_path, [], **quiet) == 0
    with pytest.raises(FileNotFoundError):
        load_teacher(tmp_path)
