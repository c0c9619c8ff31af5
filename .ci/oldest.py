"""Print, as constraints for pip, the oldest version of every dependency that is allowed."""

import re
import tomllib
from pathlib import Path

pyproject = Path(__file__).parents[1] / "pyproject.toml"
for requirement in tomllib.loads(pyproject.read_text())["project"]["dependencies"]:
    print(re.sub(r"^([\w-]+)>=([\w.]+),.*", r"\1==\2", requirement))
