"""`python -m robust_dpo` is the command `robust-dpo`."""

from robust_dpo.cli import main

if __name__ == "__main__":
    main()
