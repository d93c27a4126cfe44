"""The errors of users: below everything that may raise them."""


class RecipeError(ValueError):
    """A recipe that cannot run; the message is one line naming the key and the fix."""


class DataError(ValueError):
    """Data that cannot be used; the message is one line saying what is wrong, where, and what to do."""


class PeerError(RuntimeError):
    """Another rank has an error, which it says itself; the message is that error's."""
