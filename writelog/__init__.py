"""The write log and what is built on it: client, pre-copy daemon, replica."""
