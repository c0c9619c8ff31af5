"""Traced graphs before they are compiled: what is there twice is made once, and before a loop."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

#: Operations that copy nothing: a graph makes them anew sooner than be given what they make.
_VIEWS = (aten.t.default, aten.view.default, aten.expand.default, aten.unsqueeze.default)


def simplify(graph: fx.Graph) -> fx.Graph:
    """The same values by fewer operations, of a graph without random draws or writing in place.

    A traced derivative is full of repetitions, which the compiler leaves in the body of a loop: of
    a soft-maximum, the exponentials are taken to sum them, for its gradient, and twice for its
    second derivative. They are most of what a small classifier's step takes beside its products.
    """
    from torch._functorch.compile_utils import fx_graph_cse

    for node in graph.find_nodes(op="call_function", target=aten.detach.default):
        node.replace_all_uses_with(node.args[0])
        graph.erase_node(node)
    for node in graph.nodes:
        given: Any = node.args[0] if node.target in (aten.exp.default, aten.t.default) else None
        if getattr(given, "target", None) is not aten.t.default:
            continue
        if node.target is aten.t.default:
            node.replace_all_uses_with(given.args[0])
        else:
            with graph.inserting_before(node):
                exponential = graph.call_function(aten.exp.default, given.args)
                transposed = graph.call_function(aten.t.default, (exponential,))
            node.replace_all_uses_with(transposed)
    graph = fx_graph_cse(graph)
    for node in graph.find_nodes(op="call_function", target=aten.exp.default):
        found = _normalised_exponentials(node)
        if found is not None:
            exponentials, total = found
            with graph.inserting_before(node):
                inverse = graph.call_function(aten.reciprocal.default, (total,))
                quotient = graph.call_function(aten.mul.Tensor, (exponentials, inverse))
            node.replace_all_uses_with(quotient)
    graph.eliminate_dead_code()
    return graph


def _normalised_exponentials(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(exp(x), their sum) where a node is exp(x − log Σ exp(x)): a quotient of what is there."""
    difference: Any = node.args[0]
    if difference.target is not aten.sub.Tensor:
        return None
    x, logarithm = difference.args[:2]
    if getattr(logarithm, "target", None) is not aten.log.default:
        return None
    total = logarithm.args[0]
    if total.target is not aten.sum.dim_IntList:
        return None
    exponentials = total.args[0]
    if exponentials.target is not aten.exp.default or exponentials.args[0] is not x:
        return None
    return exponentials, total


def split(graph: fx.GraphModule, index: int) -> tuple[fx.GraphModule, fx.GraphModule]:
    """(what of a graph does not depend on one of its arguments, the rest).

    The first takes all arguments and returns what the second takes after them.

    Args:
        graph: A function of tensors.
        index: Which argument.
    """
    nodes = list(graph.graph.nodes)
    arguments = [node for node in nodes if node.op == "placeholder"]
    dependent = {arguments[index]}
    for node in nodes:
        if node.op == "output" or dependent.intersection(node.all_input_nodes):
            dependent.add(node)
    saved: dict[fx.Node, None] = {}
    for node in nodes:
        for given in node.all_input_nodes if node in dependent else ():
            while given.target in _VIEWS and given not in dependent:
                given = given.args[0]
            if given not in dependent and given.op != "placeholder":
                saved[given] = None

    first = fx.Graph()
    there: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        if node.op == "placeholder" or node not in dependent:
            there[node] = first.node_copy(node, there.__getitem__)
    first.output([there[node] for node in saved])

    second = fx.Graph()
    here = {node: second.node_copy(node) for node in arguments}
    here |= {node: second.placeholder(f"saved_{node.name}") for node in saved}

    def copied(node: fx.Node) -> fx.Node:
        if node not in here:
            here[node] = second.node_copy(node, copied)
        return here[node]

    for node in nodes:
        if node in dependent:
            copied(node)
    return fx.GraphModule(graph, first), fx.GraphModule(graph, second)
