"""``python -m vne_kernels.pretrain``."""

import sys

from vne_kernels.pretrain.cli import main

if __name__ == "__main__":
    sys.exit(main())
