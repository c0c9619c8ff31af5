"""Problems from other libraries' documentation, solved again and compared with solvers that share
nothing with this one: scikit-learn for the inner optimum, SciPy for the outer one."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize, minimize_scalar
from sklearn.datasets import load_diabetes
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import normalize
from torch.nn.functional import binary_cross_entropy_with_logits

import bilevel
from bilevel.estimators import Adjoint, Implicit
from bilevel.linear import ConjugateGradient


class Penalised(bilevel.Problem):
    """mean loss(Xw, y) + ½ Σ_i e^{φ_i} w_i², judged by the loss without the penalty."""

    def __init__(self, x, y, loss):
        self.x, self.y, self.loss = x, y, loss

    def init(self, outer, *, generator):
        return torch.zeros(self.x.shape[1], dtype=torch.float64)

    def inner_batch(self, outer, step, *, generator):
        return outer.exp()

    def inner_loss(self, params, batch):
        return self.loss(self.x @ params, self.y) + 0.5 * (batch * params**2).sum()

    def outer_loss(self, params, outer, batch):
        x, y = batch
        return self.loss(x @ params, y)


def solve(hypergradient, start, batch):
    """(φ*, F(φ*)) by SciPy's L-BFGS-B on hypergradients, within bounds that keep SGD stable."""

    def value_and_gradient(point):
        result = hypergradient(torch.tensor(point), batch)
        return float(result.loss), result.grads.numpy()

    options = {"ftol": 1e-14, "gtol": 1e-8}
    found = minimize(
        value_and_gradient, start, jac=True, bounds=[(-8, 1)] * len(start), options=options
    )
    return found.x, found.fun


def tensors(*arrays):
    return tuple(torch.tensor(array, dtype=torch.float64) for array in arrays)


@pytest.mark.parametrize(
    "estimator",
    [Implicit(ConjugateGradient(tolerance=1e-12)), Adjoint()],
    ids=["implicit", "adjoint"],
)
def test_ridge_penalty_of_jaxopts_documentation(estimator):
    """One log penalty of a ridge regression on normalised rows, judged on a third held out.

    Their Boston houses are no longer distributed; the diabetes data stand in. Their inner loss has
    ½ mean(residual²): half the least squares that is judged.
    """
    x, y = load_diabetes(return_X_y=True)
    y = (y - y.mean()) / y.std()
    x, x_held_out, y, y_held_out = train_test_split(normalize(x), y, test_size=0.33, random_state=0)

    def held_out_loss(log_penalty):
        ridge = Ridge(alpha=len(y) * np.exp(log_penalty), fit_intercept=False, solver="cholesky")
        return np.mean((ridge.fit(x, y).predict(x_held_out) - y_held_out) ** 2)

    expected = minimize_scalar(held_out_loss, bounds=(-8, 1), method="bounded")
    assert -7 < expected.x < 0

    problem = Penalised(
        *tensors(x, y), lambda scores, targets: ((scores - targets) ** 2).mean() / 2
    )
    steps = bilevel.optim.sgd(0.8, momentum=0.7)
    hypergradient = bilevel.Hypergradient(problem, steps, 100, estimator=estimator)
    found, loss = solve(hypergradient, np.ones(1), tensors(x_held_out, y_held_out))
    assert found[0] == pytest.approx(expected.x, abs=1e-3)
    assert 2 * loss == pytest.approx(expected.fun, rel=1e-7)


@pytest.mark.slow
def test_weight_decays_of_hypertorchs_and_bettys_documentation():
    """A log penalty for each weight of a logistic regression on twenty Gaussian features.

    scikit-learn has one penalty for all weights, so feature i is divided by √(its penalty). SciPy
    minimises with differences of the held-out loss in place of hypergradients.
    """
    random = np.random.default_rng(0)
    weight = random.normal(size=20)
    x = random.normal(size=(200, 20))
    y = (x @ weight + 2 * random.normal(size=200) > 0).astype(float)
    x, x_held_out, y, y_held_out = train_test_split(x, y, test_size=0.5, random_state=0)

    # Without a bound some penalties go to infinity, where no two solvers stop alike.
    strength = 1e-2

    def held_out_loss(log_penalties):
        scale = np.exp(-log_penalties / 2)
        inner = LogisticRegression(C=1 / len(y), fit_intercept=False, tol=1e-10, max_iter=1000)
        scores = (x_held_out * scale) @ inner.fit(x * scale, y).coef_[0]
        fit = np.mean(np.logaddexp(0, scores) - y_held_out * scores)
        return fit + strength * np.mean((log_penalties + 2) ** 2)

    expected = minimize(held_out_loss, np.full(20, -2.0), method="L-BFGS-B")

    class Bounded(Penalised):
        def outer_loss(self, params, outer, batch):
            return super().outer_loss(params, outer, batch) + strength * ((outer + 2) ** 2).mean()

    problem = Bounded(*tensors(x, y), binary_cross_entropy_with_logits)
    hypergradient = bilevel.Hypergradient(
        problem,
        bilevel.optim.sgd(1.0, momentum=0.7),
        100,
        estimator=Implicit(ConjugateGradient(tolerance=1e-10)),
    )
    found, loss = solve(hypergradient, np.full(20, -2.0), tensors(x_held_out, y_held_out))
    assert loss == pytest.approx(expected.fun, abs=1e-5)
    assert loss < held_out_loss(np.full(20, -2.0)) - 0.02
    np.testing.assert_allclose(found, expected.x, atol=0.05)
