"""pyftpdlib as its tutorial sets it up, on a free loopback port; whoever comes may write.

python3 -m tools.peers.ftp --root DIR
"""

from __future__ import annotations

import argparse
import signal
import sys

from pyftpdlib.authorizers import DummyAuthorizer
from pyftpdlib.handlers import FTPHandler
from pyftpdlib.servers import FTPServer

from tools.peers.reference import greet


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve by FTP.")
    parser.add_argument("--root", required=True, metavar="DIR", help="keep the files in DIR")
    chosen = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    authorizer = DummyAuthorizer()
    authorizer.add_anonymous(chosen.root, perm="elradfmw")
    FTPHandler.authorizer = authorizer
    server = FTPServer(("127.0.0.1", 0), FTPHandler)
    greet(server.address[1])
    server.serve_forever()


if __name__ == "__main__":
    main()
