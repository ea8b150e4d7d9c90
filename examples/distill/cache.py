"""Files that let an interrupted run go on: named by what made them, written whole or not at all."""

import hashlib
import json
import os
from pathlib import Path

import torch


def digest(*parts):
    """16 hex digits that change when any part does. Parts: anything json can write."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def source_digest(files):
    """Digest of source files: a change of the code retires what the old code made."""
    return digest([[p.name, hashlib.sha256(p.read_bytes()).hexdigest()] for p in sorted(files)])


def save(path, value):
    temporary = Path(path).with_suffix(f".{os.getpid()}.tmp")
    torch.save(value, temporary)
    os.replace(temporary, path)  # atomic: a reader sees the old file or the new one


def load(path):
    """What save() wrote, on the CPU, or None if there is no such file."""
    if not Path(path).exists():
        return None
    return torch.load(path, map_location="cpu", weights_only=True)
