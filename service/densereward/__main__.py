"""`python -m densereward`."""

from densereward.cli import main

if __name__ == "__main__":
    main()
