"""Brokers: they order events, remember them and carry them between processes."""
