"""What is kept on disk, whole or absent: records, caches, locks, unfinished work."""
