"""``python -m prism`` is ``prism-proxy``."""

from prism.cli import main

if __name__ == "__main__":
    main()
