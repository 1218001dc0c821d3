"""``python -m bench``: the report, as ``pyfastpeft bench`` makes it."""

import argparse

from rich.console import Console

from . import full

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench", description=full.__doc__)
    full.add_arguments(parser)
    full.run(parser.parse_args(), Console())
