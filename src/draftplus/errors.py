"""The exceptions of the whole package; here because the command line needs them before torch."""


class UserError(Exception):
    """A mistake that the user can fix. The command line prints its one or two lines and exits with 2."""


class Interrupted(BaseException):
    """Somebody asked the process to stop; what was complete is saved."""
