"""Compiled steps give what eager steps give, or say that they do not and step aside."""

import gc
import warnings
import weakref

import optree
import problems
import pytest
import torch
from problems import relative_error, seeded
from torch.func import functional_call

import bilevel
from bilevel.compiler import Compiler
from bilevel.compiler.compiler import GRAPHS_PER_FUNCTION

WINDOW = problems.Fixed(2, 5)
OPTIMIZERS = {
    "sgd": bilevel.optim.sgd(0.1, momentum=0.9),
    "adam": bilevel.optim.adam(0.05, eps_root=1e-6),
}


def hypergradient(problem, optimizer, *, backend="eager", compile=True, **options):
    made = bilevel.Hypergradient(problem, optimizer, 6, WINDOW, compile=compile, **options)
    if compile:
        made.inner.compiler = Compiler(backend)
    return made


def both(case, optimizer, **options):
    """The results of one call, eager and with traced graphs run by PyTorch's own interpreter."""
    return [
        hypergradient(case.problem, optimizer, compile=compile, **options)(
            case.outer, case.outer_batch, seeded(1)
        )
        for compile in (False, True)
    ]


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [
        ("data_cleaning", "sgd"),
        ("learned_start", "adam"),
        ("learned_rate", "sgd"),
        pytest.param("quadratic", "adam", marks=pytest.mark.slow),
        pytest.param("ridge", "sgd", marks=pytest.mark.slow),
        pytest.param("convnet_distillation", "adam", marks=pytest.mark.slow),
    ],
)
def test_traced_steps_are_the_eager_ones(name, optimizer):
    case = problems.make(name, seed=0)
    chosen = OPTIMIZERS[optimizer]
    if name == "learned_rate":
        chosen = getattr(bilevel.optim, optimizer)
    eager, traced = both(case, chosen)
    assert relative_error(traced.grads, eager.grads) < 1e-10
    assert relative_error(traced.loss, eager.loss) < 1e-12
    torch.testing.assert_close(dict(traced.trace), dict(eager.trace))
    torch.testing.assert_close(traced.metrics, eager.metrics)


@pytest.mark.parametrize(
    "options",
    [
        {"keep_every": 2},
        {"estimator": bilevel.estimators.Reverse()},
        {"estimator": bilevel.estimators.LowRank(guard=None)},
    ],
)
def test_recomputed_steps_and_other_estimators(options):
    case = problems.make("mlp_distillation", seed=0)
    eager, traced = both(case, OPTIMIZERS["adam"], **options)
    assert relative_error(traced.grads, eager.grads) < 1e-10


def test_forward_mode_is_traced_too():
    case = problems.make("mlp_distillation", seed=0)
    estimator = bilevel.estimators.Adjoint(hvp="forward")
    eager, traced = both(case, OPTIMIZERS["sgd"], estimator=estimator)
    assert relative_error(traced.grads, eager.grads) < 1e-10


@pytest.mark.slow
def test_the_real_compiler_compiles_once():
    case = problems.make("mlp_distillation", seed=0)
    compiled = hypergradient(case.problem, OPTIMIZERS["sgd"], backend="inductor")
    eager = hypergradient(case.problem, OPTIMIZERS["sgd"], compile=False)
    for seed in (0, 1):
        expected = eager(case.outer, case.outer_batch, seeded(seed)).grads
        found = compiled(case.outer, case.outer_batch, seeded(seed)).grads
        assert relative_error(found, expected) < 1e-9
        if seed == 0:
            seconds = compiled.inner.compiler.seconds
            assert seconds > 0
    assert compiled.inner.compiler.seconds == seconds


class Labelled(bilevel.Problem):
    """Its labels are an attribute, so a constant of any graph traced through it."""

    def __init__(self, labels):
        self.network = torch.nn.Linear(3, 2, dtype=torch.float64)
        self.labels = labels

    def init(self, outer, *, generator):
        return bilevel.fresh_parameters(self.network, generator)

    def inner_batch(self, outer, step, *, generator):
        return outer

    def inner_loss(self, params, batch):
        one_hot = torch.eye(2, dtype=batch.dtype)[self.labels]
        return ((functional_call(self.network, params, (batch,)) - one_hot) ** 2).mean()

    def outer_loss(self, params, outer, batch):
        return (functional_call(self.network, params, (batch,)) ** 2).mean()


