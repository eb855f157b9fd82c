"""From a release or a ready checkpoint to the files that other engines read."""
