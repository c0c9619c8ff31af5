"""Unbiased gradients of a long run from short segments of it, without differentiation."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, final

import torch
from torch import Tensor

from bilevel.checks import check_integer, check_number
from bilevel.errors import ConfigurationError
from bilevel.estimators.base import Estimator, make_result
from bilevel.estimators.evolution_strategies import (
    Segment,
    advance,
    draw_like,
    end_of,
    set_to_mean,
)
from bilevel.random import Key
from bilevel.recording.trajectory import Trace, Trajectory
from bilevel.result import HypergradientResult
from bilevel.tree import partition
from bilevel.variables import Iterate
from bilevel.window import Window


@final
class PersistentEvolutionStrategies(Estimator):
    """Evolution strategies that carry N pairs of perturbed runs on from one call to the next.

    Call j unrolls the next segment of K steps with a fresh draw εᵢⱼ, from where each particle
    stands, and weighs the outer loss at its end with all the draws of that particle so far:

        g_j = 1/N Σᵢ ξᵢⱼ [Fⱼ(φ + σεᵢⱼ) − Fⱼ(φ − σεᵢⱼ)] / 2σ,      ξᵢⱼ = εᵢ₁ + … + εᵢⱼ

    Its expectation is the gradient of the smoothed outer loss at the end of segment j with respect
    to φ in *all* steps from 0 to there: no truncation bias, though only K steps are run. (That is
    for a φ which stands still; changed after every call, it is seen as it was when each segment was
    run.) The variance grows with the number of segments. Otherwise as `EvolutionStrategies`.

    The run is this object's own. `Hypergradient(steps=K)` makes the segments K steps long (the
    width of the window, whatever the truncation); the run which it records for the call is not
    used. After `run_length` steps a new run starts, with new randomness. `result.window`, `.params`
    and `.trace` are those of an unperturbed particle in the run at hand. With `inner_replicas` each
    replica has a run of its own, and all go on by one segment a call. The state, all particles, is
    in `state_dict`. After a result that is not finite every run is given up.

    Args:
        sigma: σ > 0, in units of the outer variables.
        run_length: T, the number of inner steps of a whole run; the last segment may be shorter.
        pairs: N ≥ 1; each costs two segments.

    Raises:
        ConfigurationError: An argument outside its range; in a call, other outer variables or other
            parameters than the run was started with.

    Source: Vicol, Metz and Sohl-Dickstein, arXiv 2112.13835, algorithm 2.
    """

    uses_second_derivatives = False
    runs_again = True
    repeats_outer_loss = True
    differentiates_optimizer = False
    leaves_out = "the gradient is that of a smoothed outer loss, and sampled"
    carries_over = "its particles"
    carries_over_by_replica = True

    def __init__(self, sigma: float, run_length: int, pairs: int = 1) -> None:
        self.sigma = check_number("sigma", sigma, above=0)
        self.run_length = check_integer("run_length", run_length)
        self.pairs = check_integer("pairs", pairs)
        self._runs: dict[int, dict[str, Any]] = {}

    def __call__(self, trajectory: Trajectory, outer_batch: Any) -> HypergradientResult:
        variables = trajectory.variables
        centre = [leaf.detach() for leaf in variables.leaves]
        state = self._runs.get(trajectory.replica, {})
        if state.get("step", self.run_length) < self.run_length:
            start, key, losses, particles, totals = self._resume(state, trajectory, centre)
        else:
            start, key = 0, trajectory.key
            losses = trajectory.trace["inner_loss"][:0]
            particles = [None] * (1 + 2 * self.pairs)
            totals = [torch.zeros(self.pairs, *x.shape, dtype=x.dtype).to(x) for x in centre]
        stop = min(start + trajectory.window.width, self.run_length)
        run = replace(
            trajectory, key=key, steps=self.run_length, window=Window(start, stop), inputs={}
        )
        following = iter(particles)
        ends: list[Iterate] = []

        def follow(leaves: list[Tensor]) -> Segment:
            """Take the next particle to `stop`."""
            segment = advance(run, next(following), variables.like(leaves), run.window)
            ends.append(segment.iterate)
            return segment

        segment = follow(centre)
        losses = torch.cat([losses, segment.inner_losses])
        end = end_of(run, segment, outer_batch)
        samples = []
        for pair in range(self.pairs):
            noise = draw_like(centre, key.fold("perturbation", start, pair))
            above, below = (
                end_of(
                    run,
                    follow([leaf + sign * e for leaf, e in zip(centre, noise, strict=True)]),
                    outer_batch,
                ).loss
                for sign in (self.sigma, -self.sigma)
            )
            for total, e in zip(totals, noise, strict=True):
                total[pair] += e
            samples.append([total[pair] * ((above - below) / (2 * self.sigma)) for total in totals])
        error = set_to_mean(end.gradient, samples)
        result = make_result(
            replace(run, trace=Trace({"inner_loss": losses})),
            end,
            hessian_vector_products=0,
            standard_error=error,
        )
        finite = bool(torch.isfinite(result.stats.hypergradient_norm + result.loss))
        if finite:
            self._runs[trajectory.replica] = _state_of(stop, key, losses, ends, totals)
        else:
            self._runs = {}
        return result

    def state_dict(self) -> dict[str, Any]:
        """The runs under way: step and key of each, and its particles, stacked leaf by leaf."""
        return {
            f"{_prefix(replica)}{name}": value
            for replica, run in self._runs.items()
            for name, value in run.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        runs: dict[int, dict[str, Any]] = {}
        for name, value in state.items():
            replica, name = _split_name(name)
            runs.setdefault(replica, {})[name] = value
        for run in runs.values():
            missing = {"step", "seed", "device", "losses", "particle.0", "total.0"} - set(run)
            if missing:
                raise ConfigurationError(
                    f"{type(self).__name__} cannot continue from a state without {sorted(missing)}"
                )
        self._runs = runs

    def _resume(
        self, state: Mapping[str, Any], trajectory: Trajectory, centre: list[Tensor]
    ) -> tuple[int, Key, Tensor, list[Iterate | None], list[Tensor]]:
        """(t, the key, the inner losses, the particles, ξ) of the run under way."""
        key = Key(state["seed"], torch.device(state["device"]))
        like = trajectory.first.detached()
        leaves, rebuild = _leaves_of(like)
        found = [
            {name: tuple(state[name].shape) for name in state if name.startswith(kind)}
            for kind in ("particle.", "total.")
        ]
        expected = [
            {f"{kind}{i}": (count, *leaf.shape) for i, leaf in enumerate(group)}
            for kind, count, group in (
                ("particle.", 1 + 2 * self.pairs, leaves),
                ("total.", self.pairs, centre),
            )
        ]
        if found != expected:
            raise ConfigurationError(
                f"the run under way has {found}, but this problem, optimizer and pairs="
                f"{self.pairs} need {expected}: use an estimator of its own for each problem"
            )
        stacks = [state[f"particle.{i}"].to(leaf.device) for i, leaf in enumerate(leaves)]
        particles: list[Iterate | None] = [
            Iterate(*rebuild(particle)) for particle in zip(*stacks, strict=True)
        ]
        totals = [state[f"total.{i}"].to(leaf.device).clone() for i, leaf in enumerate(centre)]
        return state["step"], key, state["losses"].to(like.params.device), particles, totals


def _prefix(replica: int) -> str:
    """What comes before the names of a replica's state; nothing for the first."""
    return f"replica{replica}." if replica else ""


def _split_name(name: str) -> tuple[int, str]:
    """(the replica, the name without its prefix)."""
    found = re.fullmatch(r"replica(\d+)\.(.+)", name)
    return (int(found[1]), found[2]) if found else (0, name)


def _state_of(
    step: int, key: Key, losses: Tensor, particles: list[Iterate], totals: list[Tensor]
) -> dict[str, Any]:
    """A run as flat numbers, strings and tensors."""
    stacks = zip(*(_leaves_of(particle)[0] for particle in particles), strict=True)
    return {
        "step": step,
        "seed": key.seed,
        "device": str(key.device),
        "losses": losses,
        **{f"particle.{i}": torch.stack(leaves) for i, leaves in enumerate(stacks)},
        **{f"total.{i}": total for i, total in enumerate(totals)},
    }


def _leaves_of(iterate: Iterate) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], Any]]:
    """Every tensor of (θ, s), step counts too."""
    return partition((iterate.params, iterate.state), lambda leaf: isinstance(leaf, Tensor))
