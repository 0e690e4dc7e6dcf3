"""A bench for methods that train few parameters: the same data, steps, search and counting for all."""
