"""Write a distilled set in another form: `python -m dd.export RUN_DIR --format=pt`."""

import argparse
import sys
from pathlib import Path

from dd.cli import fail, parsed, run, say
from dd.evaluation.names import EXPORT_FORMATS

EPILOG = """\
examples:
  python -m dd.export runs/digits --format=pt
  python -m dd.export runs/digits --format=folder --out=pictures
  python -m dd.export digits-ipc1 --format=npz --out=digits

What is written has a README.md, which says what that form keeps bit by bit and what not, and
preview.png.
"""


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m dd.export",
        description="Write a distilled set in another form, with a card and a picture.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "run_dir",
        metavar="RUN_DIR",
        help="what python -m dd.train wrote; or a set's file; or the name of one that comes with "
        "dd, such as digits-ipc1",
    )
    parser.add_argument(
        "--format", choices=EXPORT_FORMATS, default=EXPORT_FORMATS[0], help="(default: safetensors)"
    )
    parser.add_argument(
        "--out", metavar="DIR", help="the folder to make (default: NAME-FORMAT of the set's name)"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace what an earlier export left there"
    )
    options = parsed(parser, arguments)
    return run(lambda: _export(options))


def _export(options: argparse.Namespace) -> int:
    from dd.exchange.export import export_set
    from dd.runtime.files import DamagedFileError

    name = Path(options.run_dir).absolute().name.removesuffix(".safetensors")
    folder = options.out or f"{name}-{options.format}"
    try:
        made = export_set(options.run_dir, folder, options.format, overwrite=options.overwrite)
    except FileExistsError as error:
        return fail(f"{error} (--out, --overwrite)")
    except (DamagedFileError, ValueError) as error:
        return fail(str(error))
    except OSError as error:
        return fail(
            str(error) if error.errno is None or error.filename else f"--out={folder}: {error}"
        )
    say(f"written: {made}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
