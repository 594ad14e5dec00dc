"""`python -m entrocraft_trl`, and with it `accelerate launch -m entrocraft_trl` and `torchrun -m entrocraft_trl`."""

import sys

from .cli import main


if __name__ == "__main__":
    sys.exit(main())
