"""From a release, or another ready checkpoint, to one file per device."""
