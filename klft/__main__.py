"""`python -m klft`: the command line."""

from klft.cli import main

if __name__ == "__main__":
    main()
