"""To come."""


def release() -> None:
    """To come."""
    raise NotImplementedError
