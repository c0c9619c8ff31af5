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
        ours: The names of this library's methods.
        methods: Those of all.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self.methods = list(dict.fromkeys(row["method"] for row in rows))
        self.ours = {row["method"] for row in rows if row["ours"]}
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
        """The last of 90 % and 99 % of the way that anybody went from every start."""
        return 0.01 if self.order(0.01) else 0.1

    def verdict(self) -> str:
        """Whether this library is first, or within the spread: its least not above their most."""
        level = self.level()
        here, there = self.first(ours=True), self.first(ours=False)
        if here is None or there is None:
            return "first" if there is None else "not there"
        mine, theirs = self.seconds(here, level), self.seconds(there, level)
        ratio = statistics.median(mine) / statistics.median(theirs)
        if ratio <= 1:
            return f"first, in {ratio:.2f} of the time"
        if min(mine) <= max(theirs):
            return "within the spread"
        return f"{ratio:.1f} times as long"

    def first(self, *, ours: bool) -> str | None:
        """The first of this library, or of the others."""
        found = [name for name in self.order(self.level()) if (name in self.ours) == ours]
        return found[0] if found else None

    def shown(self, method: str | None, level: float) -> str:
        """Median of the seconds, with the least and the most."""
        found = [] if method is None else self.seconds(method, level)
        if not found:
            return "–"
        return f"{_digits(statistics.median(found))} ({_digits(min(found))}–{_digits(max(found))})"


def _digits(seconds: float) -> str:
    return f"{seconds:.2f}" if seconds >= 0.1 else f"{seconds:.2g}"


def by_problem(rows: Sequence[Row]) -> dict[str, Standings]:
    """In the order of `KINDS`."""
    return {
        name: Standings(found)
        for name in KINDS
        if (found := [row for row in rows if row["problem"] == name])
    }


def first_table(rows: Sequence[Row]) -> str:
    """Who is first on each problem, here and elsewhere."""
    lines = []
    for name, found in by_problem(rows).items():
        here, there = found.first(ours=True), found.first(ours=False)
        lines.append(
            {
                "problem": name,
                "what it is": KINDS[name],
                "first here": here or "–",
                "seconds": found.shown(here, found.level()),
                "first elsewhere": there or "–",
                "seconds ": found.shown(there, found.level()),
                "this library is": found.verdict(),
            }
        )
    return markdown(lines)


def which_table(rows: Sequence[Row]) -> str:
    """This library's eager methods on each problem: the fastest, and those that go nowhere near."""
    lines = []
    for name, found in by_problem(rows).items():
        level = found.level()
        eager = [x for x in found.methods if x in found.ours and not x.endswith(", compiled")]
        there = [x for x in found.order(level) if x in eager]
        least = statistics.median(found.seconds(there[0], level)) if there else math.nan
        ratios = [statistics.median(found.seconds(x, level)) / least for x in there]
        right = [f"{x} {ratio:.1f}" for x, ratio in zip(there, ratios, strict=True)]
        near = [x for x in eager if x not in there and found.seconds(x, 0.1)]
        far = [x for x in eager if x not in there and x not in near]
        lines.append(
            {
                "problem": name,
                "99 % of the way, in times the fastest": "; ".join(right) or "–",
                "90 %, not 99 %": "; ".join(near) or "–",
                "less": "; ".join(far) or "–",
            }
        )
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
