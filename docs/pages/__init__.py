"""What makes pages of this site from the code: they cannot say what the code does not."""
