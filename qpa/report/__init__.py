"""What a run or an export says about itself: rows of a table, and JSON."""
