#!/usr/bin/env python3
"""Draws the two state tables of the package into docs/DESIGN.md, as Mermaid diagrams.

    python3 tools/diagram.py

A test fails when the drawing there is not the one this makes.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Dict, Iterator, List

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))

from backup.connection import PHASES, Phase
from backup.protocol import TRANSITIONS, Event, State

DESIGN = HERE / "docs" / "DESIGN.md"


def machine() -> Iterator[str]:
    """The receiving machine: an arrow for every way from one state to another."""
    yield "stateDiagram-v2"
    yield f"    [*] --> {State.HEADER.name}"
    for state, row in TRANSITIONS.items():
        arrows: Dict[State, List[Event]] = {}
        for event, target in row.items():
            arrows.setdefault(target, []).append(event)
        for target, events in arrows.items():
            yield f"    {state.name} --> {target.name}: {', '.join(e.value for e in events)}"
    for state in (State.DONE, State.CUT):
        yield f"    {state.name} --> [*]"


def life() -> Iterator[str]:
    """A connection's life."""
    yield "stateDiagram-v2"
    yield f"    [*] --> {Phase.CONNECTING.name}: client"
    yield f"    [*] --> {Phase.EXCHANGING.name}: server"
    for phase, targets in PHASES.items():
        for target in sorted(targets, key=list(Phase).index):
            yield f"    {phase.name} --> {target.name}"
    yield f"    {Phase.CLOSED.name} --> [*]"


DRAWINGS = {"TRANSITIONS": machine, "PHASES": life}


def redrawn(text: str) -> str:
    """The document with every drawing between its markers made anew."""
    for table, draw in DRAWINGS.items():
        begin, end = f"<!-- drawn from {table} -->\n", f"<!-- end of {table} -->"
        before, _, rest = text.partition(begin)
        _, found, after = rest.partition(end)
        if not found:
            raise SystemExit(f"{DESIGN.name} has no place for {table}: {begin.strip()} … {end}")
        drawing = "".join(f"{line}\n" for line in draw())
        text = f"{before}{begin}```mermaid\n{drawing}```\n{end}{after}"
    return text


if __name__ == "__main__":
    DESIGN.write_text(redrawn(DESIGN.read_text(encoding="utf-8")), encoding="utf-8")
