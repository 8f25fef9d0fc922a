"""The command line, called as a user types it."""

import pytest

from companion import cli


@pytest.fixture
def call(capsys):
    """Runs a command in this process, which is fast; returns exit code, standard output, standard error."""

    def run(*arguments):
        with pytest.raises(SystemExit) as ended:
            cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return ended.value.code, out, err

    return run
