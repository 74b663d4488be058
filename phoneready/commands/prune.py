"""To come."""


def prune() -> None:
    """To come."""
    raise NotImplementedError
