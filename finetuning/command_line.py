"""The command line of `python -m finetuning.NAME`."""

import argparse

from .errors import InputError


class CommandParser(argparse.ArgumentParser):
    """A parser of a command: its help is the module's docstring, and a wrong call is one line instead of a page of usage.

    Args:
        name (str): of the module.
        description (str): its docstring.
        **settings: as of argparse.
    """

    def __init__(self, name: str, description: str | None, **settings):
        super().__init__(
            prog=f"python -m finetuning.{name}",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **settings,
        )

    def error(self, message):
        raise InputError(f"{message} (--help says what is taken)")
