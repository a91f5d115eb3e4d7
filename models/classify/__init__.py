"""Image classification with the networks of torchvision."""
