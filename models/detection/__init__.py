"""What all object detectors have in common."""
