"""Read files with limits, write files atomically: text, CSV, Parquet, and YAML with places."""
