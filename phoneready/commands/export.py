"""To come."""


def export() -> None:
    """To come."""
    raise NotImplementedError
