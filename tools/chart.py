#!/usr/bin/env python3
"""Draws docs/benchmark.svg from docs/benchmark.json.

    python3 tools/chart.py [JSON [SVG]]

Needs matplotlib. The same numbers make the same file, byte by byte.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Tuple

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))

from tools.report import number, shown

DOCS = HERE / "docs"

COLOURS = {
    "ours": "#1f5fbf",
    "batch of one": "#8fb4ea",
    "asyncio": "#e0892b",
    "threads": "#b3486f",
    "pyftpdlib": "#8a6bbf",
    "nginx": "#3f9a6b",
    "limit": "#9aa3ad",
    "limit with fsync": "#c9cfd6",
}
"""Of every series that has bars; in this order they stand in the legend."""

NAMES = {
    "ours": "backup",
    "batch of one": "backup, batch of one",
    "limit": "bare sockets",
    "limit with fsync": "bare sockets, fsync",
}
"""What a series is called in the legend, if not by its own name."""

INK, PALE = "#24292f", "#6b737c"


class Bars(NamedTuple):
    """One group of bars."""

    label: str
    row: str
    series: Tuple[str, ...] = ()  # of the row; none: all that have a colour
    colour: str = ""  # of all bars, instead of each series' own


class Panel(NamedTuple):
    """One set of axes."""

    title: str
    unit: str
    groups: Tuple[Bars, ...]


def panels(scale: Dict[str, Any]) -> List[Panel]:
    """What is drawn, of a run on this scale."""
    size, names, idle = shown(scale["size"]), f"{scale['names']:,}", f"{scale['idle']:,}"
    return [
        _small(32, "Small requests on 32 connections"),
        _small(1, "Small requests on one connection"),
        Panel(
            "One large file",
            "MB per second; more is better",
            (
                Bars(f"BACKUP {size}\n(backup's durable)", "up"),
                Bars(f"BACKUP {size}\non tmpfs", "up-memory"),
                Bars(f"RETRIEVE {size}", "down"),
            ),
        ),
        Panel(
            "99 of 100 LISTs are answered within",
            "milliseconds; less is better",
            (
                _p99(f"while {size}\ngoes up durably", "beside-up", "p99"),
                _p99(f"while {names}\nnames are listed", "beside-list", "p99"),
                _p99(f"beside {idle}\nidle connections", "idle-list", "with"),
                _p99("and without\nthem", "idle-list", "without"),
            ),
        ),
    ]


def _small(connections: int, title: str) -> Panel:
    return Panel(
        title,
        "requests per second; more is better",
        (
            Bars("LIST", f"list-{connections}"),
            Bars("RETRIEVE\n1 KiB", f"retrieve-{connections}"),
            Bars("BACKUP 1 KiB\nwithout fsync", f"backup-{connections}"),
            Bars("BACKUP 1 KiB\ndurable", f"durable-{connections}"),
        ),
    )


def _p99(label: str, row: str, series: str) -> Bars:
    return Bars(label, row, (series,), COLOURS["ours"])


def draw(found: Dict[str, Any], path: Path) -> None:
    """Draws into ``path``. Raises ``ImportError`` where matplotlib is not installed."""
    import matplotlib
    from matplotlib.figure import Figure

    rows = {row["name"]: row for row in found["rows"]}
    style: Any = {
        "svg.hashsalt": "backup",  # or ids would be drawn anew each time
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "font.size": 9,
        "text.color": INK,
        "axes.labelcolor": PALE,
        "xtick.color": PALE,
        "ytick.color": INK,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(11, 9.5), facecolor="white")
        places = figure.subplots(2, 2).flatten()
        for axes, panel in zip(places, panels(found["scale"])):
            _draw_panel(axes, panel, rows)
        _legend(figure, rows)
        _words(figure, found, rows)
        figure.subplots_adjust(
            left=0.125, right=0.97, top=0.86, bottom=0.13, hspace=0.32, wspace=0.36
        )
        unsaid = {"Date": None, "Creator": None} if path.suffix == ".svg" else None
        figure.savefig(path, metadata=unsaid, dpi=110)


def _draw_panel(axes: Any, panel: Panel, rows: Dict[str, Any]) -> None:
    axes.set_title(panel.title, loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel(panel.unit)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(PALE)
    axes.tick_params(axis="y", length=0)
    place, ticks, labels, most = 0.0, [], [], 0.0
    for group in panel.groups:
        found = _series(group, rows)
        if not found:
            continue
        first = place
        for name, series in found.items():
            value, low, high = series["median"], min(series["rounds"]), max(series["rounds"])
            axes.barh(place, value, height=0.86, color=group.colour or COLOURS[name])
            axes.plot([low, high], [place, place], color=INK, linewidth=0.8, alpha=0.7)
            axes.annotate(
                number(value),
                (max(value, high), place),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
                fontweight="bold" if name == "ours" else "normal",
            )
            most = max(most, high)
            place += 1
        ticks.append((first + place - 1) / 2)
        labels.append(group.label)
        place += 0.8
    axes.set_yticks(ticks, labels)
    axes.set_ylim(max(place, 1) - 0.9, -0.9)
    axes.set_xlim(0, most * 1.14 or 1)
    axes.grid(axis="x", color="#e4e7eb", linewidth=0.8)
    axes.set_axisbelow(True)


def _series(group: Bars, rows: Dict[str, Any]) -> Dict[str, Any]:
    """The series that a group has bars of."""
    series: Dict[str, Any] = rows.get(group.row, {"series": {}})["series"]
    return {name: series[name] for name in group.series or COLOURS if name in series}


def _legend(figure: Any, rows: Dict[str, Any]) -> None:
    from matplotlib.patches import Patch

    drawn = {name for row in rows.values() for name in row["series"]}
    handles = [
        Patch(color=colour, label=NAMES.get(name, name))
        for name, colour in COLOURS.items()
        if name in drawn
    ]
    if handles:
        figure.legend(
            handles=handles,
            loc="upper left",
            bbox_to_anchor=(0.025, 0.945),
            ncols=len(handles),
            frameon=False,
            handlelength=1.1,
            columnspacing=1.3,
        )


def _words(figure: Any, found: Dict[str, Any], rows: Dict[str, Any]) -> None:
    """The title above, the memory and the machine below."""
    title = "backup beside other servers, on one machine"
    figure.text(0.03, 0.965, title, fontsize=14, fontweight="bold")
    lines = []
    for name in ("idle-memory", "memory"):
        if rows.get(name, {"series": {}})["series"]:
            series = next(iter(rows[name]["series"].values()))
            lines.append(f"{rows[name]['title']}: {number(series['median'])} {rows[name]['unit']}.")
    figure.text(0.03, 0.055, "  ".join(lines), fontsize=9)
    rounds = f"Medians of {found['scale']['rounds']} rounds, thin lines from least to most."
    where = ", ".join(f"{key} {value}" for key, value in found["machine"].items())
    figure.text(0.03, 0.018, f"{rounds} {found['date']},\n{where}", fontsize=7.5, color=PALE)


def main() -> None:
    """Draws what the command line names."""
    given = [Path(argument) for argument in sys.argv[1:]]
    source, target = [*given, *[DOCS / "benchmark.json", DOCS / "benchmark.svg"][len(given) :]]
    draw(json.loads(source.read_text(encoding="utf-8")), target)


if __name__ == "__main__":
    main()
