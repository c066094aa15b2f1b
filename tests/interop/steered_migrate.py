"""`python steered_migrate.py STEERING arguments…`: a writelog-migrate of which a test decides what becomes of it.

STEERING is a JSON object: at places of `killed` it is killed, at those of `held` it tells so, by an event, and
waits for a line on its standard input (places: see killed_at.py); `limits` are constants of writelog.migrate_run.
"""

from __future__ import annotations

import json
import sys

import killed_at

from writelog import migrate, migrate_run


def hold() -> None:
    print(json.dumps({"state": "held"}), flush=True)
    sys.stdin.readline()


def main() -> int:
    steering = json.loads(sys.argv.pop(1))
    for place in steering["killed"]:
        killed_at.arm(place)
    for place in steering["held"]:
        killed_at.arm(place, hold)
    for name, seconds in steering["limits"].items():
        assert hasattr(migrate_run, name)
        setattr(migrate_run, name, seconds)
    return migrate.main()


if __name__ == "__main__":
    sys.exit(main())
