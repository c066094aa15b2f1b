"""Image formats: where a disk's bytes lie in a file, and the shared way of reading them."""
