"""What a server is: partition, reduction, optimizer, server, client, transports. torch only: no Ray, no model."""
