"""A plan as one web page to look at: it holds all its data, styles and scripts, and asks no network for anything."""

from partitioner.page.data import Alternative, page_data
from partitioner.page.write import page_text, write_page

__all__ = ["Alternative", "page_data", "page_text", "write_page"]
