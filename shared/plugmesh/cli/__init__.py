"""The `plugmesh` command. `app.py` lists the commands; each one's work is in a file of its name, imported when it runs."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point. Exit status: 0 done, 1 failed, 2 bad arguments or configuration, 130 interrupted."""
    from plugmesh.cli.app import app
    from plugmesh.errors import ConfigError, PlugmeshError

    try:
        app()
    except PlugmeshError as e:
        from plugmesh.cli.output import print_error

        print_error(e.message)
        sys.exit(2 if isinstance(e, ConfigError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # `plugmesh status | head`
        sys.stderr.close()
        sys.exit(1)

