"""From a release, or another ready checkpoint, to one file for each device."""
