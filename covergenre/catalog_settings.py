"""From the settings that prepare and score share to how a catalog is read."""

from covergenre.catalog import CatalogOptions
from covergenre.config import CatalogSettings


def catalog_options(config: CatalogSettings) -> CatalogOptions:
    """The part of the settings that says how to read a catalog."""
    values = config.model_dump(include=set(CatalogSettings.model_fields), exclude_none=True)
    return CatalogOptions(**values)
