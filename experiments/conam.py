"""``python -m experiments.conam`` is the ``conam`` command, and knows the forms of the ablation."""

from conam_zoo.cli import main

if __name__ == "__main__":
    main()
