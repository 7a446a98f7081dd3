"""`python -m dml_dist` is `dml-dist`: torchrun starts it this way."""

from dml_dist.cli import main

main()
