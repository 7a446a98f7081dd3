"""Importers of data sets in their original layouts."""

from __future__ import annotations

from typing import assert_never

from dml_dist.config.data import (
    Cars196Config,
    CUB200Config,
    CustomDatasetConfig,
    DatasetConfig,
    FolderConfig,
    GlyphsConfig,
    InShopConfig,
    SOPConfig,
    SOPShapeConfig,
    TableConfig,
)
from dml_dist.data.datasets.cars196 import Cars196Importer
from dml_dist.data.datasets.cub200 import CUB200Importer
from dml_dist.data.datasets.custom import CustomImporter
from dml_dist.data.datasets.folder import FolderImporter
from dml_dist.data.datasets.glyphs import GlyphsImporter
from dml_dist.data.datasets.inshop import InShopImporter
from dml_dist.data.datasets.sop import SOPImporter
from dml_dist.data.datasets.sop_shape import SOPShapeImporter
from dml_dist.data.datasets.table import TableImporter
from dml_dist.data.sample import Importer


def build_importer(config: DatasetConfig) -> Importer:
    """Return the importer of a data set; nothing is read yet."""
    match config:
        case GlyphsConfig():
            return GlyphsImporter(config)
        case SOPShapeConfig():
            return SOPShapeImporter(config)
        case FolderConfig():
            return FolderImporter(config)
        case TableConfig():
            return TableImporter(config)
        case SOPConfig():
            return SOPImporter(config)
        case CUB200Config():
            return CUB200Importer(config)
        case Cars196Config():
            return Cars196Importer(config)
        case InShopConfig():
            return InShopImporter(config)
        case CustomDatasetConfig():
            return CustomImporter(config)
        case _:
            assert_never(config)
