"""Research on the zoo: what ConAM does to accuracy, speed and memory. Run with ``python -m experiments``."""
