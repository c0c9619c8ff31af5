"""What a network makes of images before it classifies them."""

from collections.abc import Mapping

from torch import Tensor, nn
from torch.func import functional_call


def embedded(
    network: nn.Module, params: Mapping[str, Tensor], images: Tensor
) -> tuple[Tensor, Tensor]:
    """What the network's last linear layer is given, [N, d], and the logits, [N, K].

    Args:
        network: The module.
        params: Its parameters, by name.
        images: [N, C, H, W].
    """
    last = [module for module in network.modules() if isinstance(module, nn.Linear)][-1]
    given: list[Tensor] = []
    hook = last.register_forward_pre_hook(lambda module, inputs: given.append(inputs[0]))
    try:
        logits = functional_call(network, dict(params), (images,))
    finally:
        hook.remove()
    return given[-1].flatten(1), logits
