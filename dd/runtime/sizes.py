"""How large a setting can be before it must have been meant otherwise, and no memory would do."""

#: Height and width of an image.
LARGEST_IMAGE = 2**14
#: Channels of a network's first layer, or the length of a token.
LARGEST_WIDTH = 2**14
#: Blocks of a network.
LARGEST_DEPTH = 1000
#: PyTorch's generators take no larger seed.
LARGEST_SEED = 2**63 - 1
