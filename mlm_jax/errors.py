"""The two kinds of failure a user sees as one message: their own mistake, and a fault of the machine."""


class UserError(ValueError):
    """A mistake in what the user asked for or supplied; the command line exits with status 2."""


class MachineError(RuntimeError):
    """A fault outside the user's request (disk, checkpoint, device); the command line exits with status 1."""
