"""What the referee's rows say: tables, and a part of `docs/estimators.md`."""

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import markdown

Row = dict[str, Any]

#: (processor seconds, evaluations, F) after some of the steps.
Curve = Sequence[tuple[float, int, float]]

#: Parts of the gap at the start.
LEVELS = (0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002)

#: What each problem is an example of.
KINDS = {
    "quadratic": "converged, 100 parameters, 20 outer scalars",
    "logistic": "converged, 30 parameters, 30 penalties",
    "cleaning-0.5": "converged, 640 parameters, 1000 weights",
    "cleaning-0.7": "the same, fewer right labels",
    "cleaning-0.9": "the same, hardly any",
    "cifar10": "converged, 1920 parameters, 2000 weights",
    "cifar10-network": "a run of 40 steps, 4848 parameters, 1000 weights",
}

PAGE = Path(__file__).parents[1] / "docs" / "estimators.md"
BEGIN, END = "<!-- The referee: written by benchmarks/referee.py -->", "<!-- The referee ends -->"


def crossings(curve: Curve, best: float, of: int = 0) -> dict[float, float | None]:
    """Seconds until each of `LEVELS`, straight in the logarithm of the gap; None: not so far.

    Args:
        curve: At the start and after some steps.
        best: The F that gaps are measured from.
        of: 1 for evaluations in place of seconds.
    """
    first = curve[0][2] - best
    gaps = [1.0 if first <= 0 else (point[2] - best) / first for point in curve]
    gaps = [max(gap, 1e-9) for gap in gaps]
    found: dict[float, float | None] = {}
    for level in LEVELS:
        after = next((k for k, gap in enumerate(gaps) if gap <= level), None)
        if not after:
            found[level] = None
            continue
        low, high = math.log(gaps[after]), math.log(gaps[after - 1])
        part = (high - math.log(level)) / (high - low)
        before, then = curve[after - 1][of], curve[after][of]
        found[level] = before + part * (then - before)
    return found


