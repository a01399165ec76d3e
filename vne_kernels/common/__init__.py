"""What the programs of this package share: how they read, write, stop and draw."""
