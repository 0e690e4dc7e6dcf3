"""The demonstration: a small model of our own, adapted and verified in a minute or two, offline."""
