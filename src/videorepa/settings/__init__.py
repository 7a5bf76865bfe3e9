"""What recipes are made of: typed sections, and fields that hold plugins."""
