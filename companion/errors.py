"""The one exception that means: what you gave cannot be used, and here is what to do."""


class CompanionError(ValueError):
    """Bad input or a missing part. The message is one sentence that names what was wrong and what to do.

    The command line prints it and exits with code 1; anything else that escapes is a defect of ours.
    """
