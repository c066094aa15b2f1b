"""What changes a disk's chain of images while the guest uses it: snapshot, commit, stream."""
