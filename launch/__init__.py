"""Composition and command line: the only package that knows all others, reads arguments and prints."""
