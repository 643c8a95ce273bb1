#!/usr/bin/env python3
"""Lists one user's files, and nothing else.

python3 tools/list_only.py --user-id N [--server-info FILE]
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from backup import Client
from backup.config import parse_user_id, read_server_info
from tools.common import options, run


def main() -> int:
    parser = options("List one user's files.")
    parser.add_argument("--user-id", metavar="N", required=True, help="whose files")
    chosen = parser.parse_args()
    user_id = parse_user_id(chosen.user_id, "--user-id")
    with Client(read_server_info(chosen.server_info), user_id) as client:
        print(f"Files on server: {client.list()}")
    return 0


if __name__ == "__main__":
    run(main)
