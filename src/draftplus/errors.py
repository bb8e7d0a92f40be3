"""The exceptions of the whole package; here because the command line needs them before torch."""


def printable(text: str) -> str:
    """The text with control characters, which could steer a terminal, written as escapes; line ends stay."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


class UserError(Exception):
    """A mistake that the user can fix. The command line prints its one or two lines and exits with 2."""


class Interrupted(BaseException):
    """Somebody asked the process to stop; what was complete is saved."""
