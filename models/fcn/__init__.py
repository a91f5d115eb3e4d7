"""Semantic segmentation by a fully convolutional network."""
