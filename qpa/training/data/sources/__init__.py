"""Where records come from, with one file for each format."""