@pytest.mark.parametrize("in_place", [True, False])
def test_a_changed_constant_is_noticed(in_place):
    inputs = torch.randn(4, 3, dtype=torch.float64, generator=seeded(0))
    problem = Labelled(torch.tensor([0, 1, 0, 1]))
    compiled = hypergradient(problem, OPTIMIZERS["sgd"])
    eager = hypergradient(problem, OPTIMIZERS["sgd"], compile=False)
    before = compiled(inputs, inputs, seeded(0)).grads
    if in_place:
        problem.labels[0] = 1
    else:
        problem.labels = torch.tensor([1, 1, 0, 1])
    after = compiled(inputs, inputs, seeded(0)).grads
    assert relative_error(after, before) > 1e-3
    assert relative_error(after, eager(inputs, inputs, seeded(0)).grads) < 1e-10


def branching(x):
    return x * 2 if float(x.sum()) > 0 else x


def test_what_cannot_be_traced_is_run_eagerly():
    compiler = Compiler("eager")
    with pytest.warns(bilevel.CompileWarning, match="branching is run in eager mode: it could not"):
        assert compiler(branching, torch.ones(2)).tolist() == [2, 2]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compiler(branching, -torch.ones(2)).tolist() == [-1, -1]


def double(x):
    return {"double": 2 * x}


def test_a_wrong_compiler_is_found_out():
    def wrong(graph, example_inputs):
        return lambda *inputs: [output * 1.1 for output in graph(*inputs)]

    compiler = Compiler(wrong)
    assert compiler(double, torch.ones(3))["double"].tolist() == [2, 2, 2]
    with pytest.warns(bilevel.CompileWarning, match=r"differs .* relative 1\.0e-01 where at most"):
        found = compiler(double, torch.ones(3))
    assert found["double"].tolist() == [2, 2, 2]
    assert compiler(double, torch.ones(3))["double"].tolist() == [2, 2, 2]


def test_a_graph_that_differs_at_a_singular_step_alone_is_used():
    calls = []

    def wrong_at_first(graph, example_inputs):
        def call(*inputs):
            calls.append(inputs)
            return [output * (1.1 if len(calls) == 1 else 1.0) for output in graph(*inputs)]

        return call

    compiler = Compiler(wrong_at_first)
    for value in (1.0, 2.0, 3.0):
        assert compiler(double, torch.full((3,), value))["double"].tolist() == [2 * value] * 3
    assert compiler.refused == 0
    assert len(calls) == 4  # compared twice, and used from the second call on


def test_a_compiler_that_yields_nan_is_found_out():
    def wrong(graph, example_inputs):
        return lambda *inputs: [output * float("nan") for output in graph(*inputs)]

    compiler = Compiler(wrong)
    assert compiler(double, torch.ones(3))["double"].tolist() == [2, 2, 2]
    with pytest.warns(bilevel.CompileWarning, match="differs"):
        assert compiler(double, torch.ones(3))["double"].tolist() == [2, 2, 2]


def ill_conditioned(x):
    return (x - 1.0) / torch.finfo(x.dtype).eps


def test_rounding_is_allowed_for():
    """Where one unit in the last place changes the result by all of itself, so may a compiler."""

    def rounding(graph, example_inputs):
        return lambda *inputs: graph(*[x * (1 + torch.finfo(x.dtype).eps) for x in inputs])

    compiler = Compiler(rounding)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiler(ill_conditioned, torch.full((4,), 1.5, dtype=torch.float64))
        compiler(ill_conditioned, torch.full((4,), 1 + 1e-15, dtype=torch.float64))


def cancelling(x):
    """Σx, in a form that loses nearly all digits of float32."""
    return ((x + 1e6) - 1e6).sum()


def test_a_compiler_that_is_nearer_to_float64_than_eager_mode_is_right():
    def accurate(graph, example_inputs):
        return lambda *inputs: [output.float() for output in graph(*[x.double() for x in inputs])]

    x = torch.linspace(0.01, 0.02, 7)
    assert abs(float(cancelling(x)) - float(x.sum())) > 0.01
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = Compiler(accurate)(cancelling, x)
    assert float(found) == pytest.approx(float(x.sum()), rel=1e-6)


