"""Ways in which a contribution reaches a server and a version comes back."""
