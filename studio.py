"""Look at the images of a set in the browser, and write both captions of each.

python studio.py "my set/images"
"""

import sys

from studio.command import main

if __name__ == "__main__":
    sys.exit(main())