class Standings:
    """Who came how far on one problem.

    Args:
        rows: Of one problem.

    Attributes:
        methods: The names of all.
        ours: Of this library's.
        jax: Of JAX's.
        pytorch: Of the others, which are of PyTorch.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self.methods = list(dict.fromkeys(row["method"] for row in rows))
        self.ours = {row["method"] for row in rows if row["ours"]}
        self.jax = {name for name in self.methods if name.startswith("jax")}
        self.pytorch = set(self.methods) - self.ours - self.jax
        least: dict[int, float] = {}
        runs = [row for row in rows if "curve" in row]
        for row in runs:
            lowest = min(point[2] for point in row["curve"])
            least[row["start"]] = min(lowest, least.get(row["start"], math.inf))
        self._runs = {
            name: [
                crossings(row["curve"], least[row["start"]])
                for row in runs
                if row["method"] == name
            ]
            for name in self.methods
        }

    def seconds(self, method: str, level: float) -> list[float]:
        """Until the gap was at this level, from every start; empty if one did not come so far."""
        found = [run[level] for run in self._runs[method]]
        return [] if None in found else found  # type: ignore[return-value]

    def order(self, level: float) -> list[str]:
        """The methods that came so far from every start, by the median of their seconds."""
        there = [name for name in self.methods if self.seconds(name, level)]
        return sorted(there, key=lambda name: statistics.median(self.seconds(name, level)))

    def level(self) -> float:
        """99 % of the way where this library went it, otherwise 90 %."""
        return 0.01 if self.first(self.ours, 0.01) else 0.1

    def first(self, names: set[str], level: float) -> str | None:
        """The first of these, if any came there."""
        return next((name for name in self.order(level) if name in names), None)

    def beside(self, others: set[str]) -> str:
        """This library's first beside the first of others; "within the spread" if its least is not
        above their most."""
        level = self.level()
        here, there = self.first(self.ours, level), self.first(others, level)
        if here is None or there is None:
            return "neither is there" if here is there else "not there" if there else "alone there"
        mine, theirs = self.seconds(here, level), self.seconds(there, level)
        ratio = statistics.median(mine) / statistics.median(theirs)
        if ratio <= 1:
            return f"first: {_digits(ratio)} of the time"
        return (
            "within the spread" if min(mine) <= max(theirs) else f"{_digits(ratio)} times as long"
        )

    def shown(self, method: str, level: float) -> str:
        """Median of the seconds, with the least and the most."""
        found = self.seconds(method, level)
        return f"{_digits(statistics.median(found))} ({_digits(min(found))}–{_digits(max(found))})"


def _digits(value: float) -> str:
    return f"{value:.1f}" if value >= 10 else f"{value:.2g}"


def by_problem(rows: Sequence[Row]) -> dict[str, Standings]:
    """In the order of `KINDS`."""
    return {
        name: Standings(found)
        for name in KINDS
        if (found := [row for row in rows if row["problem"] == name])
    }


def first_table(rows: Sequence[Row]) -> str:
    """Who is first on each problem: here, elsewhere in PyTorch, and in JAX."""
    lines = []
    for name, found in by_problem(rows).items():
        level = found.level()
        line = {"problem": name, "what it is": KINDS[name], "of the way": f"{1 - level:.0%}"}
        groups = {"here": found.ours, "in PyTorch": found.pytorch, "in JAX": found.jax}
        for group, names in groups.items():
            first = found.first(names, level)
            line[f"first {group}"] = first or "–"
            if first is not None:
                line[f"first {group}"] += f": {found.shown(first, level)}"
        line["beside PyTorch"] = found.beside(found.pytorch)
        line["beside JAX"] = found.beside(found.jax)
        lines.append(line)
    return markdown(lines)


def which_table(rows: Sequence[Row]) -> str:
    """This library's eager methods on each problem: how far they came, the fastest first."""
    lines = []
    for name, found in by_problem(rows).items():
        eager = {x for x in found.ours if not x.endswith(", compiled")}
        line = {"problem": name}
        left = [x for x in found.methods if x in eager]
        for level in (0.01, 0.1):
            there = [x for x in found.order(level) if x in left]
            seconds = [statistics.median(found.seconds(x, level)) for x in there]
            line[f"{1 - level:.0%} of the way, in seconds"] = "; ".join(
                f"{x} {_digits(each)}" for x, each in zip(there, seconds, strict=True)
            )
            left = [x for x in left if x not in there]
        line["less"] = "; ".join(left)
        lines.append({key: value or "–" for key, value in line.items()})
    return markdown(lines)


def tables(rows: Sequence[Row]) -> str:
    """Median seconds to 90 % and 99 % of the way, a line a method and a column a problem."""
    problems = by_problem(rows)
    methods = list(dict.fromkeys(row["method"] for row in rows))

    def cell(found: Standings, method: str) -> str:
        if method not in found.methods:
            return ""
        both = [found.seconds(method, level) for level in (0.1, 0.01)]
        if not any(both):
            return "–"
        return " / ".join(_digits(statistics.median(each)) if each else "–" for each in both)

    lines = [
        {"method": method} | {name: cell(found, method) for name, found in problems.items()}
        for method in methods
    ]
    return f"{markdown(lines)}\n\n{first_table(rows)}\n\n{which_table(rows)}\n"


def section(rows: Sequence[Row]) -> str:
    """What the page says of the rows."""
    return "\n".join([BEGIN, "", first_table(rows), "", which_table(rows), "", END])


def write_docs(result: Path, page: Path = PAGE) -> None:
    """Replace what stands between the two marks of the page.

    Raises:
        ValueError: The page does not have them.
    """
    text = page.read_text()
    before, begun, rest = text.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not begun or not ended:
        raise ValueError(f"{page.name} has no lines {BEGIN!r} and {END!r}")
    page.write_text(before + section(json.loads(result.read_text())["rows"]) + after)
