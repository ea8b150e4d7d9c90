"""Documents in windows of tokens, split by document into training, validation and test."""

from dataclasses import dataclass

import torch
from data import InputError, path_hash

PARTS = ("train", "validation", "test")


@dataclass(frozen=True)
class Window:
    key: str  # the document's name and the window's number
    document: str
    tokens: torch.Tensor  # [context] int64


def split(names, test, validation):
    """{part: names}: which document is held out depends on its name alone, and on how many are."""
    by_hash = sorted(names, key=path_hash)
    if len(by_hash) <= test + validation:
        raise InputError(
            f"{len(by_hash)} documents cannot be split into {test} for the test, {validation} for "
            "validation and one or more for training; ask for fewer"
        )
    held_out = test + validation
    parts = by_hash[held_out:], by_hash[test:held_out], by_hash[:test]
    return dict(zip(PARTS, map(sorted, parts), strict=True))


def windows(tokenizer, document, text, context, most=None):
    """Without overlap; with ``most`` so many, spread over the document."""
    ids = torch.tensor(tokenizer(text)["input_ids"])
    whole = ids[: len(ids) // context * context].view(-1, context)
    chosen = range(len(whole))
    if most is not None and most < len(whole):
        chosen = torch.linspace(0, len(whole) - 1, most).round().long().tolist()
    return [Window(f"{document}/{i}", document, whole[i]) for i in chosen]


def drawn(pool, count, salt):
    """``count`` of the windows, in an order that depends on the salt; again from the start where
    there are fewer.
    """
    order = []
    while len(order) < count:
        turn = f"{salt}/{len(order)}"
        order += sorted(pool, key=lambda window: path_hash(f"{turn}/{window.key}"))
    return order[:count]
