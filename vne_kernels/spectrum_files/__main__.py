"""``python -m vne_kernels.spectrum_files``."""

import sys

from vne_kernels.spectrum_files.cli import main

if __name__ == "__main__":
    sys.exit(main())
