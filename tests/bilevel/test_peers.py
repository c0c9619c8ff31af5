"""Examples from the documentation of peers, restated: the same data, the same optimum.

After jaxopt's `examples/implicit_diff/ridge_reg_implicit_diff.py` and `lasso_implicit_diff.py`: the
penalty of a regression on scikit-learn's diabetes data, learned on a held-out third through the
implicit function theorem. (The former's Boston data are no longer distributed.) The reference is
scikit-learn's own solver for the inner problem and SciPy's scalar search for the outer one, which
share nothing with this package.
"""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from scipy import optimize
from sklearn import datasets, linear_model, model_selection, preprocessing

import bilevel
from bilevel.estimators import FixedPoint, Implicit
from bilevel.linear import GMRES, ConjugateGradient


def diabetes():
    inputs, targets = datasets.load_diabetes(return_X_y=True)
    return model_selection.train_test_split(
        preprocessing.normalize(inputs), targets, test_size=0.33, random_state=0
    )


DATA = diabetes()
X_TRAIN, X_HELD_OUT, Y_TRAIN, Y_HELD_OUT = map(torch.as_tensor, DATA)
CURVATURE = float(torch.linalg.eigvalsh(X_TRAIN.T @ X_TRAIN / len(Y_TRAIN))[-1])


class Regression(bilevel.Problem):
    """½·mean squared error on the training part; mean squared error on the held-out part."""

    def init(self, outer, *, generator):
        return torch.zeros(X_TRAIN.shape[1], dtype=torch.float64)

    def inner_batch(self, outer, step, *, generator):
        return None

    def inner_loss(self, params, batch):
        return 0.5 * ((X_TRAIN @ params - Y_TRAIN) ** 2).mean()

    def outer_loss(self, params, outer, batch):
        return ((X_HELD_OUT @ params - Y_HELD_OUT) ** 2).mean()


class Ridge(Regression):
    def inner_batch(self, outer, step, *, generator):
        return outer.exp()

    def inner_loss(self, params, batch):
        return super().inner_loss(params, batch) + 0.5 * batch * (params**2).sum()


class Lasso(Regression):
    """The penalty is no part of the loss: it is in the step."""

    def hyperparameters(self, outer, step):
        return {"penalty": outer.exp()}


class ProximalGradient(NamedTuple):
    """θ ← shrink(θ − lr·g, lr·penalty), which is not a gradient step of anything."""

    penalty: torch.Tensor
    lr: float = 1 / CURVATURE

    def init(self, params):
        return ()

    def update(self, updates, state, *, params=None, inplace=False):
        moved = params - self.lr * updates
        shrunk = torch.sign(moved) * torch.relu(moved.abs() - self.lr * self.penalty)
        return shrunk - params, state


def fitted_ridge(log_penalty):
    penalty = len(Y_TRAIN) * np.exp(log_penalty)
    return linear_model.Ridge(penalty, fit_intercept=False).fit(DATA[0], DATA[2])


def fitted_lasso(log_penalty):
    penalty = np.exp(log_penalty)
    made = linear_model.Lasso(penalty, fit_intercept=False, tol=1e-14, max_iter=100_000)
    return made.fit(DATA[0], DATA[2])


EXAMPLES = {
    "ridge": (
        Ridge(),
        bilevel.optim.sgd(1 / (CURVATURE + 0.01), momentum=0.5),
        Implicit(ConjugateGradient(tolerance=1e-12)),
        fitted_ridge,
        (-3.6, -2.0),
        80,
    ),
    "lasso": (
        Lasso(),
        lambda penalty: ProximalGradient(penalty),
        FixedPoint(GMRES(tolerance=1e-12)),
        fitted_lasso,
        (0.3, 1.8),
        300,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_the_learned_penalty_is_the_one_that_a_search_finds(name):
    problem, optimizer, estimator, fitted, bracket, steps = EXAMPLES[name]
    hypergradient = bilevel.Hypergradient(problem, optimizer, steps, None, estimator)

    def reference(log_penalty):
        prediction = fitted(log_penalty).predict(DATA[1])
        return float(((prediction - DATA[3]) ** 2).mean())

    def run(log_penalty):
        return hypergradient(torch.tensor(log_penalty, dtype=torch.float64))

    middle = sum(bracket) / 2
    result = run(middle)
    assert np.allclose(result.params, fitted(middle).coef_, rtol=1e-6)
    assert float(result.loss) == pytest.approx(reference(middle), rel=1e-8)
    slope = (reference(middle + 1e-4) - reference(middle - 1e-4)) / 2e-4
    assert float(result.grads) == pytest.approx(slope, rel=1e-5)

    learned = optimize.brentq(lambda value: float(run(value).grads), *bracket, xtol=1e-3)
    searched = optimize.minimize_scalar(reference, bounds=bracket, options={"xatol": 1e-6})
    assert learned == pytest.approx(searched.x, abs=2e-3)
