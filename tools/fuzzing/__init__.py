"""What ``tools/fuzz.py`` and ``tests/test_fuzz.py`` share: examples, and what must be true of them.

Nothing in here needs more than the standard library. An example is a plain value whose
``repr`` makes it again; ``TARGETS`` says how each kind is drawn and how it is checked.
"""

from __future__ import annotations

from typing import Any, Callable, Dict, NamedTuple

from . import machines, service
from .choices import Broken, Choices, Tally


class Target(NamedTuple):
    """One kind of examples. ``check`` raises ``Broken``, or whatever the product raises."""

    example: Callable[[Choices], Any]
    check: Callable[[Any, Tally], None]


TARGETS: Dict[str, Target] = {
    "requests": Target(machines.request_in_pieces, machines.check_request),
    "responses": Target(machines.response_in_pieces, machines.check_response),
    "listings": Target(machines.listing, machines.check_listing),
    "answers": Target(machines.believed, machines.check_answer),
    "server": Target(service.script, service.check),
}

__all__ = ["TARGETS", "Broken", "Choices", "Tally", "Target"]
