"""Data sets in the layouts people have, a synthetic source, and transforms."""
