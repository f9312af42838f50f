"""Transports: they move one stream's bytes to one client."""
