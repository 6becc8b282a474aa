"""The exceptions of sd_plugin.

Standard library only: the launcher needs them before torch is imported.
"""


class UsageError(ValueError):
    """A mistake of the user's, told in one line; host launchers print it without a traceback."""
