"""What `gradcheck` found."""

from dataclasses import dataclass
from typing import final

import torch

from bilevel.recording.trajectory import Window


@final
@dataclass(frozen=True)
class Comparison:
    """A derivative along one direction, by two ways.

    Attributes:
        direction: "random 1", …, or the name of an outer variable, in which the direction then is.
        derivative: By the hypergradient; None where it was refused.
        difference: By central differences of the outer loss.
        uncertainty: By how much differences over two distances differ.
        agrees: Whether they are the same, given that; None where differences do not agree with
            each other, or there is no derivative.
    """

    direction: str
    derivative: float | None
    difference: float
    uncertainty: float
    agrees: bool | None


@final
@dataclass(frozen=True)
class GradientCheck:
    """What `gradcheck` found. Printed, it is a table with a verdict.

    Attributes:
        comparisons: By direction.
        methods: By method of the problem, what calling it twice with the same arguments gave:
            "the same", or what else.
        refusal: Why there is nothing to compare, a sentence; empty if there is.
        remarks: Further sentences: what the estimator leaves out by design, in what dtype was
            checked and why, and the status of the hypergradient.
        estimator: The name of the estimator whose derivative was compared.
        window: The steps that were differentiated.
        dtype: What everything was computed in.
    """

    comparisons: list[Comparison]
    methods: dict[str, str]
    refusal: str
    remarks: list[str]
    estimator: str
    window: Window
    dtype: torch.dtype

    @property
    def passed(self) -> bool:
        """Whether nothing wrong was found."""
        return not (self.refusal or self._impure or self._wrong)

    @property
    def verdict(self) -> str:
        """What was found, in words."""
        if self.refusal:
            moving = [
                repr(each.direction)
                for each in self.comparisons
                if abs(each.difference) > 10 * each.uncertainty
                and not each.direction.startswith("random ")
            ]
            changes = f"; the outer loss changes with {', '.join(moving)}" if moving else ""
            return f"refused: {self.refusal}{changes}"
        if self._impure:
            return (
                f"not repeatable: {', '.join(self._impure)}, called again with the same arguments, "
                "gives something else, so a run cannot be made again and differences say nothing"
            )
        if self._wrong:
            return (
                f"wrong in {', '.join(map(repr, self._wrong))}: the hypergradient is not the "
                "derivative of the outer loss. Somewhere a value is taken out of its tensor "
                "(float, item, NumPy), is held back (detach, no_grad: right if it is meant), or "
                "has a wrong backward"
            )
        known = sum(bool(each.agrees) for each in self.comparisons)
        if not known:
            return "unclear: differences over several distances disagree, as they do at kinks"
        return (
            f"right: the hypergradient is what central differences give, along {known} of "
            f"{len(self.comparisons)} directions"
        )

    def __str__(self) -> str:
        width = max([9, *(len(each.direction) for each in self.comparisons)])
        dtype = str(self.dtype).removeprefix("torch.")
        rows = [
            f"steps [{self.window.start}, {self.window.stop}), {dtype}",
            f"{'direction':<{width}}{self.estimator:>18}{'differences':>18}{'±':>9}",
        ]
        for each in self.comparisons:
            derivative = "none" if each.derivative is None else f"{each.derivative:.9g}"
            judged = {True: "agrees", False: "DIFFERS", None: "unclear"}[each.agrees]
            judged = "" if each.derivative is None else judged
            rows.append(
                f"{each.direction:<{width}}{derivative:>18}{each.difference:>18.9g}"
                f"{each.uncertainty:>9.0e}  {judged}"
            )
        rows += [f"{name}, called twice: {found}" for name, found in self.methods.items()]
        return "\n".join([*rows, *self.remarks, self.verdict])

    @property
    def _impure(self) -> list[str]:
        return [name for name, found in self.methods.items() if found != "the same"]

    @property
    def _wrong(self) -> list[str]:
        """The directions; of outer variables, if one of those is wrong by itself."""
        wrong = [each.direction for each in self.comparisons if each.agrees is False]
        return [name for name in wrong if not name.startswith("random ")] or wrong
