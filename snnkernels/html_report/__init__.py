"""The report of a conversion as one HTML page that needs nothing beside itself."""

from .page import to_html

__all__ = ["to_html"]
