"""To come."""


def evaluate() -> None:
    """To come."""
    raise NotImplementedError
