"""What a device does with its share of the minibatch."""
