"""Models: the K2.5 network, its chat format, the embedded engine and clients of servers."""
