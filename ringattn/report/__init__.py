"""What runs have shown: read from their directories, as tables, pictures and one page."""
