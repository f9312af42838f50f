"""The interfaces of other packages, so that their users come over by changing an import."""
