"""Names of other libraries that are private or not documented, each once, with the version it was seen in."""
