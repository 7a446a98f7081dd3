"""`python -m dml_dist` is `dml-dist`: torchrun starts it this way."""

from dml_dist.import_path import put_current_folder_last

put_current_folder_last()  # Before any library is imported.

from dml_dist.cli import main  # noqa: E402

main()
