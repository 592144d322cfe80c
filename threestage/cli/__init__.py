"""The command line. Installed commands and users' jobs begin at `threestage.cli:main`."""

from threestage.cli.app import main

__all__ = ["main"]
