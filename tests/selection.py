"""What `make test` leaves out, for its time, and `make test-all` asks too: combinations whose parts
are all asked somewhere. A case takes one of the choices, the next case another.
"""

import os

ALL = os.environ.get("DRKL_TESTS") == "all"


def taken(choice, choices, turn):
    return ALL or choice == choices[turn % len(choices)]
