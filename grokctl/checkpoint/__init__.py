"""The files on disk: the released format, torrents, and the ready format."""
