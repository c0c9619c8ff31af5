"""One of every transformation that `bilevel.optim` makes, for tests that hold of all of them."""

import bilevel
from bilevel import optim

#: By the name of the function that makes it; `chain` and `groups` of others.
ONE_OF_EACH = {
    "adagrad": optim.adagrad(0.1, weight_decay=0.1),
    "adam": optim.adam(0.1),
    "adamw": optim.adamw(0.1),
    "chain": optim.chain(optim.clip_by_norm(0.5), optim.adam(0.1)),
    "clip_by_norm": optim.clip_by_norm(0.5),
    "clip_by_value": optim.clip_by_value(0.5),
    "freeze": optim.freeze(),
    "groups": optim.groups({"*": optim.adam(0.1)}),
    "rmsprop": optim.rmsprop(0.1, momentum=0.9, centered=True),
    "sgd": optim.sgd(0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
}

#: What `bilevel.optim` has beside them.
OTHERS = {
    "AdagradState",
    "AdamState",
    "RMSPropState",
    "RoundedState",
    "Rule",
    "SGDState",
    "on_vector",
}

assert set(ONE_OF_EACH) | OTHERS == set(bilevel.optim.__all__), "one is missing here"
