"""The machine: device, files, fingerprints, the Hub, progress and wording."""
