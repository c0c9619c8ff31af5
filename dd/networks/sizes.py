"""Checks that the networks share."""


def check_sizes(**sizes: int) -> None:
    """Raise `ValueError` unless every size is an integer of at least 1."""
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"{name} is {value!r}; it must be an integer")
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")


def check_image_size(image_size: int, halvings: int) -> None:
    """Raise `ValueError` unless an image can be halved this often."""
    if image_size < 2**halvings:
        raise ValueError(f"image_size is {image_size}; it must be at least {2**halvings}")
