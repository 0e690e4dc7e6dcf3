"""What is trained for, with one file for each objective."""
