"""``python -m lit_bnfold`` is ``lit-bnfold``."""

from lit_bnfold.cli import main

if __name__ == "__main__":
    main()
