"""Reads and orders captioned clips: manifests, videos, the cache, and the training batches."""
