"""What is learned: tasks, networks, losses, metrics and data. Knows nothing of processes."""
