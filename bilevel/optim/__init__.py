r"""Differentiable optimizers as gradient transformations in TorchOpt's protocol.

Each function returns a `torchopt.base.GradientTransformation`: a pair of pure functions
`init(params)` and `update(grads, state, *, params, inplace)`, over any pytree of tensors. They
chain with each other (`chain`), with TorchOpt's own, and with yours. They never write in place
(`inplace` is accepted and has no effect), so they are safe under `torch.func` transforms and
`torch.compile`, and they can be pickled and copied.

Every hyperparameter is a number, a scalar tensor, or a pytree of these like the parameters or a
prefix of them, whose tensors broadcast against the parameters they are for; tensors may require a
gradient, to be learned. What does not fit the parameters is a `ConfigurationError`. Parameters of
16 bits are trained on a master copy in float32. See docs/optimizers.md.

With `eps_root=0` each optimizer takes the same steps as its namesake in `torch.optim`. A square
root has an infinite derivative at zero, so to differentiate through a step in which some gradient
may vanish `eps_root` must be positive; the default of 1e-12 changes only coordinates whose
gradients are below about 1e-6.

Example:
    >>> optimizer = bilevel.optim.sgd(lr=0.1, momentum=0.9)
    >>> params = torch.ones(2)
    >>> state = optimizer.init(params)
    >>> updates, state = optimizer.update(torch.tensor([1.0, 2.0]), state, params=params)
    >>> params + updates
    tensor([0.9000, 0.8000])
"""

from bilevel.optim.adagrad_family import AdagradState, RMSPropState, adagrad, rmsprop
from bilevel.optim.adam_family import AdamState, adam, adamw
from bilevel.optim.base import RoundedState, Rule, on_vector
from bilevel.optim.clipping import clip_by_norm, clip_by_value
from bilevel.optim.composition import chain, freeze
from bilevel.optim.gradient_descent import SGDState, sgd
from bilevel.optim.groups import groups

__all__ = [
    "AdagradState",
    "AdamState",
    "RMSPropState",
    "RoundedState",
    "Rule",
    "SGDState",
    "adagrad",
    "adam",
    "adamw",
    "chain",
    "clip_by_norm",
    "clip_by_value",
    "freeze",
    "groups",
    "on_vector",
    "rmsprop",
    "sgd",
]
