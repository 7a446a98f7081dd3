"""Reports: tables, figures, retrieval galleries and one page, all from a run's folder."""

from dml_dist.report.formatting import ResultRow, result_table
from dml_dist.report.gallery import (
    Gallery,
    GalleryClass,
    GalleryNeighbor,
    GalleryQuery,
    choose_queries,
    read_gallery,
    write_gallery,
)
from dml_dist.report.page import write_report
from dml_dist.report.parts import try_to_write

__all__ = [
    "Gallery",
    "GalleryClass",
    "GalleryNeighbor",
    "GalleryQuery",
    "ResultRow",
    "choose_queries",
    "read_gallery",
    "result_table",
    "try_to_write",
    "write_gallery",
    "write_report",
]
