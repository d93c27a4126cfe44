"""The errors of users: below everything that may raise them."""


class RecipeError(ValueError):
    """A recipe that cannot run; the message is one line naming the key and the fix."""


class DataError(ValueError):
    """Data that cannot be used; the message is one line saying what is wrong, where, and what to do."""
