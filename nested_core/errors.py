"""The one exception of this pack that a user is meant to read."""


class NestedAttentionError(ValueError):
    """Something the user gave does not fit: the message says what was expected, what came, and what to do."""

    # Hosts show the class with its module in front of the message; the real one holds the path of the install.
    __module__ = "nested_attention"
