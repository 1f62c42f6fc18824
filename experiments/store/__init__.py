"""Files on disk, written atomically: records, caches, locks, unfinished work."""
