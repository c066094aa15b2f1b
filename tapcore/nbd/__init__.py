"""Network block device: the wire, the negotiation, the server and a client."""
