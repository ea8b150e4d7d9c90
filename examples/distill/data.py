"""Real text that every Python brings along: the sources of its standard library.

Files, not passages, are split into training and held-out text: no held-out function has a
neighbour in training.
"""

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import cache
import tokenizers
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END = "<|endoftext|>"
SMALLEST_VOCAB = 256 + 1  # every byte, and END
HELD_OUT_PERCENT = 10
# Other people's packages, test suites, near-duplicates, and tables written by a program.
SKIPPED_FOLDERS = {
    "site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "lib2to3",
    "encodings", "pydoc_data", "__pycache__",
}  # fmt: skip


class InputError(Exception):
    """Something the user can put right; run.py prints it without a traceback."""


@dataclass
class Corpus:
    train: torch.Tensor  # token ids, files joined by END
    held_out: torch.Tensor
    train_files: list  # paths relative to the source folder
    held_out_files: list
    characters: dict  # {"train": n, "held_out": n}
    tokenizer: Tokenizer
    key: str

    @property
    def vocab(self):
        return self.tokenizer.get_vocab_size()


def path_hash(path):
    return int(hashlib.sha256(path.encode()).hexdigest(), 16)


def is_held_out(path):
    """The split: a function of the file's relative path alone."""
    return path_hash(path) % 100 < HELD_OUT_PERCENT


def find_sources(folder=None, max_mb=8.0):
    """[(relative path, text)] of the .py files below folder (default: the standard library).

    The order is that of the paths' hashes, so a cap on the size keeps a sample of the library and
    not its first letters.
    """
    folder = Path(folder or sysconfig.get_path("stdlib"))
    if not folder.is_dir():
        raise InputError(f"no such folder: {folder}; give one that holds .py files with --sources")
    paths = [path.relative_to(folder) for path in folder.rglob("*.py")]
    names = [p.as_posix() for p in paths if not SKIPPED_FOLDERS & set(p.parts[:-1])]
    names = [name for name in names if not name.split("/")[-1].startswith("_sysconfigdata")]
    sources, seen, size = [], set(), 0
    for name in sorted(names, key=path_hash):
        try:
            text = (folder / name).read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        if not text.strip() or text in seen:  # a copy could sit on both sides of the split
            continue
        if size + len(text) > max_mb * 1e6:
            break
        seen.add(text)
        size += len(text)
        sources.append((name, text))
    held_out = sum(is_held_out(name) for name, _ in sources)
    if not 0 < held_out < len(sources):
        raise InputError(
            f"need .py files for training and for holding out, found {len(sources) - held_out} and "
            f"{held_out} (at most {max_mb} MB) in {folder}; give another folder with --sources or "
            "raise --max-mb"
        )
    return sources


def train_tokenizer(texts, vocab):
    if vocab < SMALLEST_VOCAB:
        raise InputError(
            f"--vocab must be at least {SMALLEST_VOCAB} (256 bytes and the end-of-text token), "
            f"got {vocab}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer, texts):
    end = tokenizer.token_to_id(END)
    encoded = tokenizer.encode_batch(texts)
    return torch.tensor(
        [token for text in encoded for token in (*text.ids, end)], dtype=torch.int32
    )


def load_corpus(folder, cache_folder, vocab, max_mb):
    """Read, split and tokenise the sources. What is slow about it is kept in cache_folder."""
    sources = find_sources(folder, max_mb)
    train = [(name, text) for name, text in sources if not is_held_out(name)]
    held_out = [(name, text) for name, text in sources if is_held_out(name)]
    code = cache.source_digest([Path(__file__)])
    key = cache.digest(sources, vocab, code, tokenizers.__version__)
    path = Path(cache_folder) / f"data-{key}.pt"
    stored = cache.load(path)
    if stored is None:
        tokenizer = train_tokenizer([text for _, text in train], vocab)
        stored = {
            "tokenizer": tokenizer.to_str(),
            "train": encode(tokenizer, [text for _, text in train]),
            "held_out": encode(tokenizer, [text for _, text in held_out]),
        }
        cache.save(path, stored)
    return Corpus(
        train=stored["train"].long(),
        held_out=stored["held_out"].long(),
        train_files=[name for name, _ in train],
        held_out_files=[name for name, _ in held_out],
        characters={
            "train": sum(len(text) for _, text in train),
            "held_out": sum(len(text) for _, text in held_out),
        },
        tokenizer=Tokenizer.from_str(stored["tokenizer"]),
        key=key,
    )


def training_batch(tokens, batch, context, salt, step):
    """[batch, context] windows: a function of (salt, step), so a resumed run sees the same ones."""
    generator = torch.Generator().manual_seed(path_hash(f"{salt}/{step}") % 2**63)
    starts = torch.randint(len(tokens) - context + 1, (batch,), generator=generator)
    return tokens[starts[:, None] + torch.arange(context)]


def held_out_windows(tokens, count, context):
    """[<= count, context]: windows without overlap, spread evenly over the held-out text."""
    available = len(tokens) // context
    if available < 1:
        raise InputError(
            f"the held-out text has {len(tokens)} tokens, fewer than --context {context}"
        )
    chosen = torch.linspace(0, available - 1, min(count, available)).round().long()
    return tokens[: available * context].view(available, context)[chosen]