def test_a_new_shape_every_time_ends_in_eager_mode():
    compiler = Compiler("eager")
    for size in range(1, 1 + GRAPHS_PER_FUNCTION):
        compiler(double, torch.ones(size))
    with pytest.warns(bilevel.CompileWarning, match="more than 8 combinations of shapes"):
        assert len(compiler(double, torch.ones(100))["double"]) == 100


def test_no_graph_outlives_a_compiled_call():
    case = problems.make("mlp_distillation", seed=0)
    outer = optree.tree_map(lambda x: x.clone().requires_grad_(), case.outer)
    made = hypergradient(case.problem, OPTIMIZERS["adam"])
    result = made(outer, case.outer_batch, seeded(0))
    tensors = [result.loss, *optree.tree_leaves(result.grads), *result.trace.signals.values()]
    assert all(tensor.grad_fn is None for tensor in tensors)


def test_a_graph_does_not_hold_the_arguments_it_was_made_for():
    compiler, params = Compiler("eager"), torch.ones(3, requires_grad=True)
    given = 2 * params
    held = weakref.ref(given)
    torch.testing.assert_close(compiler(torch.exp, given), given.exp().detach())
    product = compiler.linearised(torch.mul, given, vector=torch.ones(3))
    torch.testing.assert_close(product(torch.ones(3)), given.detach())
    del given
    gc.collect()
    assert held() is None


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_loop_does_not_hold_the_arguments_it_was_made_for(backend):
    def step(rate, carry, x):
        return carry + rate * x, carry.sum()

    compiler = Compiler(backend)
    given = [torch.tensor(0.5), torch.arange(4.0), torch.ones(5, 4)]
    held = [weakref.ref(each) for each in given]
    for _ in range(2):
        rate, start, xs = given
        end, sums = compiler.scan(step, (rate,), start, xs, 5)
        torch.testing.assert_close(end, torch.arange(4.0) + 2.5)
        torch.testing.assert_close(sums, 6 + 2 * torch.arange(5.0))
    del given, rate, start, xs
    gc.collect()
    assert [reference() for reference in held] == [None] * 3
    fresh = compiler.scan(step, (torch.tensor(1.0),), torch.zeros(4), torch.ones(3, 4), 3)
    torch.testing.assert_close(fresh[0], torch.full((4,), 3.0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("pool", "tiles"),
    [
        ({"kernel_size": 2}, True),
        ({"kernel_size": (3, 2), "stride": (3, 2)}, True),
        ({"kernel_size": 2, "stride": 1}, False),
        ({"kernel_size": 2, "padding": 1, "count_include_pad": False}, False),
        ({"kernel_size": 4, "ceil_mode": True}, False),
        ({"kernel_size": 2, "divisor_override": 3}, False),
    ],
)
def test_operations_in_other_words_are_the_same(pool, tiles, dtype):
    """Pooling that tiles the image is put in other words: values, gradients, dtypes stay."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(2, 4, 6, 6, dtype=dtype, generator=generator)
    weight = torch.rand(4, dtype=dtype, generator=generator)
    targets = []

    def watched(graph, example_inputs):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    def value_and_gradients(image, weight):
        points = image.detach().requires_grad_(), weight.detach().requires_grad_()
        twice = dtype == torch.float64
        with torch.enable_grad():
            normal = torch.nn.functional.group_norm(points[0], 2, points[1])
            pooled = torch.nn.functional.avg_pool2d(normal, **pool)
            slopes = torch.autograd.grad(pooled.square().sum(), points, create_graph=twice)
            second = torch.autograd.grad(slopes[0].square().sum(), points) if twice else ()
        return [pooled.detach(), *(slope.detach() for slope in slopes), *second]

    found = Compiler(watched)(value_and_gradients, image, weight)
    for got, wanted in zip(found, value_and_gradients(image, weight), strict=True):
        assert got.dtype == wanted.dtype
        torch.testing.assert_close(got, wanted)
    assert tiles != any("avg_pool2d" in target for target in targets)
    assert not any("group_norm_backward" in target for target in targets)
