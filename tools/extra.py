"""Print the requirements of one extra of pyproject.toml, one a line; pip alone installs the package's own as well.

python tools/extra.py site
"""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path(__file__).parents[1].joinpath("pyproject.toml").read_text(encoding="utf-8"))["project"]
print(*(requirement.replace(" ", "") for requirement in project["optional-dependencies"][sys.argv[1]]), sep="\n")
