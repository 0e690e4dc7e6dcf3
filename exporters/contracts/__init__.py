"""What an export promises, checked from its files alone."""
