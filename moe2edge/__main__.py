"""Entry point of ``python -m moe2edge``."""

from moe2edge.cli.main import main

if __name__ == "__main__":
    main()
