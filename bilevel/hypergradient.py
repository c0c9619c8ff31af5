"""The entry point: record, select, differentiate."""

from dataclasses import replace
from typing import Any, final

import optree
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bilevel.bridge import Bridge
from bilevel.checks import check_device, check_flag, check_instance, check_integer
from bilevel.compiler import constants_of, surroundings, untraced
from bilevel.contract.derivatives import missing_derivatives_named
from bilevel.contract.graph import inside_transform
from bilevel.contract.held import Snapshot, modules_held_by
from bilevel.contract.watch import Watch
from bilevel.errors import ConfigurationError, ProblemError
from bilevel.estimators import Adjoint, Estimator
from bilevel.first_call import FirstCall
from bilevel.module import refuse_running_statistics
from bilevel.probe import Probe
from bilevel.problem import Problem
from bilevel.random import Key
from bilevel.recording.inner import InnerLoop
from bilevel.recording.record import record
from bilevel.recording.unrolled import GraphBudget
from bilevel.result import HypergradientResult, check_finite, mean
from bilevel.stopwatch import Stopwatch
from bilevel.tree import named_leaves, tensors_in
from bilevel.truncation import Full, Truncation
from bilevel.variables import add_to_grad, leaves_with_grad


@final
class Hypergradient:
    """d(outer loss)/d(outer variables) through an inner training run.

    Args:
        problem: The nested problem.
        optimizer: The inner optimizer: a `bilevel.optim` or `torchopt` gradient transformation, or
            one of your own, which sees the pytree of parameters that `init` returned; or, when the
            problem has `hyperparameters`, a function that makes one from them.
        steps: T, the length of a full inner run.
        truncation: Which steps are differentiated. Default: all of them.
        estimator: How they are differentiated. Default: `Adjoint`, exact in flat memory.
        keep_every: Keep every k-th iterate of the run and recompute the others exactly while
            going backward: memory of window/k + k iterates instead of the window's, for one more
            forward pass over it. Default: the smallest k whose iterates take 96 MiB on a CPU,
            1/64 of an accelerator's memory.
        keep_on: Device that holds the kept iterates, "cpu" to spare an accelerator's memory.
        graph_budget: How many bytes of autograd graph a call may keep. Where the window is known
            before the run and its graph fits, it is recorded and differentiated once, in the time
            of a loop written by hand; else what each step takes of φ, such as its batch, is kept
            with its graph if that fits, and made again going backward if not. What is chosen
            follows from shapes and settings alone and is in `stats.method`. Default: 256 MiB on a
            CPU, 1/64 of an accelerator's memory. 0: the memory of one step.
        inner_replicas: Independent inner runs for one hypergradient, which is their mean: each has
            its own initialisation and inner batches. They run one after the other, so memory stays
            that of one run; `Replicas` runs them side by side instead. The first one's trace
            selects the window for all.
        compile: Run the inner steps, the adjoint steps and the outer loss with its gradient as
            one graph each, a loop over any number of steps; a run of at most eight steps with its
            derivative as one graph. They are compiled at their first call (a quarter of a minute
            to a minute in all) and reused from then on. What cannot be compiled, or differs from
            eager mode by more than rounding explains, is run step by step, or in eager mode, with
            a `CompileWarning`. Only `Adjoint` compiles its way back.

    Raises:
        ConfigurationError: An argument that cannot work, such as a window longer than the run.
        ProblemError: The problem holds a module with running statistics.

    Example:
        A learning rate that is learned; `Problem` has an example of the other methods.

        >>> class Descend(bilevel.Problem):
        ...     def init(self, outer, *, generator):
        ...         return torch.ones(3)
        ...
        ...     def hyperparameters(self, outer, step):
        ...         return {"lr": outer["log_rate"].exp()}
        ...
        ...     def inner_batch(self, outer, step, *, generator):
        ...         return torch.tensor([0.1, 0.5, 1.0])
        ...
        ...     def inner_loss(self, params, batch):
        ...         return 0.5 * (batch * params**2).sum()
        ...
        ...     def outer_loss(self, params, outer, batch):
        ...         return (params**2).sum()
        >>> outer = {"log_rate": torch.tensor(-3.0, requires_grad=True)}
        >>> outer_optimizer = torch.optim.Adam(outer.values(), lr=0.3)
        >>> hypergradient = bilevel.Hypergradient(
        ...     Descend(),
        ...     optimizer=bilevel.optim.sgd,
        ...     steps=20,
        ...     truncation=bilevel.truncation.RandomWindow(window=10),
        ... )
        >>> for _ in range(10):
        ...     outer_optimizer.zero_grad()
        ...     result = hypergradient.backward(outer)
        ...     outer_optimizer.step()
        >>> result.stats.status, bool(outer["log_rate"] > -2)
        ('ok', True)
    """

    def __init__(
        self,
        problem: Problem,
        optimizer: Any,
        steps: int,
        truncation: Truncation | None = None,
        estimator: Estimator | None = None,
        *,
        keep_every: int | None = None,
        keep_on: torch.device | str | None = None,
        graph_budget: int | None = None,
        inner_replicas: int = 1,
        compile: bool = False,
    ) -> None:
        self.steps = check_integer("steps", steps)
        self.keep_every = None if keep_every is None else check_integer("keep_every", keep_every)
        self.inner_replicas = check_integer("inner_replicas", inner_replicas)
        self.truncation = Full() if truncation is None else truncation
        self.estimator = Adjoint() if estimator is None else estimator
        check_instance("problem", problem, Problem, "a subclass, or Problem.from_functions(…)")
        check_instance("truncation", self.truncation, Truncation, "bilevel.truncation.Full()")
        check_instance("estimator", self.estimator, Estimator, "bilevel.estimators.Adjoint()")
        if steps < self.truncation.minimum_steps:
            raise ConfigurationError(
                f"steps={steps}: {type(self.truncation).__name__} needs at least "
                f"{self.truncation.minimum_steps}, the width of its window"
            )
        if self.inner_replicas > 1 and (
            self.estimator.carries_over and not self.estimator.carries_over_by_replica
        ):
            raise ConfigurationError(
                f"inner_replicas={inner_replicas}: {type(self.estimator).__name__} takes over "
                f"{self.estimator.carries_over} from the call before, and each replica would take "
                "over another one's"
            )
        for name, module in modules_held_by(problem):
            refuse_running_statistics(module, f"{type(problem).__name__}.{name}")
        self.inner = InnerLoop(problem, optimizer, compile=check_flag("compile", compile))
        if self.inner.has_step_loss and not self.estimator.uses_step_losses:
            raise ConfigurationError(
                f"estimator={type(self.estimator).__name__}: it differentiates where the run ends, "
                f"and {type(problem).__name__} has losses along it (step_loss): use Adjoint()"
            )
        if not (self.inner.has_step_loss or self.inner.has_outer_loss):
            raise ConfigurationError(
                f"{type(problem).__name__} has neither outer_loss nor step_loss: there is nothing "
                "to minimise"
            )
        budget = graph_budget
        if budget is not None:
            budget = check_integer("graph_budget", graph_budget, minimum=0)
        self.graph_budget = GraphBudget(budget)
        self._calls = 0
        self._constants: Snapshot | None = None
        self._probe: Probe | None = None
        self._watch: Watch | None = None
        self.keep_on = None if keep_on is None else check_device("keep_on", keep_on)

    @untraced
    def __call__(
        self, outer: Any, outer_batch: Any = None, generator: torch.Generator | None = None
    ) -> HypergradientResult:
        """One hypergradient.

        Args:
            outer: φ, a pytree of floating-point tensors. It is not changed.
            outer_batch: Passed on to `Problem.outer_loss`; or `MicroBatches`, of which one is in
                memory at a time.
            generator: Source of all randomness of this call, through one integer drawn from it;
                the generators that the problem sees live on its device. Default: PyTorch's
                global generator.

        Returns:
            The result; `result.grads` is a pytree like `outer`.

        Raises:
            ProblemError: A method of the problem breaks its contract.
            UnusedOuterVariableError: Nothing depends on some outer variable.
            NonFiniteError: The outer loss or the hypergradient is NaN or infinite.
        """
        if inside_transform():
            raise ProblemError(
                "a hypergradient cannot be taken inside a transform of torch.func (grad, vmap, "
                "jvp): call it outside, or use Hypergradient.loss with torch.autograd"
            )
        if torch.is_inference_mode_enabled():
            raise ProblemError(
                "a hypergradient cannot be taken under torch.inference_mode, where nothing is "
                "differentiated: use torch.no_grad there"
            )
        problem, clock = self.inner.problem, Stopwatch()
        key = Key.draw(generator)
        if self.inner.compiler is not None:
            is_new = self._constants is None or not self._constants.unchanged()
            if is_new or not (self._probe is None or self._probe.unchanged()):
                self._constants = constants_of(problem, self.inner.optimizer)
            self.inner.compiler.depends_on((self._constants, surroundings()))
        schedule_generator = key.generator("truncation", device=torch.device("cpu"))
        plan = self.truncation.plan(self.steps, schedule_generator)
        horizon = check_integer("Plan.horizon", plan.horizon, maximum=self.steps)
        keep_from, window = plan.earliest_start, plan.window
        results = []
        clock.lap("selection")
        for replica in range(self.inner_replicas):
            watch = self._watch_over(outer)
            first_call = None
            if watch is not None and self._calls == 0:
                first_call = FirstCall(self.inner, self.estimator, watch)
            # Fused attention has no second derivative; its kernels made of other operations do.
            with (
                missing_derivatives_named(self.estimator),
                sdpa_kernel(SDPBackend.MATH),
                self.inner.watched(watch, "init", "inner_batch", "hyperparameters"),
            ):
                trajectory = record(
                    self.inner,
                    outer,
                    key.fold("replica", replica) if replica else key,
                    steps=self.steps,
                    horizon=horizon,
                    signals=plan.signals if window is None else (),
                    outer_batch=outer_batch,
                    keep_from=keep_from,
                    keep_every=self.keep_every,
                    keep_on=self.keep_on,
                    keep_gradients=self.estimator.uses_inner_gradients,
                    budget=self.graph_budget,
                    window=window if self.estimator.uses_graph else None,
                    first_call=first_call,
                )
            if first_call is not None and self.inner.compiler is not None and not replica:
                self._probe = Probe(self.inner, *first_call.at_first)
            clock.lap("rollout")
            if window is None:
                window = self.truncation.select(trajectory.trace, schedule_generator)
                # The other replicas need no more than that window of their runs.
                horizon, keep_from = window.stop, window.start
                clock.lap("selection")
            with (
                missing_derivatives_named(self.estimator),
                sdpa_kernel(SDPBackend.MATH),
                self.inner.watched(watch, "outer_loss", "step_loss"),
            ):
                chosen = replace(trajectory.select(window), replica=replica)
                result = self.estimator(chosen, outer_batch)
                if first_call is not None:
                    first_call.over(chosen, outer_batch)
            check_finite(result)
            results.append(result if first_call is None else first_call.remarked(result))
            clock.lap("backward")
        self._calls += 1
        result = results[0] if len(results) == 1 else mean(results)
        return replace(result, stats=replace(result.stats, seconds=clock.seconds))

    @untraced
    def loss(
        self, outer: Any, outer_batch: Any = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """The outer loss as a scalar that autograd goes on from.

        For outer variables that are made by a network, sums of several hypergradients, and
        regularisers: `(hypergradient.loss(outer, batch) + penalty).backward()`. The hypergradient
        is computed here, with the loss, and handed over when autograd comes back.

        Args:
            outer: φ, a pytree of floating-point tensors, of which some are on a graph.
            outer_batch: As of a call.
            generator: As of a call.

        Returns:
            F, a scalar tensor that can be differentiated once.

        Raises:
            ProblemError: As a call; a tensor of `outer_batch` requires a gradient; and in backward,
                where a second derivative is asked for.
        """
        leaves = [leaf for _, leaf in named_leaves(outer)]
        if any(leaf.requires_grad for leaf in tensors_in(outer_batch)):
            raise ProblemError(
                "outer_batch holds a tensor that requires a gradient, which loss() does not give: "
                "make it an outer variable, or detach it"
            )
        with torch.no_grad():
            result = self(outer, outer_batch, generator)
        grads = optree.tree_leaves(result.grads)
        loss: Tensor = Bridge.apply(result.loss, grads, *leaves)
        return loss

    def __getstate__(self) -> dict[str, Any]:
        """What a copy starts with: everything but what belongs to this object's own calls."""
        return {**self.__dict__, "_constants": None, "_watch": None}

    def _watch_over(self, outer: Any) -> Watch | None:
        """Of the first call and the second, which shows what was kept from the first."""
        if self._calls > 1:
            self._watch = None
            return None
        self._watch = self._watch or Watch(self.inner.problem, self.inner.optimizer)
        self._watch.begin(outer)
        return self._watch

    @untraced
    def backward(
        self, outer: Any, outer_batch: Any = None, generator: torch.Generator | None = None
    ) -> HypergradientResult:
        """One hypergradient, added to the `.grad` of every outer tensor, as autograd would.

        Raises:
            ProblemError: An outer tensor is not a leaf that requires gradients.
        """
        leaves = leaves_with_grad(outer)
        result = self(outer, outer_batch, generator)
        add_to_grad(leaves, result.grads)
        return result
