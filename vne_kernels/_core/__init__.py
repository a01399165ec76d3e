"""The private core: operators as torch sees them, and what the public functions share."""
