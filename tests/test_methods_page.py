"""What the page about other libraries' methods claims to be here is here, and so are its tests."""

import ast
import re
from pathlib import Path

import problems
import pytest
import torch
from problems import relative_error, seeded

import bilevel

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "methods.md").read_text()
CODE = re.compile(r"`([^`]+)`")
NONE = "–"


def rows() -> dict[str, tuple[str, str]]:
    """(what is here, the last column) by library and name."""
    found: dict[str, tuple[str, str]] = {}
    for section in PAGE.split("\n## ")[1:]:
        library, *lines = section.splitlines()
        for line in lines:
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            if line.startswith("|") and cells[0] != "there" and not set(line) <= set("|- "):
                assert len(cells) == 4, line
                assert all(cells), f"an empty cell: {line}"
                found[f"{library}: {cells[0]}"] = cells[2], cells[3]
    return found


ROWS = rows()
HERE = {name: row for name, row in ROWS.items() if row[0] != NONE}


@pytest.mark.parametrize("name", HERE)
def test_what_is_claimed_can_be_made(name):
    codes = CODE.findall(HERE[name][0])
    assert codes
    for code in codes:
        assert eval(code, {**vars(bilevel), "torch": torch}) is not None


@pytest.mark.parametrize("name", HERE)
def test_its_test_exists(name):
    references = CODE.findall(HERE[name][1])
    assert references
    for reference in references:
        path, function = reference.split("::")
        tree = ast.parse((ROOT / path).read_text())
        assert function in {x.name for x in ast.walk(tree) if isinstance(x, ast.FunctionDef)}


@pytest.mark.parametrize("name", sorted(set(ROWS) - set(HERE)))
def test_what_is_not_here_has_a_reason(name):
    reason = ROWS[name][1]
    assert len(reason.split()) > 3
    assert "::" not in reason
    for code in CODE.findall(reason):
        if code.startswith("estimators."):
            assert eval(code, dict(vars(bilevel))) is not None


def test_every_operation_of_boat_is_on_the_page():
    known = "NGD GDA DI DM RAD RGT PTT FD CG NS IGA IAD FOA VSO VFO MESO PGDO ALTO GAFFO"
    names = [x for row in ROWS if row.startswith("BOAT: ") for x in row[6:].split(", ")]
    assert " ".join(names) == known


def test_every_estimator_and_solver_is_on_the_page():
    named = set(re.findall(r"(?:estimators|linear)\.(\w+)\(", PAGE))
    made = {
        name
        for package in (bilevel.estimators, bilevel.linear)
        for name in package.__all__
        if isinstance(getattr(package, name), type)
        and issubclass(getattr(package, name), bilevel.estimators.Estimator | bilevel.linear.Solver)
    }
    ours_alone = {"Estimator", "Solver", "LowRank", "RandomizedEigendecomposition"}
    assert made - named == ours_alone


def test_an_aggregated_inner_loss_is_differentiated_like_any_other():
    """Gradient descent on αF + (1 − α)ℓ with α falling from step to step, as BDA has it."""
    case = problems.make("quadratic", 0)
    problem = case.problem
    drive, loss = problem.inner_batch, problem.inner_loss

    def inner_batch(outer, step, *, generator):
        return drive(outer, step, generator=generator), torch.tensor(0.5).double() / (step + 1)

    def inner_loss(params, batch):
        b, alpha = batch
        outer_loss = 0.5 * ((params["theta"] - case.outer_batch) ** 2).sum()
        return alpha * outer_loss + (1 - alpha) * loss(params, b)

    problem.inner_batch, problem.inner_loss = inner_batch, inner_loss
    optimizer = bilevel.optim.sgd(0.1)
    expected = problems.brute_force(
        case, optimizer, bilevel.Key.draw(seeded(0)), bilevel.Window(0, 6)
    )
    result = bilevel.Hypergradient(problem, optimizer, 6)(case.outer, case.outer_batch, seeded(0))
    assert relative_error(result.grads, expected[1]) < 1e-12
