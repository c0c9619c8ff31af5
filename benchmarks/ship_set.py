"""Make the set of a run one that comes with `dd`: `python benchmarks/ship_set.py RUN NAME ...`.

The run must have been evaluated (`dd-train` ends with that): its accuracy goes into the index.

    python benchmarks/ship_set.py runs/digits digits-ipc1 --description='...' --data='...'
"""

import argparse
import json
import shlex
from pathlib import Path

from dd.evaluation.distilled_set import DistilledSet
from dd.evaluation.names import RESULTS
from dd.exchange.export import with_results
from dd.exchange.shipped import FOLDER, INDEX, find_set, read_index
from dd.runtime.files import read_json, write_text


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("name", help="such as cifar10-ipc1")
    parser.add_argument("--description", required=True, help="of what, and how much")
    parser.add_argument("--data", required=True, help="whose images, and under which licence")
    parser.add_argument("--made_by", help="the command (default: what results.json says)")
    options = parser.parse_args()
    path = find_set(options.run_dir)
    distilled = with_results(DistilledSet.load(path), path.with_name(RESULTS))
    measured = distilled.recipe.get("measured")
    if measured is None:
        parser.error(f"{options.run_dir} has not been evaluated: dd-evaluate {options.run_dir}")
    command = shlex.split(read_json(path.with_name(RESULTS))["command"])
    words = [word for word in command if not word.startswith("--run_dir")]
    target = FOLDER / f"{options.name}.safetensors"
    distilled.save(target)
    entry = {
        "description": options.description,
        "accuracy": round(measured["mean"], 4),
        "std": round(measured["std"], 4),
        "networks": measured["networks"],
        "network": measured["network"],
        "protocol": measured["protocol"],
        "steps": measured["steps"],
        "made_by": options.made_by or shlex.join(words),
        "data": options.data,
    }
    index = dict(sorted({**read_index(), options.name: entry}.items()))
    write_text(FOLDER / INDEX, json.dumps(index, indent=2, ensure_ascii=False) + "\n")
    print(f"{target}: {target.stat().st_size:,} bytes\n{json.dumps(entry, indent=2)}")


if __name__ == "__main__":
    main()
