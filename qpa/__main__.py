"""`python -m qpa`: the same as `qpa`, for programs that start modules, such as accelerate launch -m qpa."""

from qpa.cli.main import main

if __name__ == "__main__":
    main()
