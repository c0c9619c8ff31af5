"""A graph that is compiled gives what its function does, by other operations."""

import pytest
import torch
import torch.nn.functional as F

from bilevel.compiler import Compiler, inductor
from bilevel.compiler.rewriting import split
from bilevel.errors import CompileWarning

aten = torch.ops.aten


def counts(graph, operation):
    return len(graph.graph.find_nodes(op="call_function", target=operation))


def second_derivative(loss):
    """(loss, its gradient, a Hessian-vector product) of a function of scores."""

    def function(weights, inputs, direction):
        weights = weights.detach().requires_grad_()
        with torch.enable_grad():
            value = loss(F.linear(inputs, weights))
            (gradient,) = torch.autograd.grad(value, weights, create_graph=True)
            (product,) = torch.autograd.grad(gradient, weights, direction)
        return [value.detach(), gradient.detach(), product]

    return function


def tensors(points, classes, dtype):
    draw = torch.Generator().manual_seed(points)
    return [
        torch.randn(shape, generator=draw, dtype=dtype)
        for shape in [(classes, 5), (points, 5), (classes, 5)]
    ]


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"reduction": "sum"},
        {"weight": [0.5, 2.0, 1.0]},
        {"ignore_index": 1},
        {"ignore_index": 1, "weight": [0.5, 2.0, 1.0], "reduction": "sum"},
        {"label_smoothing": 0.1},
    ],
    ids=str,
)
# Of many points the scores are made as their transpose, of few they are not.
@pytest.mark.parametrize("points", [4, 40])
@pytest.mark.parametrize("masked", [False, True])
def test_cross_entropy_and_its_derivatives(points, arguments, masked):
    chosen = dict(arguments)
    if "weight" in chosen:
        chosen["weight"] = torch.tensor(chosen["weight"], dtype=torch.float64)
    labels = torch.arange(points) % 3
    if masked:
        labels[::3] = chosen.get("ignore_index", -100)
    function = second_derivative(lambda scores: F.cross_entropy(scores, labels, **chosen))
    given = tensors(points, 3, torch.float64)
    graph, constants = inductor.trace(function, given)
    torch.testing.assert_close(graph(*given, *constants), function(*given), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("points", [4, 40])
def test_weighted_losses_of_points(points):
    labels, each = torch.arange(points) % 3, torch.rand(points, dtype=torch.float64)
    function = second_derivative(
        lambda scores: (each * F.cross_entropy(scores, labels, reduction="none")).mean()
    )
    given = tensors(points, 3, torch.float64)
    graph, constants = inductor.trace(function, given)
    torch.testing.assert_close(graph(*given, *constants), function(*given), rtol=1e-13, atol=1e-13)


def square_of_log_softmax(dim):
    def function(scores):
        scores = scores.detach().requires_grad_()
        with torch.enable_grad():
            found = torch.log_softmax(scores, dim)
            (slope,) = torch.autograd.grad(found.square().sum(), scores)
        return [found.detach(), slope]

    return function


@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("transposed", [False, True])
def test_log_softmax_along_any_dimension(dim, transposed):
    scores = torch.randn(6, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scores = scores.t() if transposed else scores
    function = square_of_log_softmax(dim)
    graph, _ = inductor.trace(function, [scores])
    torch.testing.assert_close(graph(scores), function(scores), rtol=1e-13, atol=1e-13)
    cube = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    graph, _ = inductor.trace(function, [cube])
    torch.testing.assert_close(graph(cube), function(cube), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dim", [0, 1])
def test_log_softmax_of_16_bits_is_as_exact_as_eager(dim):
    scores = torch.randn(60, 70, generator=torch.Generator().manual_seed(0)).bfloat16()
    function = square_of_log_softmax(dim)
    graph, _ = inductor.trace(function, [scores])
    for traced, eager, exact in zip(
        graph(scores), function(scores), function(scores.double()), strict=True
    ):
        assert traced.dtype == torch.bfloat16
        assert (traced - exact).norm() <= 1.01 * (eager - exact).norm()


@pytest.mark.parametrize("points", [4, 40])
def test_exponentials_are_taken_once(points):
    labels = torch.arange(points) % 3
    function = second_derivative(lambda scores: F.cross_entropy(scores, labels))
    graph, _ = inductor.trace(function, tensors(points, 3, torch.float32))
    assert counts(graph, aten.exp.default) == 1
    assert counts(graph, aten.detach.default) == 0


def test_scores_that_are_far_apart_stay_finite():
    """The probabilities are a quotient of exponentials; none of them overflows, nor is 0 / 0."""
    labels = torch.tensor([0, 1, 2, 0])
    function = second_derivative(lambda scores: F.cross_entropy(scores, labels))
    given = [1e3 * x for x in tensors(4, 3, torch.float32)]
    graph, constants = inductor.trace(function, given)
    torch.testing.assert_close(graph(*given, *constants), function(*given))


def hessian_product(loss):
    """(θ, v) ↦ Hv."""

    def product(params, vector):
        params = params.detach().requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(loss(params), params, create_graph=True)
        return torch.autograd.grad(gradient, params, vector, materialize_grads=True)[0]

    return product


QUARTIC = torch.linspace(0.5, 2, 5, dtype=torch.float64)
LOSSES = {
    "a quartic": lambda params: (QUARTIC * params**4).sum() + params.prod(),
    # Its Hessian depends on nothing, so that there is nothing to save.
    "a quadratic": lambda params: 0.5 * (QUARTIC * params**2).sum(),
    # Views of what is saved, and of the argument.
    "products": lambda params: torch.tanh(params[:, None] @ params[None, :]).sum(),
    "a soft-maximum": lambda params: F.cross_entropy(
        params.expand(40, 5) * QUARTIC.outer(torch.ones(40, dtype=torch.float64)[:1]).t(),
        torch.arange(40) % 5,
    ),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_product_in_two_graphs_is_the_product(name, backend):
    function, compiler = hessian_product(LOSSES[name]), Compiler(backend)
    draw = torch.Generator().manual_seed(0)
    for _ in range(2):  # The second point uses the graphs of the first.
        params, *vectors = torch.randn(4, 5, generator=draw, dtype=torch.float64)
        product = compiler.linearised(function, params, vector=vectors[0])
        for vector in vectors:
            expected = function(params, vector)
            torch.testing.assert_close(product(vector), expected, rtol=1e-12, atol=1e-12)


def test_what_does_not_depend_on_the_vector_is_made_once():
    given = torch.randn(2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    graph, _ = inductor.trace(
        lambda *given: [hessian_product(LOSSES["products"])(*given)], list(given)
    )
    before, after = split(graph, 1)
    assert counts(before, aten.tanh.default) == 1
    assert counts(after, aten.tanh.default) == 0
    whole = len(graph.graph.nodes)
    assert len(before.graph.find_nodes(op="call_function", target=aten.mm.default)) > 0
    assert len(after.graph.nodes) < whole


def test_a_product_that_cannot_be_traced_is_refused_with_a_warning():
    def branching(params, vector):
        return params * vector if params.sum() > 0 else vector

    compiler = Compiler("eager")
    with pytest.warns(CompileWarning, match="is run in eager mode"):
        assert compiler.linearised(branching, torch.ones(2), vector=torch.ones(2)) is None
    assert compiler.refused == 1
