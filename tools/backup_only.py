#!/usr/bin/env python3
"""Backs up the files that backup.info names, and nothing else.

python3 tools/backup_only.py [--server-info FILE] [--backup-info FILE] [--user-id N]
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from backup import Backup, Client
from backup.config import (
    BACKUP_INFO,
    draw_user_id,
    parse_user_id,
    read_backup_info,
    read_server_info,
)
from backup.names import of_path, show
from tools.common import options, run


def main() -> int:
    parser = options("Back up the files that backup.info names.")
    parser.add_argument(
        "--backup-info", metavar="FILE", default=BACKUP_INFO, help="default: %(default)s"
    )
    parser.add_argument("--user-id", metavar="N", help="default: drawn anew")
    chosen = parser.parse_args()
    address = read_server_info(chosen.server_info)
    files = read_backup_info(chosen.backup_info)
    user_id = parse_user_id(chosen.user_id, "--user-id") if chosen.user_id else draw_user_id()
    print(f"User ID: {user_id}")
    failed = 0
    with Client(address, user_id) as client:
        for outcome in client.run([Backup(path, of_path(path)) for path in files]):
            if outcome.error is None:
                print(f"Backup OK ({show(outcome.job.name)})")
            else:
                print(f"Backup failed ({show(outcome.job.name)}): {outcome.error.text}")
                failed += 1
    return 1 if failed else 0


if __name__ == "__main__":
    run(main)
