"""What the programs of this package share: ``files``, ``stopping``, and ``figures``."""
