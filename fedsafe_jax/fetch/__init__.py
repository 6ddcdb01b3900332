"""Data sets that are downloaded: a file over HTTP, its hashes, and a set of files in a folder."""
