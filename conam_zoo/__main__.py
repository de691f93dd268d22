"""``python -m conam_zoo`` is the ``conam`` command."""

from conam_zoo.cli import main

if __name__ == "__main__":
    main()
