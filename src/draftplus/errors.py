"""The one error class of the whole package; here because the command line needs it before torch."""


class UserError(Exception):
    """A mistake that the user can mend. The command line prints its one or two lines and exits with 2."""
