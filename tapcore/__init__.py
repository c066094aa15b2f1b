"""The block engine: drivers layered into chains, served to guests."""

__version__ = "0.1.0"
