"""A tiny model of a row of the table of models, for whoever wants to serve or measure it.

    python -m tests.support.write_family "Falcon-H1" FOLDER

Weights are random but always the same, so that what was measured can be measured again.
"""

import argparse
from pathlib import Path

from tests.support.families import FAMILIES
from tests.support.family import write_family


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    families = {family.name: family for family in FAMILIES}
    parser.add_argument("name", choices=families, metavar="NAME", help="first column of the table")
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    print(write_family(options.folder, families[options.name]))


if __name__ == "__main__":
    main()
