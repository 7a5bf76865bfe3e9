"""Captioned clips: manifests, videos, the cache, and the order in which they are seen."""
