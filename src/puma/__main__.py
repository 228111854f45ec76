"""``python -m puma`` is the command ``puma``."""

from puma.cli.app import main

if __name__ == "__main__":
    main()
