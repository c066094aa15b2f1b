"""raw: the disk's bytes and nothing else. Read and written by the drivers `aio` and `sync`."""
