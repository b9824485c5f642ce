"""Local and S3 storage, Parquet files from outside, hashes of content, URLs."""
