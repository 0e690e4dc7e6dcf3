"""The README.md of an export."""
