"""`python -m stem` and the command `stem`."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line, or say what is missing for it."""
    try:
        from .cli import run

        status = run()
    except ModuleNotFoundError as error:
        sys.exit(
            f"stem needs the module {error.name}, which its installation brings and which is "
            "missing; install it again with all it needs: pip install ."
        )
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(status)


if __name__ == "__main__":
    main()
