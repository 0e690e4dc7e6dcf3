"""What is trained for: an objective a file."""
