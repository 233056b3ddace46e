"""The program `jaxspec`, or `python -m jaxspec`."""

import os


def run() -> None:
    try:
        from jaxspec.cli import main
        from jaxspec.cli.exits import leave
    except KeyboardInterrupt:
        os._exit(130)
    leave(main())


if __name__ == "__main__":
    run()
