"""The error of a recipe, below everything that may raise it."""


class RecipeError(ValueError):
    """A recipe that cannot run; the message is one line naming the key and the fix."""
