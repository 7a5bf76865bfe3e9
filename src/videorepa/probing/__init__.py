"""What features hold before and after alignment: closeness, contact, and where they come from."""
