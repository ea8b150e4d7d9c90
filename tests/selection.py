"""What `make test` leaves out, for its time, and `make test-all` asks too: combinations whose parts
are all asked somewhere. A case takes one of the choices, the next case another.
"""

import os

import losses
import pytest

ALL = os.environ.get("DRKL_TESTS") == "all"


def taken(choice, choices, turn):
    return ALL or choice == choices[turn % len(choices)]


def over_losses(choices):
    """(backend, choice, name, labelled) of every loss: tiled with each choice, interpreted with one
    in turn.
    """
    return [
        pytest.param(backend, choice, *case, id=f"{backend}-{choice}-{label}")
        for backend in ("tiled", "triton")
        for choice in choices
        for place, (case, label) in enumerate(zip(losses.CASES, losses.IDS, strict=True))
        if backend == "tiled" or taken(choice, choices, place)
    ]
