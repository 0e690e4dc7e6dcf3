"""The formats of `qpa export`: one a file."""
